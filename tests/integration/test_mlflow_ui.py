"""What a person sees in MLflow the morning after: a real server, a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from orpo_ray.config import parse
from orpo_ray.storage.results import summarize
from orpo_ray.tracking.sweep_tracker import SweepTracker
from tests.support.browser import BrowserMissing, chromium, mlflow_server
from tests.support.events import as_event, as_state

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

METRIC = "eval/preference_accuracy"
SETTINGS = [(lam, lr, size) for lam in (0.0, 0.1) for lr in (1.0e-3, 3.0e-3) for size in ("1m", "4m")]
_WAIT_S = 60
_EXPAND = ".//ancestor::*[@role='gridcell'][1]//button[contains(@data-component-id, 'runnamecell')]"


class Seen:
    """A finished sweep of made-up numbers on a server, and a browser to look at it."""

    def __init__(self, url: str, driver: webdriver.Chrome, names: list[str]) -> None:
        self.url, self.driver, self.names = url, driver, names
        self.client = MlflowClient(url)
        self.experiment_id = self.client.get_experiment_by_name("ui").experiment_id
        runs = self.client.search_runs([self.experiment_id])
        (self.parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        self.children = [run for run in runs if run is not self.parent]

    def visit(self, path: str, *texts: str) -> str:
        """Open a page and wait until it shows these texts; all of its text."""
        self.driver.get(f"{self.url}/#/{path}")
        self.driver.refresh()  # a change behind the # alone does not load a page
        return self.wait_for(*texts)

    def wait_for(self, *texts: str) -> str:
        """Wait until the page shows these texts; all of its text."""

        def shown(driver: webdriver.Chrome) -> bool:
            text = driver.find_element(By.TAG_NAME, "body").text
            return all(wanted in text for wanted in texts)

        WebDriverWait(self.driver, _WAIT_S, ignored_exceptions=[Exception]).until(shown, f"no {texts} on the page")
        return self.driver.find_element(By.TAG_NAME, "body").text


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    folder = tmp_path_factory.mktemp("ui")
    backend = f"sqlite:///{folder}/mlflow.db"
    try:
        with (
            mlflow_server(backend, folder / "artifacts", folder / "server.log") as url,
            chromium(1700, 1000) as driver,
        ):
            names = _sweep(folder, url)
            yield Seen(url, driver, names)
    except BrowserMissing as missing:
        pytest.skip(str(missing))


def _sweep(folder: Path, url: str) -> list[str]:
    """Deliver a sweep of made-up numbers; names of its trials' runs."""
    config = parse(
        {
            "name": "which-lambda",
            "output_dir": str(folder / "runs"),
            "model": {"path": "tiny-llama-1m"},
            "data": {"path": "builtin://style-pairs"},
            "train": {"max_steps": 20, "eval_every": 10},
            "tracking": {"experiment": "ui", "uri": url},
            "sweep": {
                "space": {
                    "loss.orpo_lambda": {"type": "grid", "values": [0.0, 0.1]},
                    "optim.lr": {"type": "grid", "values": [1.0e-3, 3.0e-3]},
                    "model": {"type": "bundle", "values": {s: {"model.path": f"tiny-llama-{s}"} for s in ("1m", "4m")}},
                }
            },
        }
    )
    events: list[dict[str, Any]] = []

    def event(kind: str, trial_id: str, **details: Any) -> None:
        events.append({"event": kind, "trial_id": trial_id, **details, "time": 1_760_000_000_000 + 1000 * len(events)})

    for place, (lam, lr, size) in enumerate(SETTINGS):
        trial_id = f"{place:05d}"
        params = {"loss.orpo_lambda": lam, "optim.lr": lr, "model": size}
        event("submitted", trial_id, params=params, bundle=size, purpose="search")
        facts = {"model/parameters": 1_000_000 if size == "1m" else 4_000_000}
        event("started", trial_id, attempt=0, group="g", step=0, max_steps=20, facts=facts)
        metrics: dict[str, float] = {}
        for step in (10, 20):
            event(
                "log", trial_id, step=step, metrics={"train/loss": 5 - step / 10 - lam, "perf/tokens_per_second": 1e3}
            )
            metrics = {METRIC: 0.5 + lam + step / 100, "eval/nll": 4 - step / 10 + lam}
            event("eval", trial_id, step=step, metrics=metrics, checkpoint=None, seconds=float(step))
        end = {"steps": 20, "metrics": metrics, "checkpoint": None, "train_seconds": 20.0, "error": None}
        event("finished", trial_id, status="finished", **end)
    provenance = {"command": "orpo-ray sweep which.yaml", "packages": {"orpo-ray": "0"}, "git": None}
    tracker = SweepTracker(config, "sweep-ui", provenance)
    tracker.start()
    tracker.handle(map(as_event, events))
    assert tracker.flush() == 0
    assert tracker.close(summarize("which-lambda", METRIC, "max", as_state(events), tracker.run_ids)) == 0
    client = MlflowClient(url)
    return [client.get_run(run_id).info.run_name for run_id in tracker.run_ids.values()]


def test_the_parent_shows_its_children(seen: Seen) -> None:
    assert len(set(seen.names)) == len(SETTINGS)
    page = seen.visit(f"experiments/{seen.experiment_id}/runs", "which-lambda")
    assert not any(name in page for name in seen.names), "children are shown although their parent is closed"
    link = seen.driver.find_element(By.XPATH, "//a[contains(., 'which-lambda')]")
    link.find_element(By.XPATH, _EXPAND).click()
    seen.wait_for("which-lambda", *seen.names)


def test_the_compare_view_shows_the_axes(seen: Seen) -> None:
    ids = ",".join(f'"{run.info.run_id}"' for run in seen.children)
    page = seen.visit(
        f'compare-runs?runs=[{ids}]&experiments=["{seen.experiment_id}"]',
        f"Comparing {len(SETTINGS)} Runs",
        "loss.orpo_lambda",
        "optim.lr",
        "model",
    )
    for value in ("0.001", "0.003", "1m", "4m", f"final/{METRIC.removeprefix('eval/')}"):
        assert value in page, value
    # Plotly draws a path per run between the axes of its parallel coordinates.
    axes = seen.driver.find_elements(By.CSS_SELECTOR, ".parcoords .axis-title, .parcoords text")
    titles = {axis.text for axis in axes} | {axis.get_attribute("textContent") for axis in axes}
    assert {"axes.loss.orpo_lambda", "axes.optim.lr", "axes.model"} <= titles, "not what MLflow draws unasked"


def test_a_trial_says_what_it_was(seen: Seen) -> None:
    run = next(run for run in seen.children if run.data.params["loss.orpo_lambda"] == "0.1")
    page = seen.visit(f"experiments/{seen.experiment_id}/runs/{run.info.run_id}", run.info.run_name, "optim.lr")
    assert "which-lambda" in page, "no way back to the parent"
    seen.visit(f"experiments/{seen.experiment_id}/runs/{run.info.run_id}/model-metrics", "train", "eval", "final")
