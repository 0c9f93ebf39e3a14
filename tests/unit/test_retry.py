"""When is a failed call made again, and how long? The policy alone; against a real server in test_outages.py."""

from __future__ import annotations

import threading
import time

import pytest

from dpa_ray.data.retry import FIRST_WAIT_S, MAX_WAIT_S, bridged_s, bridging, is_outage, retried, wait_s
from dpa_ray.errors import NoAnswer, UserError

REFUSED = (
    "When reading information for key 'a' in bucket 'b': AWS Error NETWORK_CONNECTION during HeadObject operation: "
    "curlCode: 7, Could not connect to server; Details: Failed to connect to 127.0.0.1:1 after 0 ms"
)


def test_the_wait_doubles_up_to_the_cap():
    waits = [wait_s(num_tries, 0, 1000, draw=0) for num_tries in range(1, 9)]
    assert waits == [0.25, 0.5, 1, 2, 4, 7.5, 7.5, 7.5]
    assert wait_s(10_000, 0, 1000, draw=0) == MAX_WAIT_S / 2


def test_jitter_is_between_half_and_all_of_the_wait():
    assert wait_s(1, 0, 1000, draw=0.0) == FIRST_WAIT_S / 2
    assert wait_s(1, 0, 1000, draw=0.5) == FIRST_WAIT_S * 0.75
    assert FIRST_WAIT_S * 0.99 < wait_s(1, 0, 1000, draw=0.999) < FIRST_WAIT_S


def test_the_last_try_comes_when_the_time_is_over_and_none_after():
    assert wait_s(9, 299, 300, draw=0.5) == 1
    assert wait_s(9, 300, 300, draw=0.5) is None


class Clock:
    """Time that passes only in `sleep`; `call` fails until `back_s`."""

    def __init__(self, back_s: float, error: Exception | None = None):
        self.time, self.back_s, self.tries = 0.0, back_s, 0
        self.error = error or OSError(REFUSED)

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def call(self) -> str:
        self.tries += 1
        if self.time < self.back_s:
            raise self.error
        return "data"

    def run(self, retry_s: float) -> str:
        with bridging(retry_s):
            return retried(self.call, "s3://b/a", now=lambda: self.time, sleep=self.sleep, draw=lambda: 0.0)


@pytest.mark.parametrize("error", [OSError(REFUSED), NoAnswer("s3://b/a: no answer")])
def test_an_outage_as_long_as_allowed_only_delays(error, caplog):
    clock = Clock(back_s=300, error=error)
    assert clock.run(300) == "data"
    assert clock.time == 300
    assert clock.tries < 50
    assert len(caplog.records) == 1, "once per outage"
    assert "s3://b/a: S3 is away" in caplog.text
    assert "trying again for 300 s (data.retry_s)" in caplog.text


def test_a_longer_outage_is_an_error_with_url_time_and_key():
    clock = Clock(back_s=300.5)
    with pytest.raises(UserError, match=r"^s3://b/a: no answer from S3 for 300 s .*set data.retry_s to more than 300") as err:  # fmt: skip
        clock.run(300)
    assert "\n" not in str(err.value)
    assert f"in {clock.tries} tries" in str(err.value)
    assert not is_outage(err.value), "nobody waits for it again"


def test_without_bridging_nothing_is_tried_again(caplog):
    clock = Clock(back_s=1)
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        clock.run(0)
    assert clock.tries == 1
    assert not caplog.records


def test_an_error_of_another_kind_ends_it_at_once_also_during_an_outage():
    clock = Clock(back_s=1, error=FileNotFoundError(2, "no such file"))
    with pytest.raises(FileNotFoundError):
        clock.run(300)
    assert clock.tries == 1
    errors = iter([OSError(REFUSED), OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body.")])

    def denied() -> None:
        raise next(errors)

    with bridging(300), pytest.raises(OSError, match="ACCESS_DENIED"):
        retried(denied, "s3://b/a", sleep=lambda seconds: None)


def test_threads_in_the_same_outage_log_it_once(caplog):
    back = time.monotonic() + 0.8
    gate = threading.Barrier(4)

    def call() -> None:
        if time.monotonic() < back:
            raise OSError(REFUSED)

    def run() -> None:
        gate.wait()
        retried(call, "s3://b/a")

    with bridging(30):
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(caplog.records) == 1


def test_the_longest_block_counts_and_each_ends_for_itself():
    first, second = bridging(5), bridging(7)
    assert bridged_s() == 0
    first.__enter__()
    second.__enter__()
    assert bridged_s() == 7
    first.__exit__(None, None, None)  # as blocks of two threads may
    assert bridged_s() == 7
    second.__exit__(None, None, None)
    assert bridged_s() == 0


DURING = "during GetObject operation: "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (REFUSED, True),
        (f"AWS Error NETWORK_CONNECTION {DURING}curlCode: 28, Timeout was reached; Details: Operation too slow.", True),
        (f"AWS Error NETWORK_CONNECTION {DURING}curlCode: 18, Transferred a partial file; Details: end", True),
        (f"AWS Error NETWORK_CONNECTION {DURING}curlCode: 35, SSL connect error; Details: wrong version number", False),
        (
            f"AWS Error NETWORK_CONNECTION {DURING}curlCode: 35, x; Details: Recv failure: Connection reset by peer",
            True,
        ),
        (f"AWS Error NETWORK_CONNECTION {DURING}curlCode: 60, SSL peer certificate was not OK", False),
        (f"AWS Error UNKNOWN (HTTP status 503) {DURING}No response body.", True),
        (f"AWS Error UNKNOWN (HTTP status 429) {DURING}No response body.", True),
        (f"AWS Error UNKNOWN (HTTP status 400) {DURING}No response body.", False),
        (f"AWS Error SLOW_DOWN {DURING}m", True),
        (f"AWS Error INTERNAL_FAILURE {DURING}m", True),
        (f"AWS Error ACCESS_DENIED {DURING}SLOW_DOWN", False),
        (f"AWS Error SIGNATURE_DOES_NOT_MATCH {DURING}m", False),
        (f"AWS Error NO_SUCH_BUCKET {DURING}m", False),
        ("Unexpected end of stream: Page was smaller (1) than expected (2)", False),
    ],
)
def test_what_arrow_raises_is_told_apart_by_its_text(text, expected):
    assert is_outage(OSError(text)) is expected
    assert not is_outage(OSError(2, text)), "a local file's, or a missing object"
    assert not is_outage(ValueError(text))
