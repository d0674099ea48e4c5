"""Find the training split and the held-out split of a file, a folder, a hub data set or the built-in pairs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orpo_ray.config import DataConfig
from orpo_ray.data import style_pairs
from orpo_ray.data.readers import READERS, reading, suffix_of
from orpo_ray.data.rows import DataError

BUILTIN = "builtin://style-pairs"
BUILTIN_TRAIN_PAIRS = 4096
TRAIN_SPLITS = ("train_prefs", "train")
EVAL_SPLITS = ("test_prefs", "test", "validation")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class Split:
    """One split of a source, whose rows are read on demand."""

    source: str
    """`data.path` or `data.eval_path`, for error messages."""
    name: str
    fingerprint: Callable[[], str]
    """Text that changes when the rows change."""
    read: Callable[[], Iterator[tuple[str, object]]]
    """Yields (pair_id, row) in order, at every call. A row that is not a mapping of columns is malformed."""


def choose_splits(config: DataConfig) -> tuple[Split, Split | None]:
    """The training split, and the held-out split or None if the data have none.

    Raises:
        DataError: the file, folder, hub dataset or split does not exist, or there are several splits and none has a
            usual name.
    """
    named = config.train_split is not None or (config.eval_split is not None and config.eval_path is None)
    splits = _splits(config.path, config, named)
    train = _pick(splits, "train_split", config.train_split, TRAIN_SPLITS) or _only(splits, "train_split", TRAIN_SPLITS)
    if config.eval_path is not None:
        others = _splits(config.eval_path, config, named=config.eval_split is not None)
        picked = _pick(others, "eval_split", config.eval_split, EVAL_SPLITS)
        return train, picked or _only(others, "eval_split", EVAL_SPLITS)
    if config.eval_split == train.name:
        raise DataError(
            f"{config.path}: data.eval_split and the training split are both {train.name!r}; "
            f"leave eval_split out to set {config.eval_pairs} pairs (data.eval_pairs) of it aside"
        )
    return train, _pick(splits, "eval_split", config.eval_split, [name for name in EVAL_SPLITS if name != train.name])


def _pick(splits: Mapping[str, Split], setting: str, name: str | None, usual: Sequence[str]) -> Split | None:
    if name is not None and name not in splits:
        source = next(iter(splits.values())).source
        raise DataError(f"{source}: data.{setting} is {name!r}, but the splits are {', '.join(splits)}")
    return next((splits[known] for known in ([name] if name else usual) if known in splits), None)


def _only(splits: Mapping[str, Split], setting: str, usual: Sequence[str]) -> Split:
    first, *others = splits.values()
    if others:
        raise DataError(
            f"{first.source}: no split is named {' or '.join(usual)}; set data.{setting} to one of {', '.join(splits)}"
        )
    return first


def _splits(path: str, config: DataConfig, named: bool) -> dict[str, Split]:
    """Every split of a source. Files whose names are not those of splits form one split, unless the config names a
    split."""
    local = Path(path).expanduser()
    if path != BUILTIN and not local.exists():
        if not _HUB_NAME.fullmatch(path) or ".." in path:
            raise DataError(f"{path}: no such file or folder here, and not a valid name of a hub dataset")
        return _hub_splits(path, config.subset)
    if config.subset is not None and path == config.path:
        raise DataError(f"{path}: data.subset ({config.subset!r}) names a configuration of a hub dataset; leave it out")
    if path == BUILTIN:
        return _builtin_splits(config)
    if not local.is_file() and not local.is_dir():
        raise DataError(
            f"{path}: neither a file nor a folder; devices and pipes cannot be used, since the data are read twice"
        )
    if local.is_file():
        if suffix_of(local) is None:
            raise DataError(f"{path}: unknown format; use one of {', '.join(READERS)}")
        return {"train": _file_split(path, "train", local.parent, [local])}
    files = sorted(file for file in local.rglob("*") if file.is_file() and suffix_of(file))
    if not files:
        raise DataError(f"{path}: no {', '.join(READERS)} file in this folder")
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(_split_of_file(file), []).append(file)
    if not named and not groups.keys() & {*TRAIN_SPLITS, *EVAL_SPLITS}:
        groups = {"train": files}
    return {name: _file_split(path, name, local, members) for name, members in groups.items()}


def _split_of_file(path: Path) -> str:
    """`train-00000-of-00002.parquet` -> train, as the hub names files."""
    return re.sub(r"-\d+-of-\d+.*", "", path.name.split(".")[0])


def _file_split(source: str, name: str, root: Path, files: Sequence[Path]) -> Split:
    def fingerprint() -> str:
        digest = hashlib.sha256()
        for file in files:
            with reading(file), file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{file.relative_to(root)} {content}\n".encode())
        return digest.hexdigest()

    def read() -> Iterator[tuple[str, object]]:
        for file in files:
            with reading(file):
                for number, row in READERS[suffix_of(file) or ""](file):
                    yield f"{file.relative_to(root)}:{number}", row

    return Split(source, name, fingerprint, read)


def _hub_splits(path: str, subset: str | None) -> dict[str, Split]:
    import datasets  # slow to import, and only hub names need it
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if path in _PACKAGED_DATASETS_MODULES:
        # To `load_dataset` these are formats: without named files it would read all of the current directory.
        raise DataError(f"{path}: the name of a format, not of a dataset; give the file or the folder")
    try:
        # From version 4 on, datasets runs no code that comes with a dataset.
        found = datasets.load_dataset(path, name=subset)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{path}: no such file or folder here, and it cannot be loaded as a hub dataset: {error}"
        ) from error

    def split(name: str, rows: datasets.Dataset) -> Split:
        def read() -> Iterator[tuple[str, object]]:
            for number, row in enumerate(rows, start=1):
                yield f"{path}/{name}:{number}", row

        return Split(path, name, lambda: f"{path} {name} {rows._fingerprint}", read)

    return {name: split(name, rows) for name, rows in found.items()}


def _builtin_splits(config: DataConfig) -> dict[str, Split]:
    sizes = {"test": config.eval_pairs, "train": config.train_pairs or BUILTIN_TRAIN_PAIRS}

    def split(name: str) -> Split:
        def read() -> Iterator[tuple[str, object]]:
            # The held-out pairs come first: they stay the same when train_pairs changes.
            rows = style_pairs.generate(sum(sizes.values()), config.split_seed)
            for number, row in enumerate(rows, start=1):
                if (number <= sizes["test"]) == (name == "test"):
                    yield f"style-pairs:{number}", row

        source = Path(style_pairs.__file__).read_bytes()
        return Split(BUILTIN, name, lambda: f"{name} {sizes} {hashlib.sha256(source).hexdigest()}", read)

    return {name: split(name) for name in sizes}
