"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from orpo_ray.files import replacing, write_atomically


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_and_its_folder_created(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "new" / "file.json"
    write_atomically(path, "λ\r\n", durable=durable)
    assert path.read_bytes() == "λ\r\n".encode()
    write_atomically(path, b"\x00", durable=durable)
    assert path.read_bytes() == b"\x00"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def interrupted() -> None:
        with replacing(path) as file:
            file.write(b"half")
            assert path.read_text() == "before"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "before"
