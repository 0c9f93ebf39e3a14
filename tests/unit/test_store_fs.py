"""Does a store keep its word, on a local disk and on real S3 servers alike: whole files, right names, plain paths?"""

from __future__ import annotations

import os
import pickle
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dpa_ray.errors import UserError
from dpa_ray.store import Store, open_uri
from dpa_ray.store.local import LINK_FROM_BYTES, TMP_PREFIX
from dpa_ray.store.s3 import PART_BYTES
from tests.files import fill, python
from tests.gcs import Gcs
from tests.s3 import S3

AWKWARD = "a b/ü+%25 #?&=.txt"


@pytest.fixture(params=["local", "rclone", "gcs", pytest.param("ceph", marks=pytest.mark.ci)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "store"))
    server: S3 | Gcs = request.getfixturevalue("fake_gcs" if request.param == "gcs" else f"{request.param}_s3")
    return Store(f"{server.uri}/some/prefix")


# What every kind of store does.


def test_a_file_is_read_back_and_replaced(store: Store) -> None:
    store.write_bytes("runs/a/run.json", b"one")
    assert store.read_bytes("runs/a/run.json") == b"one"
    store.write_bytes("runs/a/run.json", b"")
    assert store.read_bytes("runs/a/run.json") == b""


def test_json_keeps_its_values_and_refuses_nan(store: Store) -> None:
    value = {"text": "ü", "list": [1, 2.5, None, True]}
    store.write_json("x.json", value)
    assert store.read_json("x.json") == value
    with pytest.raises(ValueError, match="JSON"):
        store.write_json("x.json", {"loss": float("nan")})
    assert store.read_json("x.json") == value


def test_broken_json_is_named(store: Store) -> None:
    store.write_bytes("x.json", b'{"a":')
    with pytest.raises(UserError, match=r"x\.json: expected JSON, found 5 bytes"):
        store.read_json("x.json")


def test_an_absent_file_is_a_file_not_found_error_with_its_address(store: Store, tmp_path: Path) -> None:
    for call in (
        lambda: store.read_bytes("no/such"),
        lambda: store.read_json("no/such"),
        lambda: store.copy("no/such", "target"),
        lambda: store.download("no", tmp_path / "target", ["such"]),
    ):
        with pytest.raises(FileNotFoundError) as error:
            call()
        assert store.url("no/such") in str(error.value)
    assert not (tmp_path / "target").exists() or os.listdir(tmp_path / "target") == []


def test_a_folder_is_no_file(store: Store) -> None:
    store.write_bytes("a/b", b"1")
    assert store.exists("a/b")
    assert not store.exists("a")
    assert not store.exists("a/c")


def test_list_is_sorted_and_relative(store: Store) -> None:
    for name in ("top", "a/z", "a/b/c", "a/b/d", "ab/x", f"a/{TMP_PREFIX}x", f"a/{TMP_PREFIX}y/z"):
        store.write_bytes(name, b"1")
    assert store.list("a") == ["b/c", "b/d", "z"]
    assert store.list("a", recursive=False) == ["z"]
    assert store.list("") == ["a/b/c", "a/b/d", "a/z", "ab/x", "top"]
    assert store.list("none") == store.list("none", recursive=False) == store.list_dirs("none") == []
    assert store.list_dirs("") == ["a", "ab"]
    assert store.list_dirs("a") == ["b"]
    assert store.list("top") == store.list("top", recursive=False) == store.list_dirs("top") == []


def test_delete_takes_a_file_or_a_folder_and_nothing_beside_it(store: Store) -> None:
    for name in ("a/x", "a/y/z", "ab", "b"):
        store.write_bytes(name, b"1")
    store.delete("a")
    assert store.list("") == ["ab", "b"]
    store.delete("b")
    store.delete("b")
    store.delete("never/there")
    assert store.list("") == ["ab"]


def test_awkward_names_round_trip(store: Store, tmp_path: Path) -> None:
    store.write_bytes(AWKWARD, b"1")
    store.copy(AWKWARD, f"copy/{AWKWARD}")
    assert store.list("") == [AWKWARD, f"copy/{AWKWARD}"]
    store.download("copy", tmp_path / "target")
    assert (tmp_path / "target" / AWKWARD).read_bytes() == b"1"
    files, root = store.arrow()
    assert files.open_input_file(f"{root}/{AWKWARD}").read() == b"1"


