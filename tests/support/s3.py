"""An S3 server on this machine: moto's, in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

BUCKET = "orpo"


class S3:
    """A server with one empty bucket. What it holds is lost when it is stopped."""

    def __init__(self, folder: Path, refuse: Path | None = None, address: str = "127.0.0.1") -> None:
        """Start it.

        Args:
            folder: for its log.
            refuse: while this file exists, nothing can be written: the answer is 503, as of a store that is too busy.
            address: what it listens on, one of this machine's.
        """
        with socket.socket() as probe:
            probe.bind((address, 0))
            self.port = int(probe.getsockname()[1])
        self.endpoint = f"http://{address}:{self.port}"
        self.uri = f"s3://{BUCKET}/sweeps"
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        log = (folder / "s3.log").open("ab")
        command = [sys.executable, "-m", __name__, address, str(self.port), *([str(refuse)] if refuse else [])]
        root = Path(__file__).resolve().parents[2]
        self._process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | self.environment, cwd=root)
        deadline = time.monotonic() + 60
        while True:
            try:
                bucket = urllib.request.Request(f"{self.endpoint}/{BUCKET}", method="PUT")
                urllib.request.urlopen(bucket, timeout=5).close()
                return
            except (urllib.error.URLError, ConnectionError):
                assert time.monotonic() < deadline, "the S3 server did not come up"
                time.sleep(0.2)

    def has(self, name: str) -> bool:
        """Whether there is an object of that name below `uri`."""
        path = f"{self.endpoint}/{self.uri.removeprefix('s3://')}/{name}"
        try:
            urllib.request.urlopen(urllib.request.Request(path, method="HEAD"), timeout=5).close()
        except urllib.error.HTTPError:
            return False
        return True

    def stop(self) -> None:
        """End the server."""
        self._process.kill()
        self._process.wait(30)


def _serve(address: str, port: int, refuse: Path | None) -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    moto = DomainDispatcherApplication(create_backend_app)

    def application(environ: Any, start_response: Any) -> Any:
        if refuse is not None and refuse.exists() and environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            error = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            start_response("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(error)))])
            return [error]
        return moto(environ, start_response)

    run_simple(address, port, application, threaded=True)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
