"""The report as a person sees it: opened from disk in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from orpo_ray.reports.report import write_report
from tests.support.browser import BrowserMissing, chromium
from tests.support.pages import METRIC, write_generations, write_sweep

pytestmark = [pytest.mark.slow, pytest.mark.core, pytest.mark.timeout(300)]

_WAIT_S = 30
EVIL = "</script><img src=x onerror='window.hacked=1'><b>bold</b>"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 200 trials; the best one writes what no page should run."""
    run_dir = tmp_path_factory.mktemp("browser") / "toy"
    run_dir.mkdir()
    results = write_sweep(run_dir, 200, num_pairs=48)
    write_generations(run_dir, results["winners"]["best"]["trial_id"], EVIL)
    return next(file for file in write_report(run_dir, formats=["html"]) if file.suffix == ".html")


@pytest.fixture(scope="module")
def desktop(page: Path) -> Iterator[webdriver.Chrome]:
    yield from opened(page)


def opened(page: Path, **window: object) -> Iterator[webdriver.Chrome]:
    try:
        with chromium(**window) as driver:  # type: ignore[arg-type]
            driver.get(page.as_uri())
            yield driver
    except BrowserMissing as missing:
        pytest.skip(str(missing))


def see_everything(driver: webdriver.Chrome) -> None:
    """Scroll through the page until every figure has been drawn."""
    done = "return !!arguments[0].dataset.drawn || arguments[0].classList.contains('none')"
    for plot in driver.find_elements(By.CSS_SELECTOR, ".plot"):
        driver.execute_script("arguments[0].scrollIntoView()", plot)
        WebDriverWait(driver, _WAIT_S).until(lambda d, plot=plot: d.execute_script(done, plot))


def column(driver: webdriver.Chrome, number: int) -> list[str]:
    script = "return [...document.querySelectorAll('#all tbody tr')].filter(r => !r.hidden).map(r => r.cells[%d].%s)"
    return driver.execute_script(script % (number, "dataset.v"))


def test_all_figures_are_drawn_without_an_error_or_a_request(page: Path, desktop: webdriver.Chrome) -> None:
    assert desktop.execute_script("return document.querySelector('.best strong').getBoundingClientRect().bottom") < 800
    last = desktop.find_elements(By.CSS_SELECTOR, ".plot")[-1]
    assert not last.get_attribute("data-drawn")  # not before it comes into sight
    see_everything(desktop)
    drawn = desktop.find_elements(By.CSS_SELECTOR, ".plot[data-drawn] .main-svg")
    without_webgl = desktop.find_elements(By.CSS_SELECTOR, ".plot.none")
    assert len(drawn) >= 15 - len(without_webgl)
    assert all("no WebGL" in plot.text for plot in without_webgl)
    messages = [entry for entry in desktop.get_log("browser") if entry["level"] == "SEVERE"]
    assert messages == []
    events = [json.loads(entry["message"])["message"] for entry in desktop.get_log("performance")]
    requests = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    # The browser's own first tab asks for things too.
    asked = {r["request"]["url"] for r in requests if r["documentURL"] == page.as_uri()}
    assert page.as_uri() in asked
    assert {url.split(":")[0] for url in asked - {page.as_uri()}} <= {"data", "blob"}


def test_what_a_model_wrote_is_shown_and_not_run(desktop: webdriver.Chrome) -> None:
    assert EVIL in desktop.find_element(By.ID, "generations").text
    assert desktop.execute_script("return window.hacked") is None
    assert desktop.find_elements(By.CSS_SELECTOR, "#generations b, #generations img") == []


