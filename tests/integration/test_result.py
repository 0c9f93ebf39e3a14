"""Is what a run leaves usable by transformers alone? Model, processor, chat template, generation; and is it ever made twice?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.integration.runs import STAGES, Run, make_recipe, run_dpa, tree
from tests.parity.encoding import IMAGE, encode, preprocess
from tests.tiny_models import LlavaData

DATE = "26 Jul 2024"
QUESTION = "What shape is it?"


def load(run: Run) -> tuple[Any, Any]:
    return AutoModelForImageTextToText.from_pretrained(run.model, dtype=torch.float32), AutoProcessor.from_pretrained(
        run.model
    )


def prompt(*, images: int = 1, as_text: bool = False) -> list[dict[str, Any]]:
    content: Any = [{"type": "image"}] * images + [{"type": "text", "text": QUESTION}]
    if as_text:
        content = "<image>\n" * images + QUESTION
    return [{"role": "user", "content": content}]


def check_result(run: Run, data: LlavaData) -> None:
    """Everything that a user of runs/<name>/model may lean on."""
    model, processor = load(run)
    image_id = processor.image_token_id
    assert model.config.image_token_id == image_id
    sample = {"conversations": [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "star"}]}
    for name in sorted(data.images.iterdir())[:5]:  # wide, tall, grey, with alpha
        picture = Image.open(name)
        text = processor.apply_chat_template(prompt(), add_generation_prompt=True, date_string=DATE)
        assert text.count("<image>") == 1
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", date_string=DATE,
        )  # fmt: skip
        features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        count = sum(len(f) for f in features)
        ids = inputs["input_ids"][0].tolist()
        assert ids.count(image_id) == count > 0, "as many image tokens as the tower gives features"
        # the prompt is what training showed: same ids, BOS once or never, same pixels
        trained = encode(processor.tokenizer, {**sample, "image": name.name}, "chat", count, 10_000, DATE)
        assert ids == [image_id if token == IMAGE else token for token in trained.ids[: trained.targets[0]]]
        tower = json.loads((Path(run.recipe["model"]["vision"]) / "preprocessor_config.json").read_text())
        np.testing.assert_allclose(inputs["pixel_values"][0].numpy(), preprocess(name, "pad", tower), atol=1e-5)
        assert torch.isfinite(model(**inputs).logits).all()
        assert processor.apply_chat_template(prompt(as_text=True), add_generation_prompt=True, date_string=DATE) == text


def check_never_generates_the_placeholder(run: Run, data: LlavaData) -> None:
    """Even where its logit is by far the largest: its row of the head is made to point at what the head is given."""
    model, processor = load(run)
    picture = Image.open(sorted(data.images.iterdir())[0])
    text = processor.apply_chat_template(prompt(), add_generation_prompt=True, date_string=DATE)
    inputs = processor(images=picture, text=text, return_tensors="pt")
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state[0, -1]
        model.lm_head.weight[processor.image_token_id] = 1e4 * hidden / hidden.norm() ** 2
        assert model(**inputs).logits[0, -1].argmax() == processor.image_token_id
    for options in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 2, "do_sample": False}):
        made = model.generate(**inputs, max_new_tokens=12, **options)[0, inputs["input_ids"].shape[1] :]
        assert len(made) > 0
        assert processor.image_token_id not in made.tolist(), options


def test_result_is_usable_by_transformers_alone(measured: Run, conversations: LlavaData) -> None:
    check_result(measured, conversations)


def test_placeholder_is_never_generated(measured: Run, conversations: LlavaData) -> None:
    check_never_generates_the_placeholder(measured, conversations)


def test_a_reserved_row_is_used_where_there_is_one(measured: Run) -> None:
    config = json.loads((Path(measured.recipe["model"]["llm"]) / "config.json").read_text())
    model, processor = load(measured)
    assert model.config.text_config.vocab_size == config["vocab_size"], "no row appended"
    assert processor.image_token_id < config["vocab_size"]


def test_two_images_and_none(measured: Run, conversations: LlavaData) -> None:
    model, processor = load(measured)
    pictures = [Image.open(f) for f in sorted(conversations.images.iterdir())[:2]]
    text = processor.apply_chat_template(prompt(images=2), add_generation_prompt=True, date_string=DATE)
    inputs = processor(images=pictures, text=text, return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()
    text = processor.apply_chat_template(prompt(images=0), add_generation_prompt=True, date_string=DATE)
    assert "<image>" not in text
    inputs = processor(text=text, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=4).shape[1] > inputs["input_ids"].shape[1]


def test_run_folder_holds_what_the_architecture_says(measured: Run) -> None:
    info = measured.info()
    for stage in STAGES:
        path = info["artifacts"][stage.replace("_", "-")]["path"]
        assert (measured.store / path).resolve() == measured.artifact(stage).resolve()
    keys = {
        "stage", "step", "epoch", "num_samples", "num_tokens", "num_targets", "loss", "lr", "grad_norm", "weight_mean",
        "nll_mean", "step_time_s", "data_wait_s", "tokens_per_s",
    }  # fmt: skip
    for stage in STAGES:
        lines = measured.metrics(stage)
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert all(keys <= line.keys() for line in lines)
    assert not [f for f in measured.store.rglob("*") if f.suffix in (".pkl", ".pt", ".bin", ".pickle")], "no pickles"


def test_second_run_reuses_everything(measured: Run) -> None:
    artifacts = [f for f in tree(measured.store) if f.startswith(("artifacts", "data"))]
    again = run_dpa(measured.recipe, measured.store, "again", timeout_s=60)
    assert again.returncode == 0, again.output
    assert [f for f in tree(measured.store) if f.startswith(("artifacts", "data"))] == artifacts
    for stage in STAGES:
        lines = again.metrics(stage)
        assert all(line["reused"] is True for line in lines)
        first = [{k: v for k, v in line.items() if k != "reused"} for line in measured.metrics(stage)]
        assert [{k: v for k, v in line.items() if k != "reused"} for line in lines] == first
    ours, theirs = ((run.model / "model.safetensors").read_bytes() for run in (again, measured))
    assert ours == theirs


@pytest.mark.full
def test_same_name_and_recipe_again_is_the_same_run(measured: Run, tmp_path: Path) -> None:
    before = [line for stage in STAGES for line in measured.metrics(stage)]
    shutil.copytree(measured.store, tmp_path / "store")
    again = run_dpa(measured.recipe, tmp_path / "store", measured.name, timeout_s=60)
    assert again.returncode == 0, again.output
    after = [line for stage in STAGES for line in again.metrics(stage)]
    numbers = [[(line["stage"], line["step"], line["loss"]) for line in lines] for lines in (before, after)]
    assert numbers[0] == numbers[1], "one line per stage and step, not two"


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "options", "tower", "changes"),
    [
        ("llama", {"bos": False, "reserved": "none"}, "dinov2", {"stages__instruct__lr": 1e-3}),
        ("qwen2", {"bos": False, "reserved": "row", "tied": True}, "siglip", {"model__vision_layer": -3}),
        ("gemma2", {"bos": True, "reserved": "none"}, "clip", {"deepspeed__zero_stage": 3, "cluster__workers": 2}),
        ("mistral", {"bos": True, "reserved": "none"}, "dinov2", {"stages__instruct__llm": "lora"}),
    ],
    ids=["llama", "qwen2", "gemma2", "mistral"],
)
def test_results_of_other_models(
    family: str, options: dict[str, Any], tower: str, changes: dict[str, Any], tmp_path: Path,
    tiny_llm: Callable, tiny_tower: Callable, captions: LlavaData, conversations: LlavaData,
) -> None:  # fmt: skip
    """A row appended to tied and untied heads, one beyond the tokenizer, every tower."""
    recipe = make_recipe(tiny_llm(family, **options), tiny_tower(tower), captions, conversations, **changes)
    run = run_dpa(recipe, tmp_path / "store", "result")
    assert run.returncode == 0, run.output
    check_result(run, conversations)
    check_never_generates_the_placeholder(run, conversations)
    for stage in ("proxy_mllm", "instruct"):
        assert len((run.artifact(stage) / "examples.jsonl").read_text().splitlines()) == 8, (
            "ZeRO-3 gathers for them too"
        )
