"""Log lines of a worker, made in a process of its own since they take over its logging."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from orpo_ray.orchestration import worker_logs

WORKER = """
import logging, sys, threading, warnings
from pathlib import Path
from orpo_ray.orchestration import worker_logs

printing = logging.getLogger("loud_library")
printing.addHandler(logging.StreamHandler(sys.stdout))
printing.propagate = False
worker_logs.configure(Path(sys.argv[1]), "group-7", 3, "node-a")
worker_logs.adopt_libraries()
log = logging.getLogger("orpo_ray.orchestration.worker")
log.info("outside of a trial")
with worker_logs.trial("00004", 1):
    log.info("two\\nlines of http://user:secret@host/x, λ")
    log.debug("not shown")
    logging.getLogger("library").info("not shown")
    printing.warning("from a library")
    warnings.warn("from Python")
    def work():
        log.info("in a thread")
        raise ValueError("lost at http://user:secret@host")
    thread = threading.Thread(target=work, name="batches")
    thread.start()
    thread.join()
log.warning("after it")
"""


def run(folder: Path, code: str = WORKER) -> tuple[list[dict[str, Any]], subprocess.CompletedProcess[str]]:
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()], done


def test_lines_say_where_and_of_which_trial_they_are(tmp_path: Path) -> None:
    lines, done = run(tmp_path / "logs")
    assert (tmp_path / "logs" / "group-7-rank-3.jsonl").exists()
    assert [line["message"] for line in lines][:4] == [
        "outside of a trial",
        "two\nlines of http://host/x, λ",
        "from a library",
        lines[3]["message"],
    ]
    assert "from Python" in lines[3]["message"]
    assert [line.get("trial_id") for line in lines] == [None, *["00004"] * 5, None]
    assert {line["attempt"] for line in lines[1:6]} == {1}
    assert {(line["group"], line["rank"], line["node"]) for line in lines} == {("group-7", 3, "node-a")}
    assert [line["logger"] for line in lines[1:4]] == ["orpo_ray.orchestration.worker", "loud_library", "py.warnings"]
    assert [line["level"] for line in lines[:3]] == ["INFO", "INFO", "WARNING"]
    assert lines[0]["time"].endswith("Z")
    assert datetime.fromisoformat(lines[0]["time"]).utcoffset() is not None
    died = lines[5]
    assert died["message"] == "thread batches died"
    assert died["exception"].endswith("ValueError: lost at http://host")
    assert [json.loads(line) for line in done.stderr.splitlines()] == lines
    assert done.stdout == ""


def test_a_file_does_not_grow_without_end(tmp_path: Path) -> None:
    code = (
        WORKER.split("log.info")[0].replace(
            "worker_logs.configure", "worker_logs.MAX_BYTES = 2000\nworker_logs.configure"
        )
        + "for i in range(100): log.info('line %d', i)"
    )
    lines, _ = run(tmp_path, code)
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == [f"group-7-rank-3.jsonl{end}" for end in ("", ".1", ".2")]
    assert all(file.stat().st_size <= 2000 for file in tmp_path.iterdir())
    assert lines[-1]["message"] == "line 99"
    assert worker_logs.MAX_BYTES * (1 + worker_logs.BACKUPS) <= 32 * 2**20
