"""Does a role's metadata server that is slow or busy only delay, and is a machine without credentials told soon?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpa_ray.data import retry
from dpa_ray.data.retry import bridging, retried
from dpa_ray.errors import NoAnswer, Unreachable
from dpa_ray.store import Store, s3_client
from tests.metadata_server import ROLES, MetadataServer
from tests.s3 import KEY, S3, SECRET

TOKEN = "/latest/api/token"


@pytest.fixture
def metadata(rclone_s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[MetadataServer]:
    """A machine whose only credentials are a role's, and a process that has not asked for them."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.1)
    s3_client._client.cache_clear()
    s3_client._given.clear()
    with MetadataServer("aws") as server:
        server.give_role(KEY, SECRET)
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", server.url)
        yield server
    s3_client._client.cache_clear()
    s3_client._given.clear()


def test_a_slow_answer_of_the_metadata_server_is_waited_for(rclone_s3: S3, metadata: MetadataServer) -> None:
    metadata.late_s = [2.0]  # botocore itself gives up after a second
    assert not Store(rclone_s3.uri).exists("x")
    assert sum(TOKEN in asked for asked in metadata.asked) == 1


def test_a_client_without_credentials_is_not_kept(rclone_s3: S3, metadata: MetadataServer) -> None:
    metadata.is_failing = True
    store = Store(rclone_s3.uri)
    with pytest.raises(NoAnswer, match="no usable credentials.*what gives them does not answer"):
        store.exists("x")
    metadata.is_failing = False
    assert not store.exists("x")


def test_a_metadata_server_that_is_away_is_an_outage(
    rclone_s3: S3, metadata: MetadataServer, caplog: pytest.LogCaptureFixture
) -> None:
    metadata.is_failing = True
    tries: list[float] = []

    def look() -> bool:
        tries.append(time.monotonic())
        metadata.is_failing = len(tries) < 3
        return Store(rclone_s3.uri).exists("x")

    with bridging(30):
        assert not retried(look, f"{rclone_s3.uri}/x")
    assert len(tries) == 3
    assert "S3 is away (no usable credentials" in caplog.text
    assert "set AWS_" not in caplog.text


def test_a_machine_of_which_the_server_knows_no_role_is_told_at_once(rclone_s3: S3, metadata: MetadataServer) -> None:
    del metadata.values[ROLES]
    with pytest.raises(Unreachable, match="no usable credentials.*set AWS_ACCESS_KEY_ID") as told:
        Store(rclone_s3.uri).exists("x")
    assert not isinstance(told.value, NoAnswer)


def test_what_had_credentials_before_waits_for_them(
    rclone_s3: S3, metadata: MetadataServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(rclone_s3.uri)
    assert not store.exists("x")
    s3_client._client.cache_clear()
    metadata.is_failing = True
    monkeypatch.setattr(s3_client, "on_ec2", lambda: False)
    with pytest.raises(NoAnswer, match="no usable credentials"):
        store.exists("x")


def test_limits_that_the_user_set_stay(
    metadata: MetadataServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ("metadata_service_timeout", "metadata_service_num_attempts")
    assert [s3_client._patient_session().get_config_variable(name) for name in names] == [5, 3]
    monkeypatch.setenv("AWS_METADATA_SERVICE_TIMEOUT", "7")
    (tmp_path / "config").write_text("[default]\nmetadata_service_num_attempts = 9\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert [s3_client._patient_session().get_config_variable(name) for name in names] == [7, 9]


def test_elsewhere_than_on_ec2_nobody_is_kept_waiting(
    rclone_s3: S3, metadata: MetadataServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address that nobody answers at, as a laptop finds one: botocore asks twice, a second each."""
    monkeypatch.setattr(s3_client, "on_ec2", lambda: False)
    metadata.late_s = [20.0] * 20
    begin = time.monotonic()
    with pytest.raises(Unreachable, match="no usable credentials") as told:
        Store(rclone_s3.uri).exists("x")
    assert time.monotonic() - begin < 8
    assert not isinstance(told.value, NoAnswer)
