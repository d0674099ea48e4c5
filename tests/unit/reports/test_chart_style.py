from orpo_ray.reports import chart_style


def test_colours_of_series_differ_between_light_and_dark_pages():
    for place in (0.0, 1.0):
        colour = chart_style.viridis(place)
        light, dark = (sum(map(int, colour[mode][4:-1].split(","))) for mode in ("light", "dark"))
        assert dark > light  # viridis from its darkest to its lightest: each page leaves out what it swallows
    assert chart_style.viridis(0.0)["light"] == "rgb(68, 1, 84)"