def test_folders_round_trip_with_empty_and_many_part_files(store: Store, tmp_path: Path) -> None:
    files = fill(tmp_path / "source", empty=0, small=10, deep__er__file=1000, big=2 * PART_BYTES + 12345)
    store.upload(tmp_path / "source", "data/x")
    assert store.list("data/x") == sorted(files)
    store.download("data/x", tmp_path / "target")
    assert {name: (tmp_path / "target" / name).read_bytes() for name in files} == files
    assert store.read_bytes("data/x/big") == files["big"]
    store.download("data/x", tmp_path / "some", ["deep/er/file"])
    assert os.listdir(tmp_path / "some") == ["deep"]
    store.upload(tmp_path / "source", "data/y", ["small"])
    assert store.list("data/y") == ["small"]


def test_copies_are_equal_and_independent(store: Store, tmp_path: Path) -> None:
    files = fill(tmp_path / "source", small=10, deep__file=LINK_FROM_BYTES)
    store.upload(tmp_path / "source", "a")
    store.copy("a", "b/c")
    store.copy("a/small", "single")
    assert store.read_bytes("single") == files["small"]
    assert {name: store.read_bytes(f"b/c/{name}") for name in store.list("b/c")} == files
    store.write_bytes("b/c/deep/file", b"new")
    store.delete("b/c/small")
    assert {name: store.read_bytes(f"a/{name}") for name in store.list("a")} == files
    store.copy("a", "a")  # on itself: harmless
    assert store.list("a") == sorted(files)


def test_put_if_absent_keeps_the_first(store: Store) -> None:
    assert store.put_if_absent("lease", b"first")
    assert not store.put_if_absent("lease", b"second")
    assert store.read_bytes("lease") == b"first"
    store.delete("lease")
    assert store.put_if_absent("lease", b"third")


def test_of_many_writers_at_once_one_wins(store: Store, request: pytest.FixtureRequest) -> None:
    if "rclone" in request.node.callspec.id:
        pytest.skip("rclone ignores If-None-Match")
    for round_ in range(5):
        barrier = threading.Barrier(8)

        def put(writer: int, path: str = f"lease-{round_}", barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return store.put_if_absent(path, str(writer).encode())

        with ThreadPoolExecutor(8) as pool:
            won = [writer for writer, first in enumerate(pool.map(put, range(8))) if first]
        assert [store.read_bytes(f"lease-{round_}")] == [str(writer).encode() for writer in won]


def test_a_reader_sees_the_old_file_or_the_new_one(store: Store, request: pytest.FixtureRequest) -> None:
    if "rclone" in request.node.callspec.id:
        pytest.skip("rclone may send the new content with the old length")
    versions = {bytes([i]) * (100_000 + 50_000 * i) for i in range(4)}
    store.write_bytes("x", next(iter(versions)))
    done = threading.Event()

    def write() -> None:
        for _ in range(10):
            for version in versions:
                store.write_bytes("x", version)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    while not done.is_set():
        assert store.read_bytes("x") in versions
        seen += 1
    writer.join()
    assert seen > 0


def test_paths_out_of_the_store_are_refused(store: Store, tmp_path: Path) -> None:
    for path in ("../x", "a/../../x", "/etc/passwd", "a//b", "a/", ".", "a/./b", ""):
        for call in (store.read_bytes, store.exists, store.delete, lambda p: store.write_bytes(p, b"")):
            with pytest.raises(ValueError, match="inside the store"):
                call(path)
    with pytest.raises(ValueError, match="inside the store"):
        store.download("a", tmp_path, ["../x"])


def test_a_pickled_store_works_in_another_process(store: Store, tmp_path: Path) -> None:
    store.write_bytes("x", b"1")  # so that clients exist, which cannot be pickled
    (tmp_path / "store.pickle").write_bytes(pickle.dumps(store))
    script = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).read_bytes('x'))"
    assert python(script, str(tmp_path / "store.pickle")).stdout == "b'1'\n"


def test_check_passes_and_leaves_nothing(store: Store) -> None:
    store.check(write=False)
    store.check()
    assert store.list("") == store.list_dirs("") == []
    files, root = store.arrow()
    from pyarrow import fs

    assert files.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True)) == []


def test_arrow_and_the_store_see_the_same_files(store: Store) -> None:
    store.write_bytes("a/b", b"1")
    files, root = store.arrow()
    assert files.open_input_file(f"{root}/a/b").read() == b"1"
    with files.open_output_stream(f"{root}/a/c") as stream:
        stream.write(b"22")
    assert store.read_bytes("a/c") == b"22"
    files, path = open_uri(store.url("a/b"))
    assert files.open_input_file(path).read() == b"1"


# The local disk.


def test_a_failed_local_write_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path / "store"))
    store.write_bytes("a/x", b"old")
    fill(tmp_path / "source", x=100)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for call in (lambda: store.write_bytes("a/x", b"new"), lambda: store.upload(tmp_path / "source", "a")):
            with pytest.raises(UserError, match="a/x: No space left on device; free some space"):
                call()
    assert store.read_bytes("a/x") == b"old"
    assert os.listdir(tmp_path / "store" / "a") == ["x"]


