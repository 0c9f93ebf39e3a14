"""How fast do images get from an S3 server to a training loop, and at what cost? This project beside two others.

    pip install -e '.[test,bench]' && python -m tests.benchmarks.ingest --out ingest.json

The same JPEG files (mixed sizes around 640 x 480, made here), the same rclone S3 server on loopback, as many worker
processes, batches of 32 float32 images of 336 x 336 (shorter edge, centre crop); systems take turns, round by round,
each time in a fresh process. dpa_ray reads its prepared shards through engine.feed, on a Ray that has been running since
the first round (warm: one more run before it is thrown away), and tokenises captions beside; torch fetches each file by
boto3; WebDataset reads tars of the same files. Each rival has two rows: with Pillow and the
transformers image processor (what its users write), and "+ours", with dpa_ray's decode and pixels. All rows must give
every image once and the same float32 pixels, with tolerance 0.

Time runs from asking for the stream to its last batch; imports are over by then. CPU seconds are those of every process
that takes part (loop, workers, all of Ray's own processes), but not the S3 server's. Memory is the peak over time of
their private pages (RSS without shared), with the object store's pages where Ray runs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image, ImageDraw

from tests.s3 import S3, fresh_bucket, running_rclone

SIZE = 336
BATCH = 32
SHARD_IMAGES = 64
RIVALS = ("torch", "webdataset")
SYSTEMS = ("dpa_ray", *(f"{name}{suffix}" for name in RIVALS for suffix in ("", "+ours")))
Item = tuple[str, np.ndarray]
Batches = Iterator[tuple[list[str], np.ndarray]]


# -- the files


def picture(rng: np.random.Generator) -> Image.Image:
    """Something with a photo's spectrum: noise in octaves (large shapes strong, fine ones weak), and hard edges."""
    width, height = (int(rng.integers(480, 801)), int(rng.integers(360, 601)))
    if rng.random() < 0.3:
        width, height = height, width
    canvas = np.full((height, width, 3), rng.integers(60, 190, 3), np.float32)
    for cell in (256, 96, 32, 8, 2):
        grid = rng.normal(0, 1, (height // cell + 2, width // cell + 2, 3)) * 40 + 128
        layer = Image.fromarray(np.clip(grid, 0, 255).astype(np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        canvas += (np.asarray(layer, np.float32) - 128) * (cell / 256) ** 0.4
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        corners = [(int(rng.integers(width)), int(rng.integers(height))) for _ in range(4)]
        draw.polygon(corners, outline=tuple(int(c) for c in rng.integers(0, 256, 3)), width=3)
    return image


def make_files(folder: Path, num_images: int) -> None:
    """The JPEG files, and the same in tars and as LLaVA JSON."""
    (folder / "images").mkdir(parents=True)
    (folder / "tars").mkdir()
    rng, records = np.random.default_rng(0), []
    for number in range(num_images):
        name = f"{number:06}.jpg"
        picture(rng).save(folder / "images" / name, quality=int(rng.integers(82, 95)))
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"Picture {number}."}]
        records.append({"id": name, "image": name, "conversations": turns})
    (folder / "set.json").write_text(json.dumps(records))
    names = sorted(path.name for path in (folder / "images").iterdir())
    for start in range(0, num_images, SHARD_IMAGES):
        with tarfile.open(folder / "tars" / f"{start:06}.tar", "w") as tar:
            for name in names[start : start + SHARD_IMAGES]:
                tar.add(folder / "images" / name, arcname=name)


def put_on_s3(folder: Path, server: S3) -> None:
    client = server.client()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), server.bucket, path.relative_to(folder).as_posix())


# -- the systems


def image_processor() -> Any:
    from transformers import LlavaImageProcessorPil

    return LlavaImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


class Decode:
    """(C, H, W) float32 of a JPEG's bytes."""

    def __init__(self, ours: bool):
        self.ours, self.processor = ours, image_processor()

    def __call__(self, data: bytes) -> np.ndarray:
        if self.ours:
            from dpa_ray.data.images import decode
            from dpa_ray.data.pixels import pixels

            return pixels(decode(data), self.processor)
        return self.opened(Image.open(io.BytesIO(data)).convert("RGB"))

    def opened(self, image: Image.Image) -> np.ndarray:
        array: np.ndarray = self.processor(images=image, return_tensors="np")["pixel_values"][0]
        return array


def collate(items: list[Item]) -> tuple[list[str], Any]:
    import torch

    return [name for name, _ in items], torch.from_numpy(np.stack([array for _, array in items]))


def dpa_ray_batches(setup: dict[str, Any]) -> Batches:
    import ray

    from dpa_ray.engine.feed import Feed

    loader = pickle.loads(Path(setup["loader"]).read_bytes())
    rows = np.arange(setup["num_images"])
    plan = [(rows[i : i + BATCH], 0) for i in range(0, len(rows), BATCH)]
    ray.init(address=setup["ray"], log_to_driver=False, configure_logging=False)
    feed = Feed()
    ray.get(feed.actor.__ray_ready__.remote())  # in a run it starts while the model is loaded
    yield [], np.empty(0)
    for batch in feed.batches(loader, plan, prefetch=2, workers=setup["workers"]):
        yield [str(name) for name in batch.ids], batch.to("cpu").pixel_values.numpy()
    feed.close()
    ray.shutdown()


