"""Who tells Ray that a spot machine will be taken away? This process, started beside `ray start` on each worker node.

    python -m dpa_ray.cluster.drain_watcher [--provider auto|aws|gcp] [--rebalance] [--poll-s SECONDS]
                                            [--address HOST:PORT] [--node-id HEX] [--metadata-url URL]

Asks the cloud's metadata server until it gives notice, then drains its own Ray node, once, and ends: runs save at once
and go on elsewhere. Exit code 0: drained; 1: it could not be; 2: wrong arguments.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from collections.abc import Callable

from dpa_ray.cluster.notices import Aws, Gcp, NoMetadata, Notice, Provider, detect

POLL_S = 5.0
"""As often as AWS recommends; Google's server answers at once when something changes."""
DETECT_EVERY_S = 30.0
"""So long until a machine without a metadata server is asked again: it may be late, or there is none."""
DRAIN_AGAIN_S = 1.0
DRAIN_WITHIN_S = 15.0
"""One attempt to reach the GCS, with the start of a process and of Ray's client."""
GIVE_UP_AFTER_S = 60.0
"""After the deadline (or a notice without one) nothing is gained any more."""

_log = logging.getLogger("drain_watcher")

Drain = Callable[[Notice], str]
"""Drains, and says what, for people. Raises: DrainFailed."""


class DrainFailed(Exception):
    """Ray did not take the request; another attempt may succeed."""


def watch(
    find: Callable[[], Provider | None], drain: Drain, poll_s: float, detect_every_s: float = DETECT_EVERY_S
) -> int:
    """Wait for a notice, however long it takes, and drain; returns the exit code."""
    provider = _found(find, detect_every_s)
    _log.info("watching %s's metadata, every %g s", provider.name, poll_s)
    notice = _notice(provider, poll_s)
    when = "at a time that is not known"
    if notice.deadline_s is not None:
        when = f"in {max(0.0, notice.deadline_s - time.time()):.0f} s"
    _log.warning("notice: %s, %s; draining this node", notice.text, when)
    return _drained(notice, drain)


def _found(find: Callable[[], Provider | None], every_s: float) -> Provider:
    is_told = False
    while (provider := find()) is None:
        if not is_told:
            _log.warning("no metadata server of AWS or Google answers; asking again every %g s", every_s)
            is_told = True
        time.sleep(every_s)
    return provider


def _notice(provider: Provider, poll_s: float) -> Notice:
    """The first one. A server that is away is told once, and that it is back."""
    is_away = False
    while True:
        try:
            notice = provider.look(poll_s)
        except NoMetadata as err:
            if not is_away:
                _log.warning("the metadata server does not answer (%s); asking again every %g s", err, poll_s)
            is_away = True
            time.sleep(poll_s)
            continue
        if is_away:
            _log.info("the metadata server answers again")
            is_away = False
        if notice is not None:
            return notice


def _drained(notice: Notice, drain: Drain) -> int:
    begun = time.time()
    until = max(begun, notice.deadline_s or begun) + GIVE_UP_AFTER_S
    last = None
    while True:
        try:
            what = drain(notice)
        except DrainFailed as err:
            if str(err) != last:
                _log.error("not drained: %s; trying again", err)
            last = str(err)
        else:
            _log.warning("drained %s, %.1f s after the notice", what, time.time() - begun)
            return 0
        if time.time() > until:
            _log.error("given up after %.0f s: the machine should be gone", time.time() - begun)
            return 1
        time.sleep(DRAIN_AGAIN_S)


def ask_ray(notice: Notice, address: str | None, node_id: str | None) -> str:
    """Drain this machine's nodes by a process of its own (see draining.py). Raises: DrainFailed."""
    # a deadline that has passed would read as none
    deadline_ms = 0 if notice.deadline_s is None else int(1000 * max(notice.deadline_s, time.time() + 1))
    command = [sys.executable, "-m", "dpa_ray.cluster.draining", "--message", notice.text]
    command += ["--deadline-ms", str(deadline_ms)]
    command += ["--address", address] if address else []
    command += ["--node-id", node_id] if node_id else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DRAIN_WITHIN_S)  # noqa: S603 (own module)
    except subprocess.TimeoutExpired:
        raise DrainFailed(f"Ray's GCS does not answer within {DRAIN_WITHIN_S:g} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise DrainFailed(lines[-1])
    return f"node {done.stdout.strip()}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="drain_watcher",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("--provider", choices=("auto", "aws", "gcp"), default="auto", help="default: who answers")
    parser.add_argument("--rebalance", action="store_true", help="drain at AWS's recommendation to rebalance too")
    parser.add_argument("--poll-s", type=float, default=POLL_S, metavar="SECONDS", help=f"default {POLL_S:g}")
    parser.add_argument("--address", help="HOST:PORT of Ray's GCS (default: of the Ray started on this machine)")
    parser.add_argument("--node-id", help="the Ray node, in hex (default: all that live on this machine)")
    parser.add_argument("--metadata-url", metavar="URL", help="another metadata server, for tests")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.poll_s <= 60:
        parser.error(f"--poll-s: expected more than 0 and at most 60 seconds, found {arguments.poll_s:g}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)

    def find() -> Provider | None:
        if arguments.provider == "aws":
            return Aws(arguments.metadata_url, rebalance=arguments.rebalance)
        if arguments.provider == "gcp":
            return Gcp(arguments.metadata_url)
        return detect(arguments.metadata_url, rebalance=arguments.rebalance)

    try:
        return watch(
            find, lambda notice: ask_ray(notice, arguments.address, arguments.node_id), arguments.poll_s,
            min(DETECT_EVERY_S, 6 * arguments.poll_s),
        )  # fmt: skip
    except KeyboardInterrupt:
        return 1


if __name__ == "__main__":
    sys.exit(main())
