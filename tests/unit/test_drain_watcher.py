"""Is a cloud's notice understood, whatever its metadata server and Ray's GCS do meanwhile? Against real HTTP servers."""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dpa_ray.cluster import drain_watcher
from dpa_ray.cluster.drain_watcher import DrainFailed, ask_ray, watch
from dpa_ray.cluster.notices import AWS_NOTICE_S, GCP_MAINTENANCE_S, GCP_NOTICE_S, Aws, Gcp, NoMetadata, Notice, detect
from tests.metadata_server import INTERRUPTION, MAINTENANCE, PREEMPTED, REBALANCE, MetadataServer

AT = "2031-05-06T07:08:09Z"
AT_S = 1_935_817_689.0  # date -u -d 2031-05-06T07:08:09Z +%s
SOON_S = 0.01


@pytest.fixture
def aws() -> Iterator[MetadataServer]:
    with MetadataServer("aws") as server:
        yield server


@pytest.fixture
def gcp() -> Iterator[MetadataServer]:
    with MetadataServer("gcp") as server:
        yield server


def test_a_spot_interruption_is_a_notice_with_its_time(aws: MetadataServer) -> None:
    provider = Aws(aws.url)
    assert provider.look(SOON_S) is None
    aws.say(INTERRUPTION, f'{{"action": "terminate", "time": "{AT}"}}')
    assert provider.look(SOON_S) == Notice("AWS will terminate this spot instance", AT_S)


@pytest.mark.parametrize("said", ["", "soon", "[]", '{"action": "stop"}', '{"action": "stop", "time": "soon"}'])
def test_a_notice_that_cannot_be_read_is_a_notice(aws: MetadataServer, said: str) -> None:
    aws.say(INTERRUPTION, said)
    before = time.time()
    notice = Aws(aws.url).look(SOON_S)
    assert notice is not None
    assert notice.deadline_s is not None
    assert before + AWS_NOTICE_S <= notice.deadline_s <= time.time() + AWS_NOTICE_S


def test_a_recommendation_to_rebalance_counts_where_it_is_wanted(aws: MetadataServer) -> None:
    aws.say(REBALANCE, f'{{"noticeTime": "{AT}"}}')
    assert Aws(aws.url).look(SOON_S) is None
    notice = Aws(aws.url, rebalance=True).look(SOON_S)
    assert notice is not None
    assert notice.deadline_s is None


def test_a_token_that_lapsed_is_replaced(aws: MetadataServer) -> None:
    provider = Aws(aws.url)
    assert provider.look(SOON_S) is None
    aws.tokens.clear()
    aws.say(INTERRUPTION, f'{{"action": "terminate", "time": "{AT}"}}')
    assert provider.look(SOON_S) is not None


def test_a_server_without_tokens_is_not_one_that_plans_nothing(aws: MetadataServer) -> None:
    aws.cloud = "none"
    with pytest.raises(NoMetadata, match="404"):
        Aws(aws.url).look(SOON_S)


def test_a_preemption_is_told_while_it_is_waited_for(gcp: MetadataServer) -> None:
    provider = Gcp(gcp.url)
    assert provider.look(1) is None  # the first answer comes at once
    found: list[Notice | None] = []
    looking = threading.Thread(target=lambda: found.append(provider.look(60)))
    looking.start()
    gcp.wait_until_asked("wait_for_change=true")
    before = time.time()
    gcp.say(PREEMPTED, "TRUE")
    looking.join(50)  # it did not wait for its 60 s
    assert not looking.is_alive()
    (notice,) = found
    assert notice is not None
    assert notice.deadline_s is not None
    assert notice.deadline_s >= before + GCP_NOTICE_S


def test_a_preemption_between_two_looks_is_not_missed(gcp: MetadataServer) -> None:
    provider = Gcp(gcp.url)
    assert provider.look(1) is None
    gcp.say(PREEMPTED, "TRUE")
    assert provider.look(600) is not None  # at once, as another etag was seen last