def test_trials_sort_by_key_and_by_click(desktop: webdriver.Chrome) -> None:
    heads = [head.text.strip() for head in desktop.find_elements(By.CSS_SELECTOR, "#all thead th")]
    place = heads.index(METRIC.removeprefix("eval/"))
    head = desktop.find_elements(By.CSS_SELECTOR, "#all thead th")[place]
    head.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert head.get_attribute("aria-sort") == "ascending"
    values = [float(value) for value in column(desktop, place) if value]
    assert values == sorted(values)
    head.find_element(By.TAG_NAME, "button").click()
    assert head.get_attribute("aria-sort") == "descending"
    values = [float(value) for value in column(desktop, place) if value]
    assert len(values) == 200
    assert values == sorted(values, reverse=True)
    assert len(desktop.find_elements(By.CSS_SELECTOR, "[aria-sort=ascending], [aria-sort=descending]")) == 1


def test_trials_are_filtered_by_text_and_status(desktop: webdriver.Chrome) -> None:
    total = len(column(desktop, 1))
    lost = column(desktop, 1).count("diverged")
    desktop.find_element(By.CSS_SELECTOR, "#status option[value=diverged]").click()
    assert column(desktop, 1) == lost * ["diverged"]
    assert desktop.find_element(By.ID, "shown").text == f"{lost} of {total} trials"
    desktop.find_element(By.ID, "filter").send_keys("16m")
    assert set(column(desktop, 2)) == {"16m"}
    assert len(column(desktop, 2)) < lost
    desktop.find_element(By.ID, "filter").send_keys(" nowhere")
    assert desktop.find_element(By.ID, "shown").text == f"0 of {total} trials"
    desktop.find_element(By.ID, "filter").clear()
    desktop.find_element(By.CSS_SELECTOR, "#status option[value='']").click()
    assert desktop.find_element(By.ID, "shown").text == f"{total} of {total} trials"


def test_a_command_is_copied(desktop: webdriver.Chrome) -> None:
    desktop.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    button = desktop.find_element(By.CSS_SELECTOR, "#all tr.winner .copy")
    desktop.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.send_keys(Keys.ENTER)
    WebDriverWait(desktop, _WAIT_S).until(lambda d: button.text == "Copied")
    box = desktop.find_element(By.ID, "filter")
    box.send_keys(Keys.CONTROL, "v")
    assert box.get_attribute("value") == button.get_attribute("data-copy")
    assert desktop.find_element(By.ID, "copied").text.startswith("orpo-ray train ")
    box.clear()


def test_the_other_trials_curves_come_on_demand(desktop: webdriver.Chrome) -> None:
    box = desktop.find_element(By.CSS_SELECTOR, "#curves .rest")
    lines = "return document.querySelectorAll('#curves .scatterlayer .trace').length"
    before = desktop.execute_script(lines)
    desktop.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
    box.send_keys(Keys.SPACE)
    WebDriverWait(desktop, _WAIT_S).until(lambda d: d.execute_script(lines) == before + 9)  # 3 panels of 3 sizes


def test_the_keyboard_reaches_the_content_first(desktop: webdriver.Chrome) -> None:
    desktop.refresh()
    desktop.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    skip = desktop.switch_to.active_element
    assert skip.text == "Skip to the report"
    assert desktop.execute_script("return getComputedStyle(arguments[0]).outlineStyle", skip) == "solid"
    skip.send_keys(Keys.ENTER)
    assert desktop.switch_to.active_element.get_attribute("id") == "main"


def test_a_narrow_phone_in_dark_mode_scrolls_in_one_direction(page: Path) -> None:
    for driver in opened(page, width=320, height=640, dark=True):
        see_everything(driver)
        assert driver.execute_script("return document.documentElement.scrollWidth") == 320
        paper = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert paper == "rgb(18, 22, 27)"
        drawn = {plot.get_attribute("data-drawn") for plot in driver.find_elements(By.CSS_SELECTOR, ".plot")}
        assert drawn <= {"dark", None}
        ink = "return getComputedStyle(document.querySelector('.plot .xtick text')).fill"
        assert driver.execute_script(ink) == "rgb(230, 233, 237)"
        assert [e for e in driver.get_log("browser") if e["level"] == "SEVERE"] == []
