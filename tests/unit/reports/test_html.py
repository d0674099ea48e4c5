import json
import re
import shlex
import time
from html.parser import HTMLParser

import pytest

from orpo_ray.cli import main
from orpo_ray.config import load
from orpo_ray.reports.experiment_file import write_experiment
from orpo_ray.reports.html import script_json
from orpo_ray.reports.report import write_report
from orpo_ray.storage.results import load_results
from orpo_ray.storage.run_dir import write_results
from tests.support.pages import METRIC, write_generations, write_sweep


class Reader(HTMLParser):
    """Sections' texts, ids, and what a page would load."""

    def __init__(self, page):
        super().__init__()
        self.sections, self.loaded, self.scripts, self._open, self._script = {}, [], {}, None, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "section":
            self._open = attrs["id"]
        self.loaded += [attrs[k] for k in ("src", "srcset") if k in attrs]
        if tag == "link":
            self.loaded.append(attrs["href"])
        if tag == "script":
            self._script = attrs.get("id", "code")

    def handle_endtag(self, tag):
        if tag == "section":
            self._open = None
        if tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._script is not None:
            self.scripts[self._script] = data
        elif self._open is not None:
            self.sections[self._open] = self.sections.get(self._open, "") + data


def words(text):
    return re.sub(r"\s+", " ", text)


def page_of(run_dir):
    write_report(run_dir, formats=["html"])
    return (run_dir / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("page") / "toy"
    run_dir.mkdir()
    return write_sweep(run_dir, 48, num_pairs=24), run_dir


def test_the_answer_comes_first_and_the_sections_in_their_order(sweep):
    results, run_dir = sweep
    reader = Reader(page_of(run_dir))
    assert [*reader.sections] == [
        *("answer", "maps", "curves", "pareto", "settings", "scaling", "divergence"),
        *("cost", "trials", "ends", "generations", "provenance"),
    ]
    answer, best = words(reader.sections["answer"]), results["winners"]["best"]
    assert f"Best: {best['name']}. {METRIC} = {best['mean']:.4f} [{best['low']:.4f}, {best['high']:.4f}]" in answer
    finished = sum(trial["status"] == "finished" for trial in results["trials"])
    assert f"{finished} of 48" in answer
    for name in results["winners"]["tied"][:5]:
        assert name in answer


def test_the_page_loads_nothing_and_forbids_it(sweep):
    page = page_of(sweep[1])
    reader = Reader(page)
    assert reader.loaded == ["data:,"]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1)
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "*" not in policy
    assert page.count("plotly.js v") == 1  # once, not once a figure


def test_every_figure_has_data_a_caption_and_an_alternative(sweep):
    page = page_of(sweep[1])
    reader = Reader(page)
    ids = re.findall(r'class="plot" id="(plot-\d+)" role="img" aria-label="([^"]+)"', page)
    assert len(ids) == len({name for name, _ in ids}) == 1 + 3 + 3 + 1 + 1 + 1 + 2 + 3
    for name, label in ids:
        assert json.loads(reader.scripts[f"{name}-data"])["data"]
        assert len(label) > 20
    assert page.count("<figure>") == page.count("<figcaption>") == 8


def test_cost_and_speed_are_those_of_the_journal(sweep):
    results, run_dir = sweep
    cost = words(Reader(page_of(run_dir)).sections["cost"])
    seconds = sum(t["train_seconds"] for t in results["trials"] if t["bundle"] == "16m") * 2  # two workers
    hours = f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
    steps = sum(t["steps"] for t in results["trials"] if t["bundle"] == "16m")
    assert f"16m16,785,408162{4e5 * 1e6 / 16_785_408:,.0f}2.18{steps:,}{hours}" in cost.replace(" 16m", "16m")


def test_all_trials_are_in_the_table_with_commands_that_parse(sweep):
    results, run_dir = sweep
    page = page_of(run_dir)
    commands = re.findall(r'data-copy="([^"]+)" aria-label="Copy the command that trains (\d+) again"', page)
    assert sorted(trial_id for _, trial_id in commands) == [t["trial_id"] for t in results["trials"]]
    params = {t["trial_id"]: t["params"] for t in results["trials"]}
    for text, trial_id in commands[::7]:
        program, command, file, *overrides = shlex.split(text)
        assert (program, command) == ("orpo-ray", "train")
        config = load(file, [*overrides, "sweep=null"])
        mine = params[trial_id]
        assert config.name == f"toy-{trial_id}"
        assert config.optim.lr == mine["optim.lr"]
        assert config.loss.orpo_lambda == mine["loss.orpo_lambda"]
        assert config.train.seed == mine["train.seed"]
        assert config.model.path == f"tiny-llama-{mine['model']}"
        assert config.scaling.num_workers == (2 if mine["model"] == "16m" else 1)
        assert config.train.max_steps == 200


def test_failures_are_told_with_their_reasons(sweep):
    results, run_dir = sweep
    ends = words(Reader(page_of(run_dir)).sections["ends"])
    diverged = [t for t in results["trials"] if t["status"] == "diverged"]
    assert f"Diverged: {len(diverged)}" in ends
    assert "log-probabilities not finite at step 43 for 2 pair(s): a, b" in ends


def test_generations_of_the_best_and_of_no_preference_stand_side_by_side(sweep):
    results, run_dir = sweep
    assert "No generations were recorded" in Reader(page_of(run_dir)).sections["generations"]
    best = results["winners"]["best"]["trial_id"]
    without = [t for t in results["trials"] if t["status"] == "finished" and t["params"]["loss.orpo_lambda"] == 0]
    control = max((t for t in without if t["trial_id"] != best), key=lambda t: t["metrics"][METRIC])["trial_id"]
    write_generations(run_dir, best, "boil water")
    assert "The best trial with λ = 0 has no generations." in Reader(page_of(run_dir)).sections["generations"]
    write_generations(run_dir, control, "tea is nice")
    said = words(Reader(page_of(run_dir)).sections["generations"])
    assert said.count("boil water (step 200") == said.count("tea is nice (step 200") == 3
    assert "step 100" not in said  # the last evaluation's only
    assert said.index("boil water (step 200, pair 1)") < said.index("tea is nice (step 200, pair 1)")
    assert "Heat water, add the leaves, wait." in said


