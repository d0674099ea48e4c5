import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from orpo_ray.config import ExperimentConfig, parse
from orpo_ray.data.dataset import Pair, PairDataset, load_pairs
from orpo_ray.models.logps import PairLogps
from orpo_ray.training.reference import ReferenceLogpsError, identity_of, load_or_compute

MODEL = {"model": "a"}


def config(**changes: Any) -> ExperimentConfig:
    tree = {
        "name": "test",
        "model": {"path": "tiny-llama-1m"},
        "data": {"path": "builtin://style-pairs"},
        "loss": {"name": "dpo"},
        "train": {"max_steps": 10},
    }
    return parse(tree, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])


@pytest.fixture(scope="module")
def datasets(
    tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PairDataset, PairDataset]:
    data = config(data__train_pairs=23, data__eval_pairs=11, data__cache_dir=tmp_path_factory.mktemp("pairs")).data
    return load_pairs(data, tokenizer)


@pytest.fixture(scope="module")
def pairs(datasets: tuple[PairDataset, PairDataset]) -> PairDataset:
    return datasets[0]


def value_of(pair: Pair) -> tuple[float, float]:
    """A log-probability that tells pairs and sides apart."""
    return -float(pair.chosen_ids.sum()) / 1000, -float(pair.rejected_ids.sum()) / 1000


class Model:
    """Stands in for the reference model and counts what it is asked."""

    def __init__(self, broken: str = "") -> None:
        self.batches: list[list[Pair]] = []
        self.broken = broken

    def __call__(self, pairs: Sequence[Pair]) -> PairLogps:
        assert not torch.is_grad_enabled()
        self.batches.append(list(pairs))
        chosen_P, rejected_P = torch.tensor([value_of(pair) for pair in pairs]).T.clone()
        rejected_P[torch.tensor([pair.pair_id == self.broken for pair in pairs])] = torch.nan
        ones_P = torch.ones(len(pairs))
        return PairLogps(chosen_P, rejected_P, ones_P, ones_P, ones_P, ones_P)


def reference(
    pairs: PairDataset, model: Any, folder: Path, identity: dict[str, Any] = MODEL, **limits: int
) -> np.ndarray:
    return load_or_compute(pairs, model, identity, cache_dir=str(folder), **({"max_tokens": 512} | limits))


def files(folder: Path) -> list[str]:
    return sorted(path.suffix for path in (folder / "reference").iterdir())


def test_values_come_in_the_order_of_the_pairs(pairs: PairDataset, tmp_path: Path) -> None:
    means_N2 = reference(pairs, Model(), tmp_path)
    assert means_N2.dtype == np.float32
    np.testing.assert_array_equal(means_N2, np.array([value_of(pair) for pair in pairs], dtype=np.float32))


def test_the_second_call_computes_nothing(pairs: PairDataset, tmp_path: Path) -> None:
    first, second = Model(), Model()
    computed = reference(pairs, first, tmp_path)
    read = reference(pairs, second, tmp_path)
    assert sum(map(len, first.batches)) == len(pairs)
    assert second.batches == []
    np.testing.assert_array_equal(read, computed)
    assert files(tmp_path) == [".lock", ".npy"]


def test_another_model_or_other_pairs_are_computed(datasets: tuple[PairDataset, PairDataset], tmp_path: Path) -> None:
    train, held_out = datasets
    reference(train, Model(), tmp_path)
    for pairs, identity in ((train, {"model": "b"}), (held_out, MODEL)):
        model = Model()
        assert reference(pairs, model, tmp_path, identity).shape == (len(pairs), 2)
        assert sum(map(len, model.batches)) == len(pairs)


@pytest.mark.parametrize("limits", [{}, {"max_tokens": 100}, {"max_tokens": 1}, {"max_tokens": 10**6, "max_pairs": 5}])
def test_batches_are_of_like_length_and_the_longest_come_first(
    pairs: PairDataset, tmp_path: Path, limits: dict[str, int]
) -> None:
    model = Model()
    reference(pairs, model, tmp_path, **limits)
    widths = [
        [len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in batch] for batch in model.batches
    ]
    assert max(widths[0]) == max(map(max, widths))
    neighbours = sorted(widths, key=min)
    assert all(max(a) <= min(b) for a, b in itertools.pairwise(neighbours))
    assert sorted(p.pair_id for batch in model.batches for p in batch) == sorted(p.pair_id for p in pairs)
    for batch in widths:
        assert len(batch) == 1 or 2 * len(batch) * max(batch) <= limits.get("max_tokens", 512)
        assert len(batch) <= limits.get("max_pairs", len(pairs))


