import pytest

from orpo_ray.formatting import GIB, MIB, byte_size, gib, markdown_table, mib, number, rough_duration


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


def test_bytes_and_durations() -> None:
    assert (gib(3 * GIB // 2), mib(3 * MIB // 2)) == ("1.5 GiB", "1.5 MiB")
    assert [byte_size(count) for count in (MIB, GIB - 1, GIB)] == ["1 MiB", "1024 MiB", "1.0 GiB"]
    texts = [rough_duration(hours) for hours in (0.0, 0.5, 1.0, 47.9, 48.0)]
    assert texts == ["1 min", "30 min", "1.0 h", "47.9 h", "2.0 days"]
