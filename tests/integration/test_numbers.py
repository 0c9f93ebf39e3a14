"""Does a run whose numbers go wrong stop, say which sample it is, and go on without it by what it says?"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from dpa_ray.data import wire
from tests import tiny_models
from tests.integration.runs import STAGES, Run, losses, make_recipe, run_dpa
from tests.tiny_models import LlavaData

RARE = "~"
"""A character that stands in two samples, whose token the model has no finite embedding for."""


@pytest.fixture
def poisoned_llm(tmp_path: Path, tiny_llm: Callable[..., Path]) -> Path:
    """A Llama with an infinite row, as a fine-tune that once diverged leaves it for a token that it hardly ever saw."""
    folder = shutil.copytree(tiny_llm("llama", bos=True), tmp_path / "llm")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(RARE)] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_rare(data: LlavaData, identity: str) -> LlavaData:
    """The same, with RARE at the end of one sample's first answer."""
    samples = json.loads(data.file.read_text())
    (sample,) = [sample for sample in samples if sample["id"] == identity]
    sample["conversations"][1]["value"] += f" {RARE}"
    return tiny_models.write_llava(data.file.parent, samples)


def remedy(run: Run) -> str:
    """The argument that the message says to add."""
    return re.search(r"run the same command with '(data\.skip_ids=\S.*?\])'", run.stderr)[1]  # type: ignore[index]


@pytest.mark.ci
def test_a_sample_that_gives_no_number_is_named_and_the_run_goes_on_without_it(
    tmp_path: Path, poisoned_llm: Path, tiny_tower: Callable[..., Path]
) -> None:
    """In stage 1, by ZeRO-2 on two workers; then the caption is nobody's trouble any more (nor of the job that computes
    q), and in stage 3 the other one is told."""
    captions = with_rare(tiny_models.make_captions(tmp_path / "captions", 12, text_only=(3,)), "c5")
    talks = with_rare(tiny_models.make_conversations(tmp_path / "talks", 12, text_only=(2,)), "q7")
    recipe = make_recipe(poisoned_llm, tiny_tower("clip"), captions, talks, cluster__workers=2)
    for stage, lr in zip(STAGES, (2.0e-3, 2.0e-3, 5.0e-4), strict=True):
        recipe["stages"][stage]["lr"] = lr
    store, arguments = tmp_path / "store", list[str]()
    for stage, identity in (("proxy_llm", "c5"), ("instruct", "q7")):
        run = run_dpa(recipe, store, "run", *arguments)
        assert run.returncode == 1, run.output
        assert f"stage {stage}, step " in run.stderr
        assert (
            "the loss is not finite; this step changed nothing. Of its 4 samples, these give that alone: " in run.stderr
        )
        assert f"alone: {identity} (row {identity[1:]}, " in run.stderr, run.output
        assert "Traceback" not in run.stderr
        assert run.info()["status"] == "failed"
        (folder,) = run.folder.glob(f"failures/{stage}-step-*")
        record = json.loads((folder / "failure.json").read_text())
        assert {sample["rank"] for sample in record["samples"]} == {0, 1}
        assert len(record["samples"]) == 4
        assert [sample["id"] for sample in record["samples"] if sample["finite"] is False] == [identity]
        assert [line["step"] for line in record["metrics"]] == [*range(1, record["step"])]
        batch = wire.loads(((folder / "batch.safetensors").read_bytes(), json.dumps(record["batch"]["fields"])))
        assert identity in batch.ids
        arguments = [remedy(run)]
    run = run_dpa(recipe, store, "run", *arguments)
    assert run.returncode == 0, run.output
    assert run.info()["recipe"]["data"]["skip_ids"] == record["skip_ids"]
    for stage in STAGES:
        assert sum(losses(run, stage, "num_skipped")) == 1, stage
        assert all(line["loss"] is not None for line in run.metrics(stage))
        assert sorted(sum(run.samples(stage).values(), [])) == sorted(
            s["id"] for s in (talks if stage == "instruct" else captions).samples
        )
    for stage in ("proxy_llm", "proxy_mllm"):
        assert run.info()["timings"][stage]["reused"], "what does not take the conversation is not made again"
    lines = [json.loads(line) for line in (run.folder / "quarantine.jsonl").read_text().splitlines()]
    assert {(line["stage"], line["id"]) for line in lines if line["reason"] == "skipped"} >= {("instruct", "q7")}
    model = load_file(run.model / "model.safetensors")
    assert sum(not bool(tensor.isfinite().all()) for tensor in model.values()) == 1, "the row that came so"
