import json
import subprocess
import sys
import time

import pytest

from orpo_ray import provenance


def git(*arguments: str) -> None:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git("init")
    (tmp_path / "a.txt").write_text("one\n")
    git("add", "a.txt")
    git("commit", "-m", "first")
    return tmp_path


def test_describes_code_packages_and_hardware_as_json(repository):
    found = json.loads(json.dumps(provenance.collect()))
    assert len(found["git"]["commit"]) == 40
    assert found["git"]["dirty"] is False
    assert found["git"]["diff"] == ""
    assert found["packages"]["ray"].count(".") == 2
    assert found["cpu_count"] >= 1
    assert found["memory_gib"] > 0
    assert isinstance(found["gpus"], list)


def test_records_what_the_commit_does_not_hold(repository):
    (repository / "a.txt").write_text("two\n")
    (repository / "new file.py").write_text("x = 1\n")
    found = provenance.collect()["git"]
    assert found["dirty"] is True
    assert "-one\n+two\n" in found["diff"]
    assert found["untracked"] == ["new file.py"]


def test_a_long_diff_is_cut_and_says_so(repository):
    (repository / "a.txt").write_text("λ" * 1_000_000)
    diff = provenance.collect()["git"]["diff"]
    assert len(diff.encode()) < provenance.MAX_DIFF_BYTES + 200
    assert "[cut: the diff has 2000" in diff


def test_no_repository_and_no_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.collect()["git"] is None
    git("init")
    assert provenance.collect()["git"] == {"commit": None, "dirty": False, "diff": "", "untracked": []}


def test_a_missing_package_is_none(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-distribution",))
    assert provenance.collect()["packages"] == {"no-such-distribution": None}


def test_fast_and_without_torch():
    heavy = "sorted({'torch', 'ray', 'mlflow'} & {*sys.modules})"
    script = f"import sys; from orpo_ray.provenance import collect; collect(); print({heavy})"
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"
    assert time.perf_counter() - started < 5  # 0.1 s on an idle machine


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("tracking.uri=http://me:secret@host:5000", "tracking.uri=http://host:5000"),
        ("postgresql+psycopg2://me:p@ss@host/db", "postgresql+psycopg2://host/db"),
        ('{"uri":"http://host","mail":"a@b"}', '{"uri":"http://host","mail":"a@b"}'),
        ("http://host/a@b", "http://host/a@b"),
    ],
)
def test_passwords_are_left_out(text, shown):
    assert provenance.without_password(text) == shown
