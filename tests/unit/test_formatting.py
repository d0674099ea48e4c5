import pytest

from orpo_ray import formatting
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


def test_durations_change_their_unit_at_two_minutes_and_two_hours():
    assert [formatting.duration(s) for s in (None, 12.34, 119.9, 120, 7199, 7200)] == [
        *("–", "12.3 s", "119.9 s", "2.0 min", "120.0 min", "2.0 h"),
    ]


def test_counts_of_parameters_have_three_digits():
    assert [formatting.short_count(n) for n in (999, 922_752, 1.3e9)] == ["999", "923K", "1.3B"]
    assert formatting.short_count(4_198_656, (" B", " M", " k")) == "4.2 M"


def test_statuses_are_words_and_zero_counts_are_left_out():
    assert formatting.ended_as({"finished": 12, "stopped_early": 2, "failed": 0}) == "12 finished, 2 stopped early"
    assert (formatting.better_when("max"), formatting.better_when("min")) == ("higher", "lower")
