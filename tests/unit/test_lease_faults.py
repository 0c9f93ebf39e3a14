"""Is a lease kept through a store that fails, and given up where it may be another process's by then?"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

import pytest

from dpa_ray.data.retry import bridging
from dpa_ray.errors import UserError
from dpa_ray.store import Store, lease, s3_client
from dpa_ray.store.lease import RENEWALS, LeaseTaken, held
from tests.s3 import S3
from tests.s3_proxy import RETRY_S, Fault, Proxy

LAPSES_AFTER_S = 300.0  # nobody renews it while a test runs
WAIT_S = 20.0


def becomes(true: Callable[[], bool]) -> bool:
    until = time.monotonic() + WAIT_S
    while not true() and time.monotonic() < until:
        time.sleep(0.05)
    return true()


def test_a_holder_that_could_not_renew_in_time_asks_before_it_writes(
    proxied: Store, proxy: Proxy, rclone_s3: S3
) -> None:
    lost = threading.Event()
    with held(proxied, "lease", report=print, lost=lost.set, lapses_after_s=LAPSES_AFTER_S) as ours:
        proxy.fail(Fault(503))  # this process alone is cut off
        ours.confirm()  # it was renewed a moment ago: nobody is asked
        ours._sure_since -= LAPSES_AFTER_S  # as when that time has passed
        with pytest.raises(UserError):
            ours.confirm()
        assert not ours.taken, "it may still be ours"
        # meanwhile somebody else takes over, as whoever watched the lease may
        rclone_s3.client().put_object(Bucket=rclone_s3.bucket, Key="store/lease/2.json", Body=b"{}")
        proxy.heal()
        with pytest.raises(LeaseTaken):
            ours.confirm()
        assert lost.is_set()
        with pytest.raises(LeaseTaken):
            ours.confirm()
    assert proxied.read_bytes("lease/2.json") == b"{}", "the other one's lease is left alone"


def test_an_outage_that_nobody_used_leaves_the_lease_where_it_was(proxied: Store, proxy: Proxy) -> None:
    with held(proxied, "lease", report=print, lost=lambda: None, lapses_after_s=LAPSES_AFTER_S) as ours:
        ours._sure_since -= LAPSES_AFTER_S
        before = len(proxy.seen)
        ours.confirm()
        assert len(proxy.seen) > before, "it looked"
        assert proxied.list("lease") == ["1.json"]
        before = len(proxy.seen)
        ours.confirm()
        assert len(proxy.seen) == before, "and is sure for a while"
    assert json.loads(proxied.read_bytes("lease/1.json"))["released"]


def test_renewing_gives_up_long_before_the_lease_lapses() -> None:
    connect_s, read_s, attempts = s3_client.LIMITS["brief"]
    calls = 2  # it looks, then writes
    lapses_after_s = lease.LAPSES_AFTER_S
    assert lapses_after_s / RENEWALS + calls * attempts * (connect_s + read_s) < lapses_after_s


def test_a_renewal_that_fails_is_told_at_once_and_made_again(
    proxied: Store, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """Though everything else waits for the server: a sign of life that comes late is none."""
    with bridging(RETRY_S), held(proxied, "lease", report=print, lost=lambda: None, lapses_after_s=1.0):
        proxy.fail(Fault(503), "PUT")
        told = becomes(lambda: "this lease cannot be renewed now" in caplog.text)
        proxy.heal()
        assert told
        before = proxied.read_bytes("lease/1.json")
        assert becomes(lambda: proxied.read_bytes("lease/1.json") != before)
