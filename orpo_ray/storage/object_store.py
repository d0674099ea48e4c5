"""An object store, or a local folder used as one, for files that must outlive every node.

All access goes through pyarrow's file systems: `s3://` (any server that speaks S3: AWS_ENDPOINT_URL), `gs://`,
`abfss://`, `file:///`. Credentials come from the environment or the machine's role, never from the config.
"""

from __future__ import annotations

import os
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.fs
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from orpo_ray.errors import UserError

PATIENCE_S = 900.0
"""An operation fails after this long; shorter outages only delay the operations themselves."""
_CONNECT_S, _REQUEST_S = 10.0, 60.0
_THREADS = 16


class StorageError(UserError, RuntimeError):
    """The object store cannot be used, or has failed for too long; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A folder in an object store. Writes are atomic; names are relative, with slashes."""

    uri: str
    patience_s: float = PATIENCE_S
    """How long an operation is retried, with growing pauses, before it fails."""

    def __truediv__(self, name: str) -> Storage:
        """A folder below this one."""
        return Storage(f"{self.uri}/{name}", self.patience_s)

    def __str__(self) -> str:
        return self.uri

    @property
    def filesystem(self) -> Any:
        """pyarrow's file system, for libraries that take one together with `path`."""
        return _open(self.uri)[0]

    @property
    def path(self) -> str:
        """This folder's path within `filesystem`."""
        return _open(self.uri)[1]

    def check(self) -> None:
        """Write, read and delete a small object.

        Raises:
            StorageError: one of them fails.
        """
        name, content = f".probe-{uuid.uuid4().hex[:8]}", uuid.uuid4().bytes
        once = Storage(self.uri, patience_s=10.0)
        once.write(name, content)
        found = once.read(name)
        once.delete(name)
        if found != content:
            raise StorageError(
                f"{self.uri}: an object read back differs from what was written; do all nodes reach the same store?"
            )

    def write(self, name: str, content: bytes) -> None:
        """Write an object, replacing one of the same name."""

        def put() -> None:
            filesystem, target = self._parent(name)
            # A local file is renamed when complete, to appear atomically; objects in a store are atomic by themselves.
            partial = f"{target}.{uuid.uuid4().hex[:8]}" if _is_local(filesystem) else target
            with filesystem.open_output_stream(partial) as stream:
                stream.write(content)
            if partial != target:
                filesystem.move(partial, target)

        self._retry(f"write {name}", put)

    def read(self, name: str) -> bytes | None:
        """An object's bytes; None if it does not exist."""

        def get() -> bytes | None:
            filesystem, path = _open(self.uri)
            try:
                with filesystem.open_input_stream(f"{path}/{name}") as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

        found: bytes | None = self._retry(f"read {name}", get)
        return found

    def upload(self, file: Path, name: str) -> None:
        """Copy a local file into the store."""

        def put() -> None:
            filesystem, target = self._parent(name)
            partial = f"{target}.{uuid.uuid4().hex[:8]}" if _is_local(filesystem) else target
            with file.open("rb") as source, filesystem.open_output_stream(partial) as stream:
                shutil.copyfileobj(source, stream, 8 * 2**20)
            if partial != target:
                filesystem.move(partial, target)

        self._retry(f"write {name}", put)

    def download(self, name: str, file: Path) -> None:
        """Copy an object to a local file, whose folder is created if missing.

        Raises:
            FileNotFoundError: there is no such object.
            StorageError: it cannot be read.
        """

        def get() -> None:
            filesystem, path = _open(self.uri)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}")
            try:
                with filesystem.open_input_stream(f"{path}/{name}") as stream, partial.open("wb") as target:
                    shutil.copyfileobj(stream, target, 8 * 2**20)
                os.replace(partial, file)
            finally:
                partial.unlink(missing_ok=True)

        self._retry(f"read {name}", get)

    def list(self, folder: str = "") -> dict[str, int]:
        """Every object below a folder: name (relative to this storage) -> size in bytes."""

        def list_files() -> dict[str, int]:
            filesystem, path = _open(self.uri)
            top = f"{path}/{folder}".rstrip("/")
            selector = pyarrow.fs.FileSelector(top, recursive=True, allow_not_found=True)
            files = [i for i in filesystem.get_file_info(selector) if i.type == pyarrow.fs.FileType.File]
            return {info.path[len(path) + 1 :]: info.size for info in sorted(files, key=lambda i: i.path)}

        found: dict[str, int] = self._retry(f"list {folder or '.'}", list_files)
        return found

    def delete(self, name: str) -> None:
        """Remove an object, or all objects below a folder; no error if there is none."""

        def remove() -> None:
            filesystem, path = _open(self.uri)
            info = filesystem.get_file_info(f"{path}/{name}")
            if info.type == pyarrow.fs.FileType.Directory:
                filesystem.delete_dir(info.path)
            elif info.type == pyarrow.fs.FileType.File:
                filesystem.delete_file(info.path)

        self._retry(f"delete {name}", remove)

    def copy(self, source: str, target: str, last: str) -> None:
        """Copy all objects below one folder into another; the object `last` is copied after all others.

        Args:
            source: folder, relative to this storage.
            target: folder, relative to this storage.
            last: name within the folder.

        Raises:
            FileNotFoundError: the source folder is empty.
        """
        filesystem, path = _open(self.uri)
        names = self.list(source)
        if not names:
            raise FileNotFoundError(f"{self.uri}/{source} holds nothing")

        def one(name: str) -> None:
            to = f"{target}/{name[len(source) + 1 :]}"

            def put() -> None:
                _, whole = self._parent(to)
                with (
                    filesystem.open_input_stream(f"{path}/{name}") as stream,
                    filesystem.open_output_stream(whole) as out,
                ):
                    shutil.copyfileobj(stream, out, 8 * 2**20)

            self._retry(f"write {to}", put)

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(one, [name for name in names if name != f"{source}/{last}"]))
        one(f"{source}/{last}")

    def download_all(self, names: dict[str, Path]) -> None:
        """Download several objects in parallel: name -> local file."""
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda item: self.download(*item), names.items()))

    def _parent(self, name: str) -> tuple[Any, str]:
        filesystem, path = _open(self.uri)
        target = f"{path}/{name}"
        if _is_local(filesystem):
            Path(target).parent.mkdir(parents=True, exist_ok=True)
        return filesystem, target

    def _retry(self, what: str, act: Any) -> Any:
        retrying = Retrying(
            stop=stop_after_delay(self.patience_s),
            wait=wait_random_exponential(multiplier=0.5, max=15),
            retry=retry_if_exception(lambda e: isinstance(e, OSError) and not isinstance(e, FileNotFoundError)),
            reraise=True,
        )
        try:
            return retrying(act)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise StorageError(
                f"{self.uri}: cannot {what} (tried for {self.patience_s:.0f} s): {error}; check the address, the "
                "credentials in the environment and the rights to list, read, write and delete there"
            ) from error


@cache
def _open(uri: str) -> tuple[Any, str]:
    """(file system, path) of a URI. Cached, because opening a file system needs network requests."""
    scheme, _, rest = uri.partition("://")
    if scheme == "s3":
        bucket = rest.partition("/")[0]
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if region is None and endpoint is None:
            region = pyarrow.fs.resolve_s3_region(bucket)
        return (
            pyarrow.fs.S3FileSystem(
                region=region,
                endpoint_override=endpoint,
                connect_timeout=_CONNECT_S,
                request_timeout=_REQUEST_S,
                retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=2),  # `_retry` goes on
                allow_bucket_creation=False,
            ),
            rest,
        )
    filesystem, path = pyarrow.fs.FileSystem.from_uri(uri)
    return filesystem, path


def _is_local(filesystem: Any) -> bool:
    return isinstance(filesystem, pyarrow.fs.LocalFileSystem)
