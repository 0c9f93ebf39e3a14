"""Does the whole job work on real input? A real LLM and tower, real pictures and texts, a real S3 server, two workers.

SmolLM2-135M behind DINOv2-S at 112 px; captions of the tuxpaint stamps for stages 1 and 2, easy-vqa for stage 3; images,
data files and store in buckets; ZeRO-2, global batch 8, 10 steps a stage. About 5 minutes on two cores.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.integration.runs import STAGES, Run, run_dpa
from tests.real_assets import RealAssets, subset
from tests.s3 import S3

pytestmark = pytest.mark.ci

NUM_STEPS, GLOBAL_BATCH_SIZE = 10, 8
NUM_SAMPLES = NUM_STEPS * GLOBAL_BATCH_SIZE + 5
LEARNING_RATES = {"proxy_llm": 1.0e-3, "proxy_mllm": 2.0e-3, "instruct": 1.0e-4}
TIMEOUT_S = 1800


@pytest.fixture
def s3(request: pytest.FixtureRequest) -> S3:
    """Ceph's S3, or rclone's (with a warning) on a machine where Ceph's packages cannot be had."""
    try:
        server = request.getfixturevalue("ceph_s3")
    except AssertionError as reason:
        warnings.warn(f"no Ceph, rclone instead: {reason}", stacklevel=1)
        server = request.getfixturevalue("rclone_s3")
    return server


def upload(s3: S3, folder: Path, prefix: str) -> str:
    client = s3.client()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            client.upload_file(str(file), s3.bucket, f"{prefix}/{file.relative_to(folder)}")
    return f"{s3.uri}/{prefix}"


def download(s3: S3, prefix: str, folder: Path) -> Path:
    for key in s3.keys():  # noqa: SIM118 (not a mapping)
        if key.startswith(f"{prefix}/"):
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            s3.client().download_file(s3.bucket, key, str(folder / key))
    return folder / prefix


def make_recipe(real: RealAssets, captions: str, questions: str) -> dict[str, Any]:
    stages = {
        stage: {
            "lr": lr, "global_batch_size": GLOBAL_BATCH_SIZE, "micro_batch_size": 4, "max_length": 256,
            "max_steps": NUM_STEPS, "gradient_checkpointing": False,
        }
        for stage, lr in LEARNING_RATES.items()
    }  # fmt: skip
    stages["proxy_llm"]["lora"] = {"rank": 16, "alpha": 32}
    sources = {"pretrain": captions, "instruct": questions}
    return {
        "method": "dpa",
        "model": {"llm": str(real.smollm2), "vision": str(real.dinov2), "vision_layer": -4, "image_size": 112},
        "data": {
            name: {"source": f"{uri}/data.json", "images": f"{uri}/images", "format": "llava"}
            for name, uri in sources.items()
        },
        "stages": stages,
        "precision": "fp32",
        "deepspeed": {"zero_stage": 2},
        "cluster": {"workers": 2, "gpus_per_worker": 0},
        "debug": {"record_samples": True},
        "seed": 0,
    }


def test_real_input_over_s3(s3: S3, real: RealAssets, tmp_path: Path) -> None:
    captions = subset(real.stamps / "captions.json", NUM_SAMPLES, tmp_path / "captions")
    questions = subset(real.easy_vqa / "train.json", NUM_SAMPLES, tmp_path / "questions")
    recipe = make_recipe(real, upload(s3, captions, "stamps"), upload(s3, questions, "easy-vqa"))
    run = run_dpa(recipe, f"{s3.uri}/dpa", "real", env=s3.env, timeout_s=TIMEOUT_S, folder=tmp_path)
    assert run.returncode == 0, run.output

    files = download(s3, "dpa/runs/real", tmp_path / "result")
    result = Run(**{**vars(run), "store": tmp_path / "result" / "dpa"})
    for stage in STAGES:
        nll = [line["nll_mean"] for line in result.metrics(stage)]
        assert len(nll) == NUM_STEPS, stage
        assert sum(nll[-3:]) < sum(nll[:3]), f"{stage}: {nll}"

    model = AutoModelForImageTextToText.from_pretrained(files / "model", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(files / "model")
    picture = Image.open(sorted((questions / "images").rglob("*.png"))[0])
    content = [{"type": "image"}, {"type": "text", "text": "What shape does the image contain?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=picture, text=text, return_tensors="pt")
    assert inputs["input_ids"].eq(processor.image_token_id).sum() == (112 // 14) ** 2
    made = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(made, skip_special_tokens=True).strip()
    assert processor.image_token_id not in made.tolist()

    # the second time everything is there
    again = run_dpa(recipe, f"{s3.uri}/dpa", "real", env=s3.env, timeout_s=120, folder=tmp_path)
    assert again.returncode == 0, again.output
    download(s3, "dpa/runs/real", tmp_path / "again")
    result = Run(**{**vars(again), "store": tmp_path / "again" / "dpa"})
    assert all(line["reused"] for stage in STAGES for line in result.metrics(stage))