def test_content_is_on_the_disk_before_its_name_and_both_before_a_write_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a file is there whole, once it was said to be written."""
    target, synced, fsync = tmp_path / "a" / "x", [], os.fsync

    def told(descriptor: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append(("folder" if place == target.parent else "file", target.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", told)
    Store(str(tmp_path)).write_bytes("a/x", b"new")
    assert synced == [("file", False), ("folder", True)]


def test_a_killed_local_upload_shows_nothing(tmp_path: Path) -> None:
    script = """
        import os, pathlib, signal, sys
        from dpa_ray.store import Store
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        Store(sys.argv[1]).upload(pathlib.Path(sys.argv[2]), "a")
    """
    fill(tmp_path / "source", x=100)
    store = Store(str(tmp_path / "store"))
    assert python(script, store.uri, str(tmp_path / "source")).returncode == -signal.SIGKILL
    assert os.listdir(tmp_path / "store" / "a") != []  # it was killed half-way, not before
    assert store.list("") == store.list("a", recursive=False) == []
    store.delete("a")
    assert not (tmp_path / "store" / "a").exists()


def test_append_line_adds_whole_lines_and_leaves_linked_copies_alone(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for number in range(3):
        store.append_line("runs/a/metrics.jsonl", f'{{"step": {number}}}')
    assert store.read_bytes("runs/a/metrics.jsonl") == b'{"step": 0}\n{"step": 1}\n{"step": 2}\n'
    with pytest.raises(ValueError, match="one line"):
        store.append_line("runs/a/metrics.jsonl", "a\nb")
    store.write_bytes("big", b"x" * LINK_FROM_BYTES)
    store.copy("big", "copy")
    assert os.stat(tmp_path / "big").st_nlink == 2  # copied without taking space
    store.append_line("copy", "y")
    assert len(store.read_bytes("big")) == LINK_FROM_BYTES
    assert len(store.read_bytes("copy")) == LINK_FROM_BYTES + 2


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    store.write_bytes("a/x", b"1")
    fill(tmp_path / "elsewhere", y=1)
    (tmp_path / "store" / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "store" / "a" / "round").symlink_to(tmp_path / "store" / "a")
    assert store.list("") == ["a/linked/y", "a/x"]
    store.delete("a")
    assert (tmp_path / "elsewhere" / "y").exists()


def test_a_store_that_cannot_be_is_told_clearly(tmp_path: Path) -> None:
    fill(tmp_path, file=1)
    with pytest.raises(
        UserError, match="expected a folder, found a file; give a folder, s3://bucket/prefix or gs://bucket/prefix"
    ):
        Store(str(tmp_path / "file")).check()
    with pytest.raises(UserError, match="Not a directory"):
        Store(str(tmp_path / "file" / "below")).check()
    with pytest.raises(UserError, match="/proc/dpa_ray_store: No such file or directory"):
        Store("/proc/dpa_ray_store").check()
    with pytest.raises(UserError, match="Is a directory|Directory not empty"):
        Store(str(tmp_path.parent)).write_bytes(tmp_path.name, b"")


def test_an_absent_local_store_is_empty_until_it_is_written_to(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "new" / "store"))
    store.check(write=False)
    assert store.list("") == []
    assert not (tmp_path / "new").exists()
    store.check()
    assert (tmp_path / "new" / "store").is_dir()


# Addresses.


@pytest.mark.parametrize(
    "uri",
    [
        "relative/path",
        "",
        "ftp://bucket/x",
        "gs://",
        "gs://a/../b",
        "s3://",
        "s3:///x",
        "s3://a",
        "s3://buck/../x",
        "http://x",
    ],
)
def test_other_uris_are_refused(uri: str) -> None:
    with pytest.raises(UserError, match="expected an absolute local path, s3://bucket/prefix or gs://bucket/prefix"):
        Store(uri)


def test_uris_are_made_plain(tmp_path: Path) -> None:
    assert Store(f"{tmp_path}/").uri == str(tmp_path)
    assert Store(f"file://{tmp_path}/a%20b").uri == f"{tmp_path}/a b"
    assert Store("s3://bucket//a/b/").uri == "s3://bucket/a/b"
    assert Store("s3://bucket/").url("x") == "s3://bucket/x"
    assert Store("gs://bucket//a/b/").url("x") == "gs://bucket/a/b/x"
    assert Store("s3://bucket").url("") == "s3://bucket"
    assert Store(str(tmp_path)) == Store(f"{tmp_path}/")
