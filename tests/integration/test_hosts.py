"""Does a stage run across hosts, and outlive one that is cut off? Hosts with addresses of their own, a bridge between them,
S3 on one more; nothing is shared but files that every host would have (models and data).
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from tests import hosts, image, tiny_models
from tests.hosts import PORT, Host
from tests.integration.runs import STAGES, Run, Running, losses, make_recipe, start_dpa
from tests.s3 import KEY, SECRET, environment, rclone_process

WHY_NOT = hosts.missing()
pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(WHY_NOT), reason=f"no network namespaces: {WHY_NOT}")]

BUCKET, S3_PORT = "hosts", 9101
NUM_STEPS = 60


@dataclasses.dataclass(frozen=True)
class Site:
    """Hosts `head`, `one` and `two` with Ray, `s3` with a bucket; what a driver's environment is."""

    hosts: dict[str, Host]
    env: dict[str, str]
    bucket: Path  # the bucket's files

    def start(self, recipe: dict[str, Any], folder: Path) -> Running:
        """The main job on the head; its results are read as the server's own files."""
        prefix = self.hosts["head"].enter
        running = start_dpa(recipe, f"s3://{BUCKET}/dpa", "run", env=self.env, folder=folder, prefix=prefix)
        running.run = dataclasses.replace(running.run, store=self.bucket / "dpa")
        return running


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with hosts.network(tmp_path / "hosts", ["head", "one", "two", "s3"]) as there:
        s3, head = there["s3"], there["head"]
        (tmp_path / "s3" / "data").mkdir(parents=True)
        s3.processes.append(rclone_process(tmp_path / "s3", S3_PORT, s3.address, s3.enter))
        aws = environment(S3_PORT, s3.address)
        client = boto3.client(
            "s3", endpoint_url=aws["AWS_ENDPOINT_URL"], aws_access_key_id=KEY, aws_secret_access_key=SECRET,
            region_name=aws["AWS_REGION"],
        )  # fmt: skip
        client.create_bucket(Bucket=BUCKET)
        env = {
            **os.environ,
            **image.ray_settings(),
            **aws,
            "RAY_AUTH_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        env["PYTHONPATH"] = str(hosts.ROOT)
        for name, cpus in (("head", 0), ("one", 2), ("two", 2)):
            own = {**env, "DPA_RAY_CACHE": str(tmp_path / "cache" / name)}
            there[name].start_ray(head, own, tmp_path / "hosts", f"--num-cpus={cpus}")
        aws |= {"RAY_ADDRESS": f"{head.address}:{PORT}", "RAY_AUTH_MODE": "disabled"}
        yield Site(there, aws, tmp_path / "s3" / "data" / BUCKET)


@pytest.fixture(scope="module")
def recipe(assets_dir: Path, tiny_llm: Callable, tiny_tower: Callable) -> Callable[..., dict[str, Any]]:
    folder = assets_dir / "hosts"
    data = (
        tiny_models.make_captions(folder / "captions", 45, text_only=(4, 20), seed=5),
        tiny_models.make_conversations(folder / "conversations", 45, text_only=(7, 30), seed=6),
    )

    def make(**cluster: Any) -> dict[str, Any]:
        made = make_recipe(tiny_llm("llama", bos=True), tiny_tower("clip"), *data, method="vanilla")
        made["checkpoint"] = {"every_steps": 2}
        made["cluster"] = {"workers": 2, "gpus_per_worker": 0, "cpus_per_worker": 1.5, **cluster}
        for stage, steps in zip(STAGES, (2, NUM_STEPS, 4), strict=True):
            made["stages"][stage] |= {"lr": 1e-3, "global_batch_size": 8, "epochs": 100, "max_steps": steps}
        return made

    return make


def assert_same(run: Run, expected: Run) -> None:
    assert run.returncode == 0, run.output
    for stage in STAGES[1:]:
        assert run.samples(stage) == expected.samples(stage), stage
        assert losses(run, stage) == pytest.approx(losses(expected, stage), rel=1e-5), stage


def test_a_stage_runs_across_hosts_and_goes_on_when_one_is_cut_off(
    tmp_path: Path, site: Site, recipe: Callable[..., dict[str, Any]]
) -> None:
    """Nothing tells the others: the link is down, and what was on its way never comes. What is left is one worker."""
    begun = time.monotonic()
    running = site.start(recipe(workers={"min": 1, "max": 2}), tmp_path / "job")
    running.wait_for("proxy_mllm", 6)
    cut = time.monotonic()
    print(f"{cut - begun:.0f} s to the sixth step on two hosts", file=sys.stderr)
    site.hosts["two"].cut()
    last = int(running.run.metrics("proxy_mllm")[-1]["step"])
    running.wait_for("proxy_mllm", last + 6, timeout_s=400)
    print(f"one cut off: {time.monotonic() - cut:.0f} s to the sixth step after", file=sys.stderr)
    run = running.finished()
    print(f"{time.monotonic() - begun:.0f} s in all", file=sys.stderr)
    assert "saved by 2 workers, on 1" in run.stdout, run.output
    whole = start_dpa(recipe(), tmp_path / "whole" / "store", "run").finished()
    assert whole.returncode == 0, whole.output
    assert_same(run, whole)
