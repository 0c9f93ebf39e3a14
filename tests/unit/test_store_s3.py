"""Does a store on S3 tell what is wrong, wait for a bounded time, and show no half-written object?"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dpa_ray.errors import UserError
from dpa_ray.store import Store
from dpa_ray.store.s3 import PART_BYTES
from tests.files import fill, python
from tests.s3 import S3, free_port

GIVE_UP_S = 20.0


def test_append_line_is_refused_on_s3(rclone_s3: S3) -> None:
    with pytest.raises(io.UnsupportedOperation, match="cannot append"):
        Store(rclone_s3.uri).append_line("x", "y")


def test_a_wrong_endpoint_url_is_told_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(UserError, match=r"AWS_ENDPOINT_URL: expected http://HOST.*found 'localhost:9000'"):
        Store("s3://bucket")


def test_a_missing_bucket_is_told_clearly(s3_server: S3) -> None:
    store = Store("s3://no-such-bucket/prefix")
    expected = rf"no bucket 'no-such-bucket' at {s3_server.env['AWS_ENDPOINT_URL']} .*create it"
    for call in (store.check, lambda: store.check(write=False), lambda: store.list("")):
        with pytest.raises(UserError, match=expected):
            call()
    with pytest.raises(UserError, match=expected):
        store.write_bytes("x", b"")


def test_wrong_keys_are_told_clearly(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in (("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId"), ("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch")):
        with monkeypatch.context() as patch:
            patch.setenv(name, "wrong")
            with pytest.raises(
                UserError, match=f"refused access to bucket '{s3_server.bucket}'.*({code}|403).*check the"
            ):
                Store(s3_server.uri).check()
            with pytest.raises(UserError, match="refused access"):
                Store(s3_server.uri).read_bytes("x")
    Store(s3_server.uri).check()


def test_missing_keys_are_told_clearly(rclone_s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(UserError, match="no usable credentials.*set AWS_ACCESS_KEY_ID"):
        Store(rclone_s3.uri).check()


def test_a_refused_connection_is_told_within_20_s(
    rclone_s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    fill(tmp_path, x=1)
    store = Store(f"{rclone_s3.uri}/a")
    calls: dict[str, Callable[[], object]] = {
        "check": store.check,
        "read": lambda: store.read_bytes("x"),
        "upload": lambda: store.upload(tmp_path, "x"),
        "download": lambda: store.download("x", tmp_path / "target", ["x"]),
    }

    def refused(name: str) -> float:
        begin = time.monotonic()
        with pytest.raises(UserError, match=f"no answer from {url}.*bucket '{rclone_s3.bucket}'"):
            calls[name]()
        return time.monotonic() - begin

    with ThreadPoolExecutor(len(calls)) as pool:
        waited = dict(zip(calls, pool.map(refused, calls), strict=True))
    assert max(waited.values()) < GIVE_UP_S, waited


def test_a_server_that_comes_back_is_waited_for(rclone_s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    store, port = Store(rclone_s3.uri), free_port()
    store.write_bytes("x", b"1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    target = int(rclone_s3.env["AWS_ENDPOINT_URL"].rpartition(":")[2])
    forward = f"""
        import socket, socketserver, threading, time
        time.sleep(0.5)
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                other = socket.create_connection(("127.0.0.1", {target}))
                def pump(a, b):
                    while data := a.recv(65536):
                        b.sendall(data)
                threading.Thread(target=pump, args=(other, self.request), daemon=True).start()
                pump(self.request, other)
        socketserver.ThreadingTCPServer.daemon_threads = True
        socketserver.ThreadingTCPServer(("127.0.0.1", {port}), Handler).serve_forever()
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(forward)])
    try:
        assert store.read_bytes("x") == b"1"
    finally:
        process.kill()
        process.wait()


def test_a_killed_upload_shows_no_object(s3_server: S3, tmp_path: Path) -> None:
    script = """
        import os, pathlib, signal, sys
        from dpa_ray.store import Store
        from dpa_ray.store.s3_client import client
        parts = []
        def count(**_):
            parts.append(1)
            if len(parts) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        client().meta.events.register("before-call.s3.UploadPart", count)
        Store(sys.argv[1]).upload(pathlib.Path(sys.argv[2]), "a")
    """
    files = fill(tmp_path, big=4 * PART_BYTES)
    assert python(script, s3_server.uri, str(tmp_path)).returncode == -signal.SIGKILL
    assert s3_server.keys() == []
    store = Store(s3_server.uri)
    store.upload(tmp_path, "a")
    assert store.read_bytes("a/big") == files["big"]


