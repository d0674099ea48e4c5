"""Connect to a Ray cluster's job server, and follow a job's log to its end.

Needs only HTTP to the head node (https://docs.ray.io/en/latest/cluster/running-applications/job-submission/).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from orpo_ray.cluster.upload import SubmitError
from orpo_ray.errors import UserError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
EXIT_CODES = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": 3}
"""Final status of a job -> exit code of `orpo-ray submit`."""
EXIT_LOST = 4
"""Exit code if the job's outcome is unknown."""

_POLL_S = 2.0
_GIVE_UP_S = 300.0
_LAST_LINES_S = 10.0
_TIMEOUT_S = (10, 120)  # to connect, and between two bytes


class LostError(UserError, RuntimeError):
    """The cluster has not answered for minutes, so the job's outcome is unknown."""


def connect(address: str | None) -> Any:
    """Connect to a job server and check that it accepts our token and runs our versions of Ray and Python.

    Args:
        address: http(s)://HOST:PORT; by default RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or port 8265 of this machine,
            where an SSH tunnel may end.

    Returns:
        Ray's JobSubmissionClient.

    Raises:
        SubmitError: the address or token is wrong, the server does not answer, or versions differ.
    """
    url = _job_server(address)
    try:
        import aiohttp  # noqa: F401
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise SubmitError(
            f"the client of Ray's job server is not installed ({error}): pip install 'orpo-ray[cluster]'"
        ) from None
    import requests
    from ray.exceptions import AuthenticationError

    class Client(JobSubmissionClient):
        def _do_request(self, *positional: Any, **named: Any) -> Any:
            try:
                return super()._do_request(*positional, timeout=_TIMEOUT_S, **named)
            except AuthenticationError as error:
                raise SubmitError(_token_advice(url, error.message)) from None

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("ray._private.runtime_env").setLevel(logging.ERROR)  # would log each default exclude
    os.environ["RAY_API_SERVER_ADDRESS"] = url  # Ray prefers this, then RAY_ADDRESS, to the address argument
    try:
        client = Client(url)
        server = client._do_request("GET", "/api/version").json()["ray_version"]
        metadata = client._do_request("GET", "/api/v0/cluster_metadata").json()
    except SubmitError:
        raise
    except AuthenticationError as error:
        raise SubmitError(_token_advice(url, error.message)) from None
    except (ConnectionError, requests.RequestException, ValueError, KeyError, RuntimeError) as error:
        raise SubmitError(
            f"no Ray job server answers at {url} ({type(error).__name__}: {error}). It is part of the head node's "
            "dashboard, usually at port 8265; from another machine, use ssh -N -L 8265:127.0.0.1:8265 HEAD or --address"
        ) from None
    _require_versions(server, metadata["data"]["pythonVersion"])
    return client


def follow(client: Any, submission_id: str, write: Callable[[str], None], give_up_s: float = _GIVE_UP_S) -> Any:
    """Write the job's log as it grows until the job has ended; each line once, even if the stream breaks.

    Args:
        client: from `connect`.
        submission_id: the job's id.
        write: receives text as it arrives, with its line ends.
        give_up_s: how long the cluster may be unreachable, in seconds.

    Returns:
        Ray's JobDetails of the ended job.

    Raises:
        SubmitError: the cluster no longer knows the job.
        LostError: the cluster was unreachable for `give_up_s`.
    """
    return asyncio.run(_follow(client, submission_id, _Log(write), give_up_s))


def describe_end(details: Any) -> str:
    """Describe a job's end in one or a few lines, from Ray's JobDetails."""
    message = details.message or ""
    if details.error_type == "JOB_ENTRYPOINT_COMMAND_ERROR":
        message = message.partition(",")[0]  # the last lines of the log follow the comma
    return f"job {details.submission_id} {details.status.value}" + (f": {message}" if message else "")


