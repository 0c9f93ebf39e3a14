"""What does `ray job submit` leave open? An exit code that says how the job ended, and a Ctrl-C that says what goes on.

Needs Ray's job client alone, so that it runs on a laptop: no torch, no transformers.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpa_ray.credentials import without_credentials
from dpa_ray.errors import UserError
from dpa_ray.recipe import RecipeError, load

DONE, FAILED, STOPPED, LEFT = 0, 1, 3, 130
"""Exit codes; a job whose command ended with 2 (a wrong recipe) gives that. LEFT: Ctrl-C, the job goes on."""

STOP_WAIT_S = 60
"""So long `ray job stop` lets a job end tidily before it is killed; Ray's own 3 s are too few for workers and store."""

MAIN_JOB = "run_dpa.py"
AGAIN_S = 5.0
AFTER_LOG_S = 0.2
LAST_ATTEMPTS = 3
"""So often the rest of an ended job's log is asked for again where its connection breaks."""
GIVE_UP_AFTER_S = 600.0
"""So long a head that does not answer is waited for before the job is left to itself."""


@dataclass(frozen=True)
class Job:
    """One submitted job. `client`: Ray's JobSubmissionClient."""

    client: Any
    id: str
    address: str

    def hint(self) -> str:
        """How to follow and stop it, for people."""
        return (
            f"follow it with  ray job logs --address {self.address} --follow {self.id}\n"
            f"stop it with    ray job stop --address {self.address} {self.id}"
        )


def submit(address: str | None, command: Sequence[str], working_dir: Path, submission_id: str | None) -> Job:
    """Start `command` on the cluster's head, in a copy of `working_dir`.

    Raises: RecipeError where the main job's recipe is wrong, and nothing is started; UserError where the cluster does not
        take the job.
    """
    metadata = describe(command, working_dir)
    from ray.job_submission import JobSubmissionClient

    where = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "this machine's Ray"
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(
            entrypoint=shlex.join(command),
            submission_id=submission_id,
            metadata=metadata,
            runtime_env={"working_dir": str(working_dir), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}},
        )
    except Exception as err:  # Ray's client has errors of many types
        raise UserError(
            f"{where} does not take the job: {_first_line(err)}. Expected the address of a Ray dashboard (--address "
            "http://HOST:8265), and with token authentication RAY_AUTH_MODE=token and the cluster's RAY_AUTH_TOKEN"
        ) from err
    return Job(client, job, client.get_address())


def describe(command: Sequence[str], working_dir: Path) -> dict[str, str]:
    """What Ray's dashboard shows as the job's metadata: of the main job, its run, store, method and recipe.

    Raises: RecipeError, with all that is wrong.
    """
    names = [Path(word).name for word in command]
    if MAIN_JOB not in names:
        return {}
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--store")
    parser.add_argument("--name")
    try:
        found = parser.parse_intermixed_args(list(command[names.index(MAIN_JOB) + 1 :]))
    except (argparse.ArgumentError, SystemExit):
        return {}  # the job itself says it better
    words = found.words
    if not words or "=" in words[0]:
        words = ["tiny", *words]
    here = working_dir / words[0]
    if here.is_file():
        words[0] = str(here)
    elif Path(words[0]).is_absolute() and not Path(words[0]).exists():
        return {}  # a file of the head's
    recipe = load(words[0], words[1:], name=found.name, store=found.store)
    told = {"run": recipe.name, "method": recipe.method, "recipe": Path(words[0]).name}
    return (
        {**told, "store": recipe.store} if "://" in recipe.store else told
    )  # a folder here says nothing of the head's


def follow(job: Job) -> int:
    """Print the job's log until it ends; returns the exit code. A connection that breaks is taken up again, and said once."""
    log, away_since, told, attempts = _Log(job), None, False, LAST_ATTEMPTS
    while True:
        problem: Exception | None = None
        try:
            asyncio.run(log.show())
        except Exception as err:  # aiohttp's, requests' and Ray's own; whether the job lives is asked all the same
            problem = err
        try:
            info = job.client.get_job_info(job.id)
        except Exception as err:
            problem, away_since = err, away_since or time.monotonic()
            if time.monotonic() - away_since > GIVE_UP_AFTER_S:
                print(
                    f"{job.address} does not answer ({_first_line(err)}); if it lives, the job goes on", file=sys.stderr
                )
                return FAILED
        else:
            away_since = None
            if info.status.is_terminal():
                attempts -= problem is not None
                if problem is None or attempts < 0:
                    return _ended(job, info)
        if problem is not None and not told:
            print(f"{job.address}: {_first_line(problem)}; asking again every {AGAIN_S:g} s", file=sys.stderr)
        told = problem is not None
        time.sleep(AFTER_LOG_S if problem is None else AGAIN_S)


class _Log:
    """A job's log on its way to the screen. Each connection brings it from its beginning."""

    def __init__(self, job: Job):
        self.job = job
        self.num_printed = 0  # characters

    async def show(self) -> None:
        """Print what was not printed yet, until the connection ends."""
        num_seen = 0
        async for text in self.job.client.tail_job_logs(self.job.id):
            new = text[max(0, self.num_printed - num_seen) :]
            num_seen += len(text)
            if new:
                print(new, end="", flush=True)
                self.num_printed = num_seen


def _ended(job: Job, info: Any) -> int:
    status = str(info.status.value)
    if status == "SUCCEEDED":
        return DONE
    if status == "STOPPED":
        print(f"job {job.id} was stopped; submitted again, it goes on from what was saved", file=sys.stderr)
        return STOPPED
    code = info.driver_exit_code
    if code is None:  # it never ran, or nobody saw its end
        print(f"job {job.id} failed: {info.message or 'no reason is known'}", file=sys.stderr)
        return FAILED
    print(f"job {job.id} failed with exit code {code}", file=sys.stderr)
    return int(code) if code in (FAILED, 2) else FAILED


def _first_line(err: BaseException) -> str:
    return without_credentials((str(err).strip().splitlines() or [type(err).__name__])[0])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="submit.py", description="Submit a job to a Ray cluster, show its log, and end with its exit code."
    )
    parser.add_argument("--address", help="http://HOST:8265 (default: RAY_API_SERVER_ADDRESS, or this machine's Ray)")
    parser.add_argument("--working-dir", type=Path, default=Path(), help="copied to the head (default: this folder)")
    parser.add_argument("--submission-id", help="the job's name in Ray (default: Ray's)")
    parser.add_argument("--no-wait", action="store_true", help="do not wait for the job's end")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- python jobs/run_dpa.py ...")
    arguments = parser.parse_args(argv)
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("expected a command after --, e.g. -- python jobs/run_dpa.py tiny")
    try:
        job = submit(arguments.address, command, arguments.working_dir.absolute(), arguments.submission_id)
    except RecipeError as err:
        print(f"error: {without_credentials(str(err))}", file=sys.stderr)
        return 2
    except UserError as err:
        print(f"error: {err}", file=sys.stderr)
        return FAILED
    print(f"job {job.id}\n{job.hint()}", file=sys.stderr, flush=True)
    if arguments.no_wait:
        return DONE
    try:
        return follow(job)
    except KeyboardInterrupt:
        print(f"\njob {job.id} goes on\n{job.hint()}", file=sys.stderr)
        return LEFT