def test_a_failed_upload_leaves_neither_object_nor_parts(s3_server: S3, tmp_path: Path) -> None:
    script = """
        import pathlib, sys
        from botocore.exceptions import ConnectionClosedError
        from dpa_ray.store import Store
        from dpa_ray.store.s3_client import client
        parts = []
        def fail(**_):
            parts.append(1)
            if len(parts) >= 3:
                raise ConnectionClosedError(endpoint_url="gone")
        client().meta.events.register("before-call.s3.UploadPart", fail)
        try:
            Store(sys.argv[1]).upload(pathlib.Path(sys.argv[2]), "a")
        except Exception as error:
            print(type(error).__name__, error)
    """
    fill(tmp_path, big=4 * PART_BYTES)
    told = python(script, s3_server.uri, str(tmp_path))
    assert told.stdout.startswith(f"NoAnswer {s3_server.uri}/a/big: no answer from"), told
    assert s3_server.keys() == []
    assert s3_server.client().list_multipart_uploads(Bucket=s3_server.bucket).get("Uploads", []) == []


def test_the_code_itself_makes_arrow_write_to_other_servers(s3_server: S3) -> None:
    script = """
        import sys
        from dpa_ray.store import open_uri
        files, path = open_uri(sys.argv[1] + "/x")
        with files.open_output_stream(path) as stream:
            stream.write(b"1")
    """
    assert not {name for name in os.environ if "CHECKSUM" in name}
    done = python(script, s3_server.uri)
    assert done.returncode == 0, done.stderr
    assert s3_server.keys() == ["x"]


def test_big_files_are_never_whole_in_memory(rclone_s3: S3, tmp_path: Path) -> None:
    script = """
        import pathlib, sys
        from dpa_ray.store import Store
        store, folder = Store(sys.argv[1]), pathlib.Path(sys.argv[2])
        def peak_bytes():  # getrusage's begins with what the process had that started this one
            return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
        store.check(), store.write_bytes("b/small", b"1"), store.download("b", folder / "warm")
        before = peak_bytes()
        store.upload(folder / "source", "a")
        store.download("a", folder / "target")
        print(peak_bytes() - before)
    """
    size = 14 * PART_BYTES
    (tmp_path / "source").mkdir()
    with open(tmp_path / "source" / "big", "wb") as file:
        file.truncate(size)
    grown = int(python(script, rclone_s3.uri, str(tmp_path)).stdout)
    assert (tmp_path / "target" / "big").stat().st_size == size
    # 4 threads hold a part each, with a second copy on its way through the client
    assert grown < 9 * PART_BYTES


@pytest.mark.ci
def test_more_files_than_one_listing_page_are_all_found(s3_server: S3) -> None:
    store, names = Store(s3_server.uri), [f"{i:04}" for i in range(1100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.write_bytes(f"many/{name}", b"1"), names))
    assert store.list("many") == names
    store.delete("many")
    assert s3_server.keys() == []


@pytest.mark.ci
@pytest.mark.parametrize("team", [b"", b"notes of the team"])
def test_nothing_above_the_store_is_touched(team: bytes, ceph_s3: S3) -> None:
    """Empty objects named like folders go with what was in them, up to the store's own; what is above it is others'."""
    put = ceph_s3.client().put_object
    for key, body in (("team/", team), ("team/dpa/", b""), ("team/dpa/runs/", b""), ("team/dpa/kept/", b"not empty")):
        put(Bucket=ceph_s3.bucket, Key=key, Body=body)
    store = Store(f"s3://{ceph_s3.bucket}/team/dpa")
    for path in ("runs/a/x", "kept/y"):
        store.write_bytes(path, b"1")
        store.delete(path)
    assert ceph_s3.keys() == ["team/", "team/dpa/kept/"]
    assert ceph_s3.client().get_object(Bucket=ceph_s3.bucket, Key="team/")["Body"].read() == team