def torch_batches(setup: dict[str, Any], decode: Decode) -> Batches:
    from torch.utils.data import DataLoader

    data = Objects(setup["bucket"], [f"{i:06}.jpg" for i in range(setup["num_images"])], decode)
    loader = DataLoader(data, batch_size=BATCH, num_workers=setup["workers"], collate_fn=collate, prefetch_factor=2)  # type: ignore[arg-type, var-annotated]
    yield [], np.empty(0)
    for names, images in loader:
        yield names, images.numpy()


class Objects:
    """A map-style dataset: one GET for each image."""

    def __init__(self, bucket: str, names: list[str], decode: Decode):
        self.bucket, self.names, self.decode, self.client = bucket, names, decode, None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Item:
        self.client = self.client or s3_client()
        data = self.client.get_object(Bucket=self.bucket, Key=f"images/{self.names[index]}")["Body"].read()  # type: ignore[union-attr, attr-defined]
        return self.names[index], self.decode(data)


def s3_client() -> Any:
    import boto3

    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name="us-east-1")


def open_s3(url: str, mode: str = "rb", bufsize: int = 0, **options: Any) -> Any:
    bucket, key = url.removeprefix("s3://").split("/", 1)
    return s3_client().get_object(Bucket=bucket, Key=key)["Body"]


def webdataset_batches(setup: dict[str, Any], decode: Decode) -> Batches:
    import webdataset
    from torch.utils.data import DataLoader

    webdataset.gopen_schemes["s3"] = open_s3
    urls = [f"s3://{setup['bucket']}/tars/{i:06}.tar" for i in range(0, setup["num_images"], SHARD_IMAGES)]
    data = webdataset.WebDataset(urls, shardshuffle=False)
    if not decode.ours:
        data = data.decode("pilrgb")
    data = data.to_tuple("__key__", "jpg")
    data = data.map(lambda pair: (f"{pair[0]}.jpg", (decode if decode.ours else decode.opened)(pair[1])))
    loader = DataLoader(
        data.batched(BATCH, collation_fn=collate), batch_size=None, num_workers=setup["workers"], prefetch_factor=2
    )  # type: ignore[var-annotated]
    yield [], np.empty(0)
    for names, images in loader:
        yield list(names), images.numpy()


def batches_of(system: str, setup: dict[str, Any]) -> Batches:
    """Batches of `system`; before the first one, when all is imported, an empty one."""
    if system == "dpa_ray":
        return dpa_ray_batches(setup)
    name, _, ours = system.partition("+")
    make = {"torch": torch_batches, "webdataset": webdataset_batches}[name]
    return make(setup, Decode(bool(ours)))


# -- measuring


class Meter:
    """CPU seconds and peak memory of some processes and all their children, sampled; the ends are read exactly."""

    def __init__(self, pids: list[int], *, shared_of: Callable[[psutil.Process], bool]):
        self.pids, self.shared_of = pids, shared_of
        self.first: dict[int, float] = {}
        self.last: dict[int, float] = {}
        self.peak_bytes = 0
        self.done = threading.Event()
        self.sample(start=True)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def sample(self, *, start: bool = False) -> None:
        memory = 0
        for process in _with_children(self.pids).values():
            try:
                times, pages = process.cpu_times(), process.memory_info()
                memory += pages.rss - (0 if self.shared_of(process) else pages.shared)
            except psutil.Error:
                continue
            self.last[process.pid] = times.user + times.system
            self.first.setdefault(process.pid, self.last[process.pid] if start else 0.0)
        self.peak_bytes = max(self.peak_bytes, memory)

    def _run(self) -> None:
        while not self.done.wait(0.25):
            self.sample()

    def stop(self) -> float:
        """CPU seconds since the start."""
        self.done.set()
        self.thread.join()
        self.sample()
        return sum(self.last.values()) - sum(self.first.values())


def _with_children(pids: list[int]) -> dict[int, psutil.Process]:
    found: dict[int, psutil.Process] = {}
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):  # what Ray starts and ends by itself
            root = psutil.Process(pid)
            found |= {process.pid: process for process in [root, *root.children(recursive=True)]}
    return found


