"""How is a run told to end, and what is a person told of that? SIGTERM, which `ray job stop` sends, ends it as Ctrl-C does."""

from __future__ import annotations

import json
import os
import signal
import threading
from types import FrameType


def heed_sigterm() -> None:
    """From now on SIGTERM raises KeyboardInterrupt in the main thread: what was saved is kept, and workers are ended.

    `ray.init` puts a handler of its own there, which ends the process at once: call this again after it. Does nothing in
    another thread than the main one.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the tidy end short
    raise KeyboardInterrupt("ended by SIGTERM")


def submission_id() -> str | None:
    """Of the Ray job that this process is the driver of; None where it was not submitted as one."""
    try:
        config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        found = config.get("metadata", {}).get("job_submission_id")
    except (ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def hint(job: str) -> str:
    """How to follow and stop the job, for people."""
    return (
        f"job {job}, which goes on when its client ends (Ctrl-C): `ray job logs --follow {job}` shows it, `ray job stop {job}` "
        "stops it, and the same job submitted again goes on from there"
    )
