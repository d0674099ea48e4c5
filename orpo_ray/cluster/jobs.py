"""Jobs of a Ray cluster, over its job server: a client that has been checked, and a job's log followed to its end.

https://docs.ray.io/en/latest/cluster/running-applications/job-submission/: nothing but HTTP to the head node is needed.
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
"""Exit code where the job's end is not known."""

_POLL_S = 2.0
_GIVE_UP_S = 300.0
_LAST_LINES_S = 10.0
_TIMEOUT_S = (10, 120)  # to connect, and between two bytes


class LostError(UserError, RuntimeError):
    """The cluster has not answered for minutes: how the job ends is not known."""


def connect(address: str | None) -> Any:
    """A client of the job server, which has answered, takes our token and runs the versions that run here.

    Args:
        address: http(s)://HOST:PORT; else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or a tunnel's end at port 8265.

    Raises:
        SubmitError: whatever of this is not so.
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
    logging.getLogger("ray._private.runtime_env").setLevel(logging.ERROR)  # would tell of each default exclude
    os.environ["RAY_API_SERVER_ADDRESS"] = url  # Ray heeds this, then RAY_ADDRESS, before the address it is given
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
            f"no job server of Ray answers at {url} ({type(error).__name__}: {error}). It is the head node's "
            "dashboard, usually port 8265; from elsewhere: ssh -N -L 8265:127.0.0.1:8265 HEAD, or --address"
        ) from None
    _require_versions(server, metadata["data"]["pythonVersion"])
    return client


def follow(client: Any, submission_id: str, write: Callable[[str], None], give_up_s: float = _GIVE_UP_S) -> Any:
    """Write the job's log as it grows, each line once however often the stream breaks, until the job has ended.

    Args:
        write: takes text as it comes, with its line ends.
        give_up_s: how long the cluster may be out of reach.

    Returns:
        Ray's JobDetails of the ended job.

    Raises:
        SubmitError: the cluster does not know the job any more.
        LostError: the cluster was out of reach for `give_up_s`.
    """
    return asyncio.run(_follow(client, submission_id, _Log(write), give_up_s))


def describe_end(details: Any) -> str:
    """One line, or a few, on how a job ended."""
    message = details.message or ""
    if details.error_type == "JOB_ENTRYPOINT_COMMAND_ERROR":
        message = message.partition(",")[0]  # the last lines of the log come after it
    return f"job {details.submission_id} {details.status.value}" + (f": {message}" if message else "")


class _Log:
    """Writes a text that is read from its beginning again after each reconnection."""

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
        ended.set()  # should the stream's code swallow the cancellation, it is not opened again
        tail.cancel()
        await asyncio.wait([tail], timeout=_LAST_LINES_S)
    log.restart()
    log.take(await _aside(client.get_job_logs, submission_id))  # what the stream has missed
    return details


async def _aside(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call gives, in a thread that nobody waits for when it is given up.

    Ctrl-C with `asyncio.to_thread` would wait until a request to a server that hangs has timed out.
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
        with contextlib.suppress(RuntimeError):  # the loop is closed: it was given up
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
            pass  # `_end_of` sees whether the cluster is still there
        await asyncio.sleep(1)


async def _end_of(client: Any, submission_id: str, give_up_s: float) -> Any:
    last_seen = time.monotonic()
    while True:
        try:
            details = await _aside(client.get_job_info, submission_id)
        except SubmitError:
            raise
        except (OSError, RuntimeError) as error:  # requests' errors are OSErrors; a reply that is no success, the other
            if "does not exist" in str(error):
                raise SubmitError(
                    f"the cluster does not know job {submission_id} any more: its head node was started anew; "
                    "the same command continues the sweep"
                ) from None
            if time.monotonic() - last_seen > give_up_s:
                raise LostError(
                    f"the cluster has not answered for {give_up_s:.0f} s, so how job {submission_id} ends is not "
                    f"known ({type(error).__name__}); the same command follows it again"
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
            f"{source} is {given}, which is not the address of Ray's job server: give its dashboard's, "
            f"--address http://{given.rpartition('://')[2].partition(':')[0] or 'HEAD'}:8265"
        )
    return given.rstrip("/")


def _token_advice(url: str, message: str) -> str:
    if "Forbidden" in message:
        return (
            f"{url} refuses the token: it must be the one that the cluster was started with; see RAY_AUTH_TOKEN, "
            "RAY_AUTH_TOKEN_PATH and ~/.ray/auth_token here and on the head node"
        )
    return (
        f"{url} asks for a token: export RAY_AUTH_MODE=token, and put the cluster's token in RAY_AUTH_TOKEN or in "
        "~/.ray/auth_token (over plain HTTP it travels in the clear: use an SSH tunnel or HTTPS)"
    )


def _require_versions(ray_there: str, python_there: str) -> None:
    ray_here = importlib.metadata.version("ray")
    if ray_there != ray_here:
        raise SubmitError(
            f"the cluster runs Ray {ray_there}, and here it is {ray_here}, which orpo_ray was made for: use the same "
            "on both sides"
        )
    here = ".".join(map(str, sys.version_info[:2]))
    if ".".join(python_there.split(".")[:2]) != here:
        raise SubmitError(
            f"the cluster runs Python {python_there}, and here it is {here}: use the same on both sides, so that what "
            "was checked here is what runs there"
        )