def test_computing_does_not_move_the_random_state(pairs: PairDataset, tmp_path: Path) -> None:
    """Else a run that finds the cache filled would draw other dropout than the run that filled it."""

    class Reseeds(Model):
        def __call__(self, pairs: Sequence[Pair]) -> PairLogps:
            torch.manual_seed(1)  # as loading a model does
            return super().__call__(pairs)

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    reference(pairs, Reseeds(), tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_log_probabilities_that_are_not_finite_are_refused_and_not_kept(pairs: PairDataset, tmp_path: Path) -> None:
    broken = pairs[4].pair_id
    with pytest.raises(ReferenceLogpsError, match=f"not finite for 1 of 23.*{broken}.*fp32"):
        reference(pairs, Model(broken), tmp_path)
    assert files(tmp_path) == [".lock"]
    assert np.isfinite(reference(pairs, Model(), tmp_path)).all()


def test_a_file_of_other_pairs_is_refused(pairs: PairDataset, tmp_path: Path) -> None:
    reference(pairs, Model(), tmp_path)
    (file,) = (tmp_path / "reference").glob("*.npy")
    np.save(file, np.zeros((3, 2), dtype=np.float32))
    with pytest.raises(ReferenceLogpsError, match=rf"{file} holds float32 \(3, 2\), but float32 \(23, 2\).*remove it"):
        reference(pairs, Model(), tmp_path)


# ---- many processes, killed processes -------------------------------------------------------------------------------


class Slow(Model):
    """Leaves a line for every process that computes."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self.log = log

    def __call__(self, pairs: Sequence[Pair]) -> PairLogps:
        if not self.batches:
            with self.log.open("a") as stream:
                stream.write(f"{os.getpid()}\n")
            time.sleep(0.3)
        return super().__call__(pairs)


def test_of_many_processes_one_computes(pairs: PairDataset, tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    log = tmp_path / "log"

    def work(out: Path) -> None:
        np.save(out, reference(pairs, Slow(log), tmp_path))

    outs = [tmp_path / f"{i}.npy" for i in range(4)]
    workers = [fork.Process(target=work, args=(out,)) for out in outs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(log.read_text().splitlines()) == 1
    expected = np.array([value_of(pair) for pair in pairs], dtype=np.float32)
    for out in outs:
        np.testing.assert_array_equal(np.load(out), expected)


@pytest.mark.parametrize("moment", ["computing", "writing"])
def test_a_process_killed_half_way_leaves_nothing_that_is_taken_for_a_result(
    pairs: PairDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def die(*_: object) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def die_half_way(stream: Any, means_N2: np.ndarray) -> None:
        stream.write(b"\x93NUMPY half a file")
        stream.flush()
        die()

    def work() -> None:
        reference(pairs, die if moment == "computing" else Model(), tmp_path)

    with monkeypatch.context() as patch:
        if moment == "writing":
            patch.setattr(np, "save", die_half_way)
        victim = multiprocessing.get_context("fork").Process(target=work)
        victim.start()
        victim.join(60)
    assert victim.exitcode == -signal.SIGKILL
    assert files(tmp_path) == [".lock", *([".writing"] if moment == "writing" else [])]
    model = Model()  # the lock died with its owner
    reference(pairs, model, tmp_path)
    assert sum(map(len, model.batches)) == len(pairs)
    assert files(tmp_path) == [".lock", ".npy"]


# ---- what the numbers depend on -------------------------------------------------------------------------------------


def test_identity_of_a_preset_counts_its_seed_and_nothing_that_leaves_the_weights_alone() -> None:
    base = identity_of(config(), "fp32")
    assert identity_of(config(), "bf16") != base
    for other in ({"train__seed": 7}, {"model__path": "tiny-llama-2m"}):
        assert identity_of(config(**other), "fp32") != base, other
    assert identity_of(config(loss__answer_padding="true"), "fp32") != base
    for same in (
        {"model__lora": "{rank: 4}"},
        {"model__gradient_checkpointing": "true"},
        {"model__attention": "eager"},
        {"loss__beta": 0.5},
        {"loss__name": "ipo"},
        {"loss__nll_scope": "response"},
        {"loss__nll_eos": "false"},
        {"train__micro_batch_size": 1},
        {"optim__lr": 1e-3},
    ):
        assert identity_of(config(**same), "fp32") == base, same


def test_identity_of_a_folder_counts_its_files_and_not_the_seed(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = folder / "model.safetensors"
    weights.write_bytes(b"1234")
    base = identity_of(config(model__path=folder), "fp32")
    assert identity_of(config(model__path=folder, train__seed=7), "fp32") == base
    os.utime(weights, ns=(0, 1))  # another file of the same size
    touched = identity_of(config(model__path=folder), "fp32")
    assert touched != base
    weights.write_bytes(b"12345")
    os.utime(weights, ns=(0, 1))
    assert identity_of(config(model__path=folder), "fp32") != touched


def test_identity_of_a_hub_model_is_its_commit(tmp_path: Path) -> None:
    """A hub cache made by hand: nothing is downloaded."""
    commits = ["a" * 40, "b" * 40]
    repo = tmp_path / "models--some--model"
    for commit in commits:
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "snapshots" / commit / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    script = """\
    import json, pathlib, sys
    from orpo_ray.config import parse
    from orpo_ray.training.reference import identity_of
    tree = {"name": "x", "model": {"path": "some/model"}, "data": {"path": "builtin://style-pairs"}}
    for seed, commit in enumerate(sys.argv[2:]):
        pathlib.Path(sys.argv[1]).write_text(commit)
        print(json.dumps(identity_of(parse(tree | {"train": {"max_steps": 1, "seed": seed}}), "fp32")))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(repo / "refs" / "main"), *commits],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    for line, commit in zip(run.stdout.splitlines(), commits, strict=True):
        assert f'"weights": {{"commit": "{commit}"}}' in line