EVIL = '</script><img src=x onerror="window.hacked=1">'


def test_what_users_wrote_stays_text(tmp_path):
    run_dir = tmp_path / "evil"
    run_dir.mkdir()
    write_sweep(run_dir, 24, num_pairs=8)
    for file in ("results.json", "sweep.json", "events.jsonl"):  # the label of a bundle
        text = (run_dir / file).read_text()
        (run_dir / file).write_text(text.replace('"16m', json.dumps(EVIL)[:-1]))
    results = load_results(run_dir)
    results["name"] = EVIL
    results["trials"][0] |= {"status": "failed", "error": f"bad thing {EVIL} ![x](http://example.org/x.png)"}
    write_results(run_dir / "results.json", results)
    best = results["winners"]["best"]["trial_id"]
    write_generations(run_dir, best, EVIL)
    page = page_of(run_dir)
    assert "<img" not in page.replace(Reader(page).scripts["code"], "").split("plotly.js v")[0]
    reader = Reader(page)
    assert reader.loaded == ["data:,"]
    assert EVIL in reader.sections["generations"]
    figures = [json.loads(text) for name, text in reader.scripts.items() if name.startswith("plot-")]
    assert any(EVIL in json.dumps(figure, ensure_ascii=False).replace('\\"', '"') for figure in figures)


def test_a_page_of_a_sweep_that_has_only_begun(tmp_path):
    results = {"name": "toy", "metric": METRIC, "mode": "max", "best": None, "trials": []}
    write_results(tmp_path / "results.json", results)
    page = page_of(tmp_path)
    reader = Reader(page)
    assert "No trial has been submitted yet." in words(reader.sections["trials"])
    assert "plotly.js v" not in page  # without figures no library of 5 MB
    for section in ("maps", "curves", "pareto", "settings", "scaling", "divergence"):
        assert len(words(reader.sections[section])) > 60


def test_the_config_and_where_it_came_from(sweep):
    _, run_dir = sweep
    assert "Command and versions are written when the sweep ends" in page_of(run_dir)
    config = load(run_dir / "experiment.yaml")
    write_report(run_dir, config, formats=["html"])
    told = words(Reader((run_dir / "report.html").read_text()).sections["provenance"])
    assert "deepspeed" in told
    assert "eval_every: 10" in told
    kept = (run_dir / "provenance.json").read_bytes()
    assert "Started with" in page_of(run_dir)  # later, without the config
    assert (run_dir / "provenance.json").read_bytes() == kept


def test_formats_are_asked_for_by_name(sweep, capsys):
    results, run_dir = sweep
    for file in ("report.html", "report.md", "trials.csv", "evaluations.csv"):
        (run_dir / file).unlink(missing_ok=True)
    assert main(["report", run_dir.name, "--output-dir", str(run_dir.parent), "--format", "csv"]) == 0
    assert not (run_dir / "report.html").exists()
    import pandas as pd

    trials = pd.read_csv(run_dir / "trials.csv", dtype={"trial_id": str})
    best = results["winners"]["best"]["trial_id"]
    value = trials.set_index("trial_id").loc[best, METRIC]
    assert value == pytest.approx(next(t["metrics"][METRIC] for t in results["trials"] if t["trial_id"] == best))
    evaluations = pd.read_csv(run_dir / "evaluations.csv")
    assert len(evaluations) == sum(t["steps"] // 10 for t in results["trials"])
    assert main(["report", str(run_dir), "--format", "html", "--format", "png"]) == 0
    assert (run_dir / "report.html").exists()
    assert (run_dir / "plots" / "curves.png").exists()
    assert not (run_dir / "report.md").exists()
    assert main(["report", "no-such-sweep", "--output-dir", str(run_dir.parent)]) == 2
    assert "the nearest names there: toy" in " ".join(capsys.readouterr().err.split())


def test_five_hundred_trials_in_time_and_size(tmp_path):
    run_dir = tmp_path / "large"
    run_dir.mkdir()
    write_sweep(run_dir, 500, num_pairs=48)
    started = time.process_time()
    page = page_of(run_dir)
    assert time.process_time() - started < 10
    assert len(page.encode()) < 8_000_000
    assert len(load_results(run_dir)["trials"]) == page.count("<tr data-status=") == 500


def test_what_is_sent_to_others_has_no_password(tmp_path):
    write_sweep(tmp_path, 12, num_pairs=24)
    known = json.loads((tmp_path / "sweep.json").read_text())
    known["config"]["tracking"]["uri"] = "http://me:secret@host:5000"
    (tmp_path / "sweep.json").write_text(json.dumps(known))
    config = load(write_experiment(tmp_path), ["tracking.uri=http://me:secret@host:5000"])
    for file in write_report(tmp_path, config):
        if file.suffix in (".html", ".yaml", ".md", ".json"):
            assert "secret" not in file.read_text(encoding="utf-8"), file
    assert "http://host:5000" in (tmp_path / "best.yaml").read_text()


def test_data_in_a_script_cannot_end_it():
    text = json.dumps({"name": "</script><!-- & 'more'"})
    escaped = str(script_json(text))
    assert not {"<", ">", "&"} & {*escaped}
    assert json.loads(escaped) == json.loads(text)