@pytest.mark.parametrize(
    ("event", "is_notice"), [("MIGRATE_ON_HOST_MAINTENANCE", False), ("TERMINATE_ON_HOST_MAINTENANCE", True)]
)
def test_maintenance_is_a_notice_where_it_ends_the_machine(gcp: MetadataServer, event: str, is_notice: bool) -> None:
    gcp.say(MAINTENANCE, event)
    notice = Gcp(gcp.url).look(1)
    assert (notice is not None) == is_notice
    if notice is not None:
        assert notice.deadline_s is not None
        assert notice.deadline_s <= time.time() + GCP_MAINTENANCE_S


def test_the_cloud_is_found_by_who_answers(aws: MetadataServer, gcp: MetadataServer) -> None:
    with MetadataServer("none") as other:
        assert detect(other.url) is None
        gone = other.url
    assert detect(gone) is None
    found_aws, found_gcp = detect(aws.url, rebalance=True), detect(gcp.url)
    assert isinstance(found_aws, Aws)
    assert found_aws.rebalance
    assert isinstance(found_gcp, Gcp)


def test_a_proxy_of_the_environment_is_not_asked(aws: MetadataServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetadataServer("none") as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert isinstance(detect(aws.url), Aws)
        assert proxy.asked == []


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What was logged so far; attempts to drain follow each other fast."""
    caplog.set_level(logging.INFO, logger="drain_watcher")
    monkeypatch.setattr(drain_watcher, "DRAIN_AGAIN_S", SOON_S)
    return lambda: caplog.text


def test_one_notice_drains_once_and_ends(aws: MetadataServer, lines: Callable[[], str]) -> None:
    drained: list[Notice] = []

    def drain(notice: Notice) -> str:
        drained.append(notice)
        return "node abc"

    codes: list[int] = []
    watching = threading.Thread(target=lambda: codes.append(watch(lambda: Aws(aws.url), drain, SOON_S)))
    watching.start()
    aws.wait_until_asked(INTERRUPTION, times=3)
    assert drained == []
    aws.say(INTERRUPTION, f'{{"action": "terminate", "time": "{AT}"}}')
    watching.join(60)
    assert codes == [0]
    assert drained == [Notice("AWS will terminate this spot instance", AT_S)]
    assert "notice: AWS will terminate this spot instance, in " in lines()
    assert "drained node abc" in lines()


def test_a_metadata_server_that_is_away_is_told_once_and_waited_for(
    aws: MetadataServer, lines: Callable[[], str]
) -> None:
    codes: list[int] = []
    watching = threading.Thread(target=lambda: codes.append(watch(lambda: Aws(aws.url), lambda notice: "it", SOON_S)))
    watching.start()
    aws.wait_until_asked(INTERRUPTION)
    aws.is_failing = True
    asked = sum(INTERRUPTION in path for path in aws.asked)
    aws.wait_until_asked(INTERRUPTION, times=asked + 5)
    aws.say(INTERRUPTION, "{}")
    assert not codes
    aws.is_failing = False
    watching.join(60)
    assert codes == [0]
    assert lines().count("the metadata server does not answer") == 1
    assert "HTTP 503" in lines()
    assert "the metadata server answers again" in lines()


def test_a_server_that_comes_late_is_found(lines: Callable[[], str], aws: MetadataServer) -> None:
    answers = iter([None, None, Aws(aws.url)])
    aws.say(INTERRUPTION, "{}")
    assert watch(lambda: next(answers), lambda notice: "it", SOON_S, detect_every_s=SOON_S) == 0
    assert lines().count("no metadata server of AWS or Google answers") == 1


def test_a_gcs_that_is_away_is_asked_again_as_long_as_the_machine_lives(
    aws: MetadataServer, lines: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drain_watcher, "GIVE_UP_AFTER_S", 0.0)
    aws.say(INTERRUPTION, f'{{"action": "terminate", "time": "{AT}"}}')
    answers = iter(["away", "away", "node abc"])

    def drain(notice: Notice) -> str:
        if (answer := next(answers)) == "away":
            raise DrainFailed(answer)
        return answer

    assert watch(lambda: Aws(aws.url), drain, SOON_S) == 0
    assert lines().count("not drained: away; trying again") == 1
    assert "drained node abc" in lines()


def test_what_comes_too_late_is_given_up(
    aws: MetadataServer, lines: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drain_watcher, "GIVE_UP_AFTER_S", 0.0)
    aws.say(INTERRUPTION, '{"action": "terminate", "time": "2001-01-01T00:00:00Z"}')

    def drain(notice: Notice) -> str:
        raise DrainFailed("away")

    assert watch(lambda: Aws(aws.url), drain, SOON_S) == 1
    assert "given up" in lines()


def test_a_machine_without_ray_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path_factory.mktemp("no-ray")))
    with pytest.raises(DrainFailed, match="no Ray was started on this machine"):
        ask_ray(Notice("a test", None), address=None, node_id=None)


def test_a_gcs_that_does_not_answer_is_not_waited_for_longer_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own client would take 40 s, and then end its process."""
    monkeypatch.setattr(drain_watcher, "DRAIN_WITHIN_S", 1.0)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(DrainFailed, match="does not answer within 1 s"):
            ask_ray(Notice("a test", None), address, node_id="ab" * 28)


@pytest.mark.parametrize(("in_s", "is_told"), [(None, False), (-50.0, True), (500.0, True)])
def test_a_deadline_that_has_passed_is_still_one(
    in_s: float | None, is_told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 is none, and Ray drains without one; what has passed is told as just ahead."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/told\necho abc\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    before = time.time()
    assert ask_ray(Notice("gone", None if in_s is None else before + in_s), address=None, node_id=None) == "node abc"
    told_ms = int((tmp_path / "told").read_text().split("--deadline-ms")[1])
    assert told_ms == 0 or told_ms > 1000 * before
    assert bool(told_ms) == is_told


class Gcs:
    """Stands for a GCS that knows some nodes."""

    def __init__(self, *nodes: dict[str, Any]):
        from ray.core.generated.gcs_pb2 import GcsNodeInfo

        self.nodes = {
            values["node_id"]: GcsNodeInfo(state=GcsNodeInfo.ALIVE if values.pop("lives", True) else GcsNodeInfo.DEAD, **values)
            for values in nodes
        }  # fmt: skip

    def get_all_node_info(self, timeout: float) -> dict[bytes, Any]:
        return self.nodes


def test_all_nodes_that_live_on_this_machine_are_drained_and_no_other() -> None:
    from dpa_ray.cluster.draining import NoNode, _own_nodes

    here, elsewhere = {"node_manager_address": "127.0.0.1"}, {"node_manager_address": "10.9.9.9"}
    nodes = [
        {"node_id": b"a", **here}, {"node_id": b"b", **elsewhere}, {"node_id": b"c", **here, "lives": False},
        {"node_id": b"d", **here},
    ]  # fmt: skip
    assert _own_nodes(Gcs(*nodes), "127.0.0.1:6379") == [b"a".hex(), b"d".hex()]
    by_name = {"node_id": b"e", **elsewhere, "node_manager_hostname": socket.gethostname()}
    assert _own_nodes(Gcs(by_name), "127.0.0.1:6379") == [b"e".hex()]
    with pytest.raises(NoNode, match=r"this machine's address 127\.0\.0\.1; those that live: 10\.9\.9\.9"):
        _own_nodes(Gcs({"node_id": b"b", **elsewhere}), "127.0.0.1:6379")


@pytest.mark.parametrize("arguments", [["--poll-s", "0"], ["--poll-s", "90"], ["--provider", "azure"]])
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        drain_watcher.main(arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err