def measure(system: str, setup: dict[str, Any]) -> dict[str, Any]:
    """One pass over all images, in this process."""
    import torch

    torch.set_num_threads(1)
    stream, sums = batches_of(system, setup), {}
    next(stream)
    is_ray = system == "dpa_ray"
    pids = [os.getpid(), *(setup["ray_pids"] if is_ray else [])]
    meter = Meter(pids, shared_of=lambda process: process.name() == "raylet")
    start, first, count = time.perf_counter(), 0.0, 0
    for names, images in stream:
        first = first or time.perf_counter() - start
        assert images.dtype == np.float32
        for name, image in zip(names, images, strict=True):
            sums[name] = zlib.crc32(np.ascontiguousarray(image[:, ::7, ::5]).tobytes())
        count += len(names)
        if count == setup["num_images"]:
            seconds, cpu_s = time.perf_counter() - start, meter.stop()  # while the workers are there to be read
    assert count == len(sums) == setup["num_images"], f"{system}: {count} images, {len(sums)} different ones"
    return {"seconds": seconds, "first_batch_s": first, "cpu_s": cpu_s, "peak_bytes": meter.peak_bytes, "sums": sums}


def run_apart(system: str, setup: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`measure` in a fresh process."""
    out = folder / "result.pickle"
    command = [sys.executable, "-m", "tests.benchmarks.ingest", "--one", system, "--setup", json.dumps(setup)]
    subprocess.run([*command, "--out", str(out)], check=True, timeout=900)
    result: dict[str, Any] = pickle.loads(out.read_bytes())
    return result


def make_setup(folder: Path, server: S3, num_images: int, workers: int) -> dict[str, Any]:
    """Prepare dpa_ray's shards; returns what every run is told."""
    from dpa_ray.data.encode import Encoder
    from dpa_ray.data.ingest import Loader
    from dpa_ray.data.prepare import prepare
    from dpa_ray.model.image_row import add_image_token
    from dpa_ray.model.tiny import make_tokenizer
    from dpa_ray.recipe import SourceSection
    from dpa_ray.store import Store

    store = Store(f"{server.uri}/store")
    section = SourceSection(source=f"{server.uri}/set.json", images=f"{server.uri}/images", format="llava")
    prepared = prepare(store, section, max_quarantined_fraction=0)
    tokenizer, row = add_image_token(make_tokenizer(["Picture", ".", *"0123456789"]), 512)
    encoder = Encoder(tokenizer, "plain", 1024, 576, row.token_id)
    path = folder / "loader.pickle"
    path.write_bytes(pickle.dumps(Loader(store, prepared, encoder, image_processor(), 0)))
    return {"bucket": server.bucket, "num_images": num_images, "workers": workers, "loader": str(path)}


def start_ray(workers: int) -> dict[str, Any]:
    """Start Ray; returns its address and the processes whose children it all is."""
    import ray

    root = str(Path(__file__).parents[2])
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}}
    ray.init(
        address="local", num_cpus=workers + 1, include_dashboard=False, log_to_driver=False, configure_logging=False,
        runtime_env=environment,
    )  # fmt: skip
    pids = [p.pid for p in psutil.Process().children() if "ray" in " ".join(p.cmdline())]
    return {"ray_pids": pids, "ray": ray.get_runtime_context().gcs_address}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--setup", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        options.out.write_bytes(pickle.dumps(measure(options.one, options.setup)))
        return
    with tempfile.TemporaryDirectory(prefix="dpa-bench-") as temporary:
        folder = Path(temporary)
        (folder / "server").mkdir()
        with running_rclone(folder / "server") as env, fresh_bucket(env, "bench") as server:
            make_files(folder / "files", options.images)
            put_on_s3(folder / "files", server)
            setup = make_setup(folder, server, options.images, options.workers)
            if "dpa_ray" in options.systems:
                setup |= start_ray(options.workers)
            rows = run_rounds(options.systems, setup, folder, options.rounds)
    print(table(rows))
    if options.out:
        options.out.write_text(json.dumps({"rows": rows}, indent=1))


def run_rounds(systems: list[str], setup: dict[str, Any], folder: Path, rounds: int) -> list[dict[str, Any]]:
    if "dpa_ray" in systems:
        run_apart("dpa_ray", setup, folder)  # warms the cluster up
    results: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    expected: dict[str, int] | None = None
    for number in range(rounds):
        turn = number % len(systems)
        for system in [*systems[turn:], *systems[:turn]]:  # nobody always runs after the same one
            result = run_apart(system, setup, folder)
            sums = result.pop("sums")
            expected = expected or sums
            assert sums == expected, f"{system} gives other pixels"
            results[system].append(result)
    return [
        {
            "system": system,
            "images_per_s": [setup["num_images"] / r["seconds"] for r in runs],
            "cpu_s_per_1000": [1000 * r["cpu_s"] / setup["num_images"] for r in runs],
            "first_batch_s": statistics.median(r["first_batch_s"] for r in runs),
            "peak_bytes": max(r["peak_bytes"] for r in runs),
        }
        for system, runs in results.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["system              images/s  CPU s/1000  first batch s  peak MiB   (medians over rounds)"]
    for row in rows:
        rate, cpu = statistics.median(row["images_per_s"]), statistics.median(row["cpu_s_per_1000"])
        peak = row["peak_bytes"] / 2**20
        lines.append(f"{row['system']:18} {rate:9.1f} {cpu:11.2f} {row['first_batch_s']:14.2f} {peak:9.0f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
