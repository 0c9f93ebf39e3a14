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


def with_rare(data: LlavaData, identity: str) -> None:
    """Put RARE at the end of one sample's first answer."""
    samples = json.loads(data.file.read_text())
    (sample,) = [sample for sample in samples if sample["id"] == identity]
    sample["conversations"][1]["value"] += f" {RARE}"
    tiny_models.write_llava(data.file.parent, samples)


def remedy(run: Run) -> str:
    """The argument that the message says to add."""
    return re.search(r"run the same command with '(data\.skip_ids=\S.*?\])'", run.stderr)[1]  # type: ignore[index]


Place = tuple[str, str]
"""A stage, and the id of the sample that it fails of."""


@pytest.mark.parametrize(
    "places",
    [
        pytest.param([("instruct", "q7")], marks=pytest.mark.ci),
        pytest.param([("proxy_llm", "c5"), ("instruct", "q7")], marks=pytest.mark.full),
    ],
    ids=["stage 3", "stages 1 and 3"],
)
def test_a_sample_that_gives_no_number_is_named_and_the_run_goes_on_without_it(
    places: list[Place], tmp_path: Path, poisoned_llm: Path, tiny_tower: Callable[..., Path]
) -> None:
    """By ZeRO-2 on two workers. The conversation is told in stage 3; a caption in stage 1, and once it is skipped, it is
    no trouble to the job that computes q or to stage 2 either. What does not take the sample is not made again."""
    captions = tiny_models.make_captions(tmp_path / "captions", 12, text_only=(3,))
    talks = tiny_models.make_conversations(tmp_path / "talks", 12, text_only=(2,))
    for stage, identity in places:
        with_rare(talks if stage == "instruct" else captions, identity)
    recipe = make_recipe(poisoned_llm, tiny_tower("clip"), captions, talks, cluster__workers=2)
    for stage, lr in zip(STAGES, (2.0e-3, 2.0e-3, 5.0e-4), strict=True):
        recipe["stages"][stage]["lr"] = lr
    arguments: list[str] = []
    for stage, identity in places:
        run = run_dpa(recipe, tmp_path / "store", "run", *arguments)
        check_failed(run, stage, identity)
        arguments = [remedy(run)]
    run = run_dpa(recipe, tmp_path / "store", "run", *arguments)
    assert run.returncode == 0, run.output
    assert len(run.info()["recipe"]["data"]["skip_ids"]) == len(places)
    for stage in STAGES:
        of_captions = [identity for failed, identity in places if failed != "instruct"]
        skipped = ["q7"] if stage == "instruct" else of_captions
        assert sum(losses(run, stage, "num_skipped")) == len(skipped), stage
        assert all(line["loss"] is not None for line in run.metrics(stage))
        taken = sum(run.samples(stage).values(), [])
        assert sorted(taken) == sorted((talks if stage == "instruct" else captions).samples)
        lines = [json.loads(line) for line in (run.folder / "quarantine.jsonl").read_text().splitlines()]
        assert [n["id"] for n in lines if (n["stage"], n["reason"]) == (stage, "skipped")] == skipped
        assert run.info()["timings"][stage]["reused"] == (stage != "instruct")
    model = load_file(run.model / "model.safetensors")
    assert sum(not bool(tensor.isfinite().all()) for tensor in model.values()) == 1, "the row that came so"


def check_failed(run: Run, stage: str, identity: str) -> None:
    """It ended before that step's update, named the sample, and kept what is needed to look into it."""
    assert run.returncode == 1, run.output
    assert "Traceback" not in run.stderr
    assert re.search(rf"stage {stage}, step \d+: the loss is not finite; this step changed nothing", run.stderr)
    assert f"Of its 4 samples, these give that alone: {identity} (row {identity[1:]}, " in run.stderr, run.output
    assert run.info()["status"] == "failed"
    (folder,) = run.folder.glob(f"failures/{stage}-step-*")
    assert str(folder) in run.stderr
    record = json.loads((folder / "failure.json").read_text())
    assert {sample["rank"] for sample in record["samples"]} == {0, 1}
    assert len(record["samples"]) == 4
    assert [sample["id"] for sample in record["samples"] if sample["finite"] is False] == [identity]
    assert [line["step"] for line in record["metrics"]] == [*range(1, record["step"])]
    batch = wire.loads(((folder / "batch.safetensors").read_bytes(), json.dumps(record["batch"]["fields"])))
    assert identity in batch.ids
