"""What does a store make of S3's answers that are lost, come late or are cut short: who was first, and is the file whole?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dpa_ray.data.retry import bridging
from dpa_ray.errors import NoAnswer
from dpa_ray.store import Store, s3_client
from tests.s3 import S3
from tests.s3_proxy import RETRY_S, Fault, Proxy, forget_clients

PATH = "a/z"


def answer_puts(proxy: Proxy, *faults: Fault) -> None:
    """`faults` in turn for what would write PATH."""
    left: Iterator[Fault] = iter(faults)
    proxy.rule = lambda method, path: next(left, None) if method == "PUT" and PATH in path else None


def put_by_another(s3: S3) -> None:
    s3.client().put_object(Bucket=s3.bucket, Key=f"store/{PATH}", Body=b"theirs")


def test_whose_answer_was_lost_was_first_all_the_same(proxied: Store, proxy: Proxy) -> None:
    proxy.fail(Fault(500, done=True), "PUT", containing=PATH, times=1)
    with bridging(RETRY_S):
        assert proxied.put_if_absent(PATH, b"mine")
        assert not proxied.put_if_absent(PATH, b"other")
    assert proxied.read_bytes(PATH) == b"mine"


def test_who_comes_again_may_find_another_ones(proxied: Store, proxy: Proxy, rclone_s3: S3) -> None:
    def rule(method: str, path: str) -> Fault | None:
        if method != "PUT" or PATH not in path:
            return None
        proxy.heal()
        put_by_another(rclone_s3)
        return Fault(500)

    proxy.rule = rule
    with bridging(RETRY_S):
        assert not proxied.put_if_absent(PATH, b"mine")
    assert proxied.read_bytes(PATH) == b"theirs"


@pytest.fixture
def repeating(proxied: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store without waiting, whose client itself repeats a request once."""
    monkeypatch.setitem(s3_client.LIMITS, "usual", (2, 2, 2))  # type: ignore[misc]
    forget_clients()
    return Store(proxied.uri)


def test_a_refused_repetition_is_ones_own_success(repeating: Store, proxy: Proxy) -> None:
    """Of a server that looks at If-None-Match: the first request did it, the second one is refused."""
    answer_puts(proxy, Fault(500, done=True), Fault(412))
    assert repeating.put_if_absent(PATH, b"mine")


def test_a_refused_repetition_is_none_where_another_one_wrote(repeating: Store, proxy: Proxy, rclone_s3: S3) -> None:
    left = iter([Fault(500), Fault(412)])

    def rule(method: str, path: str) -> Fault | None:
        if method != "PUT" or PATH not in path:
            return None
        fault = next(left)
        if fault.status == 412:
            proxy.heal()
            put_by_another(rclone_s3)
        return fault

    proxy.rule = rule
    assert not repeating.put_if_absent(PATH, b"mine")


@pytest.mark.parametrize("status", [409, 412])
def test_of_two_at_once_the_one_that_is_refused_was_not_first(proxied: Store, proxy: Proxy, status: int) -> None:
    answer_puts(proxy, Fault(status))
    assert not proxied.put_if_absent(PATH, b"mine")


def test_a_download_that_is_cut_is_no_file(proxied: Store, proxy: Proxy, tmp_path: Path) -> None:
    proxy.fail(Fault(cut=True), "GET", containing="/a/x")
    with pytest.raises(NoAnswer):
        proxied.download("a", tmp_path / "down")
    assert proxy.num_failed > 0
    assert not list((tmp_path / "down").rglob("*"))
    proxy.heal()
    proxied.download("a", tmp_path / "down")
    assert (tmp_path / "down" / "x").read_bytes() == b"12"
