import pytest

from orpo_ray.formatting import markdown_table, number


def test_numbers_stand_to_the_right_and_text_to_the_left() -> None:
    titles = ["trial", "metric", "change", "status", "interval", "missing"]
    rows = [["1", "**0.5**", "-0.25", "finished", "0.1 to 0.9", "–"], ["2", "1e-05", "+.5", "3 failed", ".2", ""]]
    assert markdown_table(titles, rows).splitlines() == [
        "| trial | metric | change | status | interval | missing |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
        "| 1 | **0.5** | -0.25 | finished | 0.1 to 0.9 | – |",
        "| 2 | 1e-05 | +.5 | 3 failed | .2 |  |",
    ]


def test_a_bar_does_not_end_a_cell_and_a_table_may_be_empty() -> None:
    assert markdown_table(["a"], [["x|y"]]).splitlines()[2] == "| x\\|y |"
    assert markdown_table(["a", "b"], []) == "| a | b |\n| --- | --- |"


@pytest.mark.parametrize(("value", "shown"), [(None, "–"), (float("nan"), "–"), (0.25, "0.2500")])
def test_a_missing_number_is_a_dash(value, shown: str) -> None:
    assert number(value) == shown