class _Log:
    """Writes each part of a text once, although every reconnection reads it from its beginning."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._written = 0
        self._position = 0

    def restart(self) -> None:
        self._position = 0

    def take(self, text: str) -> None:
        new = text[max(0, self._written - self._position) :]
        self._position += len(text)
        if new:
            self._written = self._position
            self._write(new)


async def _follow(client: Any, submission_id: str, log: _Log, give_up_s: float) -> Any:
    ended = asyncio.Event()
    tail = asyncio.create_task(_tail(client, submission_id, log, ended))
    try:
        details = await _end_of(client, submission_id, give_up_s)
        ended.set()
        await asyncio.wait([tail], timeout=_LAST_LINES_S)
    finally:
        ended.set()  # keeps the stream closed even if its code swallows the cancellation
        tail.cancel()
        await asyncio.wait([tail], timeout=_LAST_LINES_S)
    log.restart()
    log.take(await _in_thread(client.get_job_logs, submission_id))  # lines that the stream missed
    return details


async def _in_thread(call: Callable[..., Any], *arguments: Any) -> Any:
    """Run a call in a daemon thread and return its result; cancellation does not wait for the thread.

    With `asyncio.to_thread`, Ctrl-C would wait until a request to a server that hangs has timed out.
    """
    loop = asyncio.get_running_loop()
    answer = loop.create_future()

    def settle(told: Callable[[Any], None], value: Any) -> None:
        if not answer.done():
            told(value)

    def work() -> None:
        try:
            end = answer.set_result, call(*arguments)
        except Exception as error:
            end = answer.set_exception, error
        with contextlib.suppress(RuntimeError):  # the loop is closed: the call was cancelled
            loop.call_soon_threadsafe(settle, *end)

    threading.Thread(target=work, name="job server", daemon=True).start()
    return await answer


async def _tail(client: Any, submission_id: str, log: _Log, ended: asyncio.Event) -> None:
    import aiohttp

    while not ended.is_set():
        log.restart()
        try:
            async for text in client.tail_job_logs(submission_id):
                log.take(text)
        except (aiohttp.ClientError, OSError, RuntimeError):
            pass  # `_end_of` detects whether the cluster is still reachable
        await asyncio.sleep(1)


async def _end_of(client: Any, submission_id: str, give_up_s: float) -> Any:
    last_seen = time.monotonic()
    while True:
        try:
            details = await _in_thread(client.get_job_info, submission_id)
        except SubmitError:
            raise
        except (OSError, RuntimeError) as error:  # OSError: requests' errors; RuntimeError: an unsuccessful reply
            if "does not exist" in str(error):
                raise SubmitError(
                    f"the cluster no longer knows job {submission_id}: its head node was restarted; run the same "
                    "command to continue the sweep"
                ) from None
            if time.monotonic() - last_seen > give_up_s:
                raise LostError(
                    f"the cluster has not answered for {give_up_s:.0f} s, so the outcome of job {submission_id} is "
                    f"unknown ({type(error).__name__}); run the same command to follow it again"
                ) from None
        else:
            last_seen = time.monotonic()
            if details.status.is_terminal():
                return details
        await asyncio.sleep(_POLL_S)


def _job_server(address: str | None) -> str:
    variable = next((name for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if os.environ.get(name)), None)
    given = address or (os.environ[variable] if variable else DEFAULT_ADDRESS)
    if not given.startswith(("http://", "https://")):
        source = "--address" if address else variable
        raise SubmitError(
            f"{source} is {given}, which is not the address of a Ray job server: give the dashboard's address, "
            f"--address http://{given.rpartition('://')[2].partition(':')[0] or 'HEAD'}:8265"
        )
    return given.rstrip("/")


def _token_advice(url: str, message: str) -> str:
    if "Forbidden" in message:
        return (
            f"{url} refuses the token: it must be the one that the cluster was started with; compare RAY_AUTH_TOKEN, "
            "RAY_AUTH_TOKEN_PATH and ~/.ray/auth_token here and on the head node"
        )
    return (
        f"{url} requires a token: export RAY_AUTH_MODE=token, and put the cluster's token in RAY_AUTH_TOKEN or in "
        "~/.ray/auth_token (plain HTTP sends it unencrypted: use an SSH tunnel or HTTPS)"
    )


def _require_versions(ray_there: str, python_there: str) -> None:
    ray_here = importlib.metadata.version("ray")
    if ray_there != ray_here:
        raise SubmitError(
            f"the cluster runs Ray {ray_there}, but this machine runs {ray_here}, which orpo_ray was made for: use the "
            "same version on both"
        )
    here = ".".join(map(str, sys.version_info[:2]))
    if ".".join(python_there.split(".")[:2]) != here:
        raise SubmitError(
            f"the cluster runs Python {python_there}, but this machine runs {here}: use the same version on both, so "
            "that the job runs the code that was checked here"
        )
