"""The README's pictures of a finished sweep: its report, and how MLflow shows it.

    python -m docs.make_screenshots runs/quickstart

Needs Chromium with its driver (Debian: chromium, chromium-driver). Writes docs/*.png.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from mlflow import MlflowClient
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from orpo_ray.storage.results import load_results
from tests.support.browser import chromium, mlflow_server

HERE = Path(__file__).parent
_SETTLE_S = 3.0
"""Plots move a moment after their page says that it is there."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.make_screenshots", description=__doc__.splitlines()[0])
    parser.add_argument(
        "run_dir", type=Path, help="of a finished sweep whose MLflow runs are in <output_dir>/mlflow.db"
    )
    run_dir = parser.parse_args().run_dir.absolute()
    with tempfile.TemporaryDirectory() as folder:
        # The pictures are of no particular machine: its folders are left out.
        page = (run_dir / "report.html").read_text(encoding="utf-8")
        report = Path(folder) / "report.html"
        report.write_text(page.replace(f"{run_dir.parent.parent}/", ""), encoding="utf-8")
        for name, width, height, dark in (("report", 1280, 1000, False), ("report_phone", 390, 844, True)):
            with chromium(width, height, dark=dark) as driver:
                driver.get(report.as_uri())
                time.sleep(_SETTLE_S)
                driver.save_screenshot(str(HERE / f"{name}.png"))
        backend = f"sqlite:///{run_dir.parent / 'mlflow.db'}"
        artifacts, log = run_dir.parent / "mlartifacts", Path(folder) / "log"
        with mlflow_server(backend, artifacts, log) as url, chromium(1500, 950) as driver:
            _mlflow(url, driver, load_results(run_dir))


def _mlflow(url: str, driver: webdriver.Chrome, results: dict[str, object]) -> None:
    client, trials = MlflowClient(url), results["trials"]
    assert isinstance(trials, list)
    ids = [trial["mlflow_run_id"] for trial in trials]
    experiment = client.get_run(ids[0]).info.experiment_id
    listed = ",".join(f'"{run_id}"' for run_id in ids)
    _show(driver, f'{url}/#/compare-runs?runs=[{listed}]&experiments=["{experiment}"]', f"Comparing {len(ids)} Runs")
    driver.save_screenshot(str(HERE / "mlflow_compare.png"))
    _show(driver, f"{url}/#/experiments/{experiment}/runs", str(results["name"]))
    link = driver.find_element(By.XPATH, f"//a[contains(., '{results['name']}')]")
    expand = ".//ancestor::*[@role='gridcell'][1]//button[contains(@data-component-id, 'runnamecell')]"
    link.find_element(By.XPATH, expand).click()
    time.sleep(_SETTLE_S)
    driver.save_screenshot(str(HERE / "mlflow_runs.png"))


def _show(driver: webdriver.Chrome, address: str, text: str) -> None:
    """Open a page and wait until it shows the text; without the assistant that MLflow opens beside it."""
    driver.get(address)
    driver.refresh()
    WebDriverWait(driver, 60, ignored_exceptions=[Exception]).until(
        lambda page: text in page.find_element(By.TAG_NAME, "body").text
    )
    time.sleep(_SETTLE_S)
    for button in driver.find_elements(By.CSS_SELECTOR, "button[aria-label='Close']"):
        button.click()
    time.sleep(1)


if __name__ == "__main__":
    main()
