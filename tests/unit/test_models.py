"""Is a model that was put together and exported the one that transformers loads?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GraniteConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpa_ray.batch import IMAGE_TOKEN
from dpa_ray.errors import UserError
from dpa_ray.model import vlm
from dpa_ray.model.export import check_same_logits, export, load_exported
from dpa_ray.model.vlm import ModelRef
from tests.random_models import VOCABULARY, make_llm, make_vlm
from tests.small_models import logits_of, put_together

FAMILIES = ["llama", "qwen2", "gemma2", "mistral"]
TOWERS = ["clip", "siglip", "dinov2"]


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_export_and_load_give_the_same_model(
    family: str, tower: str, llm_folder: Callable, tiny_tower: Callable, pictures: list[Any], tmp_path: Path
) -> None:
    """Its logits to the last bits (1e-5: nothing was converted), from what its own processor makes of image and text."""
    whole = put_together(llm_folder(family, bos=family != "qwen2"), tiny_tower(tower))
    export(whole.model, dict(whole.model.state_dict()), whole.processor, tmp_path / "out", torch.float32)
    loaded, processor = load_exported(tmp_path / "out")
    assert type(loaded).__name__ == "LlavaForConditionalGeneration"
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    inner = "vision_model." if tower in ("clip", "siglip") else ""
    assert {n[: len(f"vision_tower.{inner}")] for n in names if "vision_tower" in n} == {f"vision_tower.{inner}"}
    assert {n.partition(".")[0] for n in names} <= {"vision_tower", "multi_modal_projector", "language_model"}

    parts = [{"type": "image"}, {"type": "text", "text": "Which colour is the shape?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    plain = [{"role": "user", "content": f"{IMAGE_TOKEN}\nWhich colour is the shape?"}]
    assert text == whole.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    assert processor.apply_chat_template(plain, add_generation_prompt=True) == text, "content as a string"

    inputs = processor(text=text, images=pictures[0], return_tensors="pt", add_special_tokens=False)
    features = loaded.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    num_features = features.shape[1] - int(tower != "siglip")
    assert int((inputs["input_ids"] == whole.row.token_id).sum()) == num_features == whole.spec.num_image_tokens == 16
    expected, found = logits_of(whole.model, **inputs), logits_of(loaded, **inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    other = processor(text=text, images=pictures[1], return_tensors="pt", add_special_tokens=False)
    assert (logits_of(loaded, **other) - found).abs().max() > 1e-4, "the image is looked at"
    assert loaded.config.tie_word_embeddings == (family == "gemma2")
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == (family == "gemma2")


def test_several_images_in_a_conversation(
    llm_folder: Callable, tiny_tower: Callable, pictures: list[Any], tmp_path: Path
) -> None:
    """Text parts and image parts in their order, each image with its own tokens."""
    whole = put_together(llm_folder("llama"), tiny_tower("clip"))
    image, text = {"type": "image"}, {"type": "text", "text": "and"}
    messages = [
        {"role": "user", "content": [image, text, image]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]
    rendered = whole.processor.apply_chat_template(messages)
    assert f"{IMAGE_TOKEN}\nand{IMAGE_TOKEN}" in rendered
    assert "Yes." in rendered
    assert "Sure?" in rendered
    ids = whole.processor(text=rendered, images=pictures[:2], return_tensors="pt")["input_ids"]
    assert int((ids == whole.row.token_id).sum()) == 2 * whole.spec.num_image_tokens


@pytest.mark.parametrize("reserved", ["token", "none"])
def test_generate_never_emits_the_image_token(
    reserved: str, llm_folder: Callable, tiny_tower: Callable, pictures: list[Any], tmp_path: Path
) -> None:
    """Even where its logit is the largest by far."""
    whole = put_together(llm_folder("llama", reserved=reserved), tiny_tower("clip"))
    inputs = whole.processor(text=f"{IMAGE_TOKEN}\nIt is", images=pictures[0], return_tensors="pt")
    head = whole.model.lm_head.weight
    favourite = int(logits_of(whole.model, **inputs)[0, -1].argmax())
    with torch.no_grad():
        head[whole.row.token_id] = 50 * head[favourite]
    export(whole.model, dict(whole.model.state_dict()), whole.processor, tmp_path / "out", torch.float32)
    loaded, _ = load_exported(tmp_path / "out")
    prompt = inputs["input_ids"].shape[1]
    new = loaded.generate(**inputs, do_sample=False, max_new_tokens=6, min_new_tokens=6)[:, prompt:]
    assert new.shape[1] == 6
    assert whole.row.token_id not in new
    loaded.generation_config.suppress_tokens = None
    assert whole.row.token_id in loaded.generate(**inputs, do_sample=False, max_new_tokens=6)[:, prompt:]


def test_frozen_modules_are_exported_bit_for_bit(llm_folder: Callable, tiny_tower: Callable, tmp_path: Path) -> None:
    """In the dtype of their source, under whatever dtype the model is loaded as."""
    source = tmp_path / "tower"
    shutil.copytree(tiny_tower("siglip"), source)
    halves = {name: t.bfloat16() for name, t in load_file(source / "model.safetensors").items()}
    save_file(halves, source / "model.safetensors", {"format": "pt"})
    whole = put_together(llm_folder("mistral"), source, tower_dtype="auto")
    export(whole.model, dict(whole.model.state_dict()), whole.processor, tmp_path / "out", torch.float32)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    tower = {name: t for name, t in exported.items() if "vision_tower" in name}
    found = {name.split("vision_tower.")[1].removeprefix("vision_model."): t for name, t in tower.items()}
    expected = {n.removeprefix("vision_model."): t for n, t in halves.items() if n.startswith("vision_model.")}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.bfloat16, name
        assert torch.equal(found[name], tensor), name
    llm = load_file(llm_folder("mistral") / "model.safetensors")
    for name in ("layers.0.self_attn.q_proj.weight", "layers.1.mlp.down_proj.weight", "norm.weight"):
        match = [
            t
            for key, t in exported.items()
            if key.endswith(f"language_model.{name}") or key.endswith(f"language_model.model.{name}")
        ]
        assert len(match) == 1, name
        assert torch.equal(match[0], llm[f"model.{name}"]), name
    loaded, _ = load_exported(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.lm_head.weight[:-1], llm["lm_head.weight"]), "nothing of it went through bf16"


def test_the_connector_comes_from_the_seed_alone(llm_folder: Callable, tiny_tower: Callable) -> None:
    """Neither from the global RNG, nor does it move that."""

    def connector(seed: int, global_seed: int) -> list[Tensor]:
        whole = put_together(llm_folder("llama"), tiny_tower("clip"))
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        model = vlm.assemble(
            *(_LlmLike(whole.model), whole.model.model.vision_tower, whole.spec, whole.row),
            dtype=torch.float32,
            seed=seed,
        )
        assert torch.equal(torch.get_rng_state(), state)
        return [p.detach().clone() for p in model.model.multi_modal_projector.parameters()]

    first, same, other = connector(1, 0), connector(1, 99), connector(2, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert [tuple(p.shape) for p in first] == [(48, 32), (48,), (48, 48), (48,)]


class _LlmLike:
    """The causal LLM inside a LLaVA model, as `assemble` asks for one."""

    def __init__(self, whole: Any):
        self.config = whole.config.text_config
        self.base_model = whole.model.language_model
        self.generation_config = whole.generation_config
        self.get_output_embeddings = whole.get_output_embeddings


def test_other_logits_are_noticed() -> None:
    """Rounding is not; NaN is."""
    logits = torch.randn(8, 20, generator=torch.Generator().manual_seed(0)) * 3
    assert check_same_logits(logits, logits + 1e-5) == pytest.approx(1e-5, rel=0.1)
    check_same_logits(logits.bfloat16(), logits)
    for other in (logits + 0.1, logits.clone().index_fill_(0, torch.tensor([2]), torch.nan)):
        with pytest.raises(UserError, match="does not give the trained model's logits: largest difference"):
            check_same_logits(logits, other)


def test_a_head_that_llava_cannot_hold_is_refused() -> None:
    """Logits that are scaled after the head (Granite), or a head with a bias."""
    vlm.check_head(make_llm("gemma2"))
    vlm.check_head(make_llm("llama", tie_word_embeddings=True))
    scaled = AutoModelForCausalLM.from_config(
        GraniteConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, logits_scaling=8.0, initializer_range=0.3, pad_token_id=0,
        )
    )  # fmt: skip
    with pytest.raises(UserError, match="of type granite: its logits are not its head's output"):
        vlm.check_head(scaled)
    biased = make_llm("llama")
    biased.lm_head = torch.nn.Linear(32, VOCABULARY)
    with pytest.raises(UserError, match="expected a head that is one matrix without bias"):
        vlm.check_head(biased)


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "eager"), ("llama", "flex_attention"), ("gemma2", None), ("gemma2", "flex_attention")],
)
def test_the_model_put_together_has_the_llms_attention(family: str, attention: str | None) -> None:
    """And the tower its own."""
    whole = make_vlm(family, attention=attention)
    expected = make_llm(family, attention=attention).config._attn_implementation
    assert attention in (None, expected)
    assert whole.model.language_model.config._attn_implementation == expected
    assert {layer.self_attn.config._attn_implementation for layer in whole.model.language_model.layers} == {expected}
    assert whole.model.vision_tower.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("odd", "samples"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, True),
        ({"pad_token_id": -1}, False),
        ({"top_k": 5, "pad_token_id": -1}, True),
        ({"temperature": 0.0, "do_sample": False}, False),
        ({"top_p": 0.0}, False),
    ],
)
def test_an_odd_generation_config_does_not_break_the_export(
    odd: dict[str, Any], samples: bool, llm_folder: Callable, tiny_tower: Callable, tmp_path: Path
) -> None:
    """Vicuna's, for one: transformers reads it, and refuses to write it."""
    folder = tmp_path / "llm"
    shutil.copytree(llm_folder("llama"), folder)
    (folder / "generation_config.json").write_text(json.dumps(odd))
    whole = put_together(folder, tiny_tower("clip"))
    export(whole.model, dict(whole.model.state_dict()), whole.processor, tmp_path / "out", torch.float32)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written.get("do_sample", False) == samples
    assert {name: written.get(name) for name in odd if samples and name != "pad_token_id"}.items() <= odd.items()
    assert written.get("pad_token_id") != -1


def test_a_generation_config_that_cannot_be_written_is_told_before_training(
    llm_folder: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(llm_folder("llama"), folder)
    (folder / "generation_config.json").write_text(json.dumps({"num_beams": 1, "early_stopping": True}))
    with pytest.raises(UserError, match=r"generation_config.json that transformers can write .*early_stopping"):
        vlm.load_llm(ModelRef(str(folder)), torch.float32)


def test_a_head_is_checked_where_the_llms_own_kernel_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked at on the CPU, before training on a GPU with flash attention."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a kernel for GPUs was given a tensor on the CPU")

    llm = make_llm("llama")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", refuse)
    assert llm.config._attn_implementation == "sdpa"
    vlm.check_head(llm)
    assert llm.config._attn_implementation == "sdpa"


def test_disabled_dropout_is_off_in_train_mode() -> None:
    llm = make_llm("llama", attention_dropout=0.5)
    ids = torch.arange(VOCABULARY).unsqueeze(0)
    expected = logits_of(llm, input_ids=ids)
    assert not torch.equal(logits_of(llm.train(), input_ids=ids), expected)
    vlm.disable_dropout(llm)
    assert torch.equal(logits_of(llm, input_ids=ids), expected)
    assert llm.training, "train mode is what turns gradient checkpointing on"


def test_what_is_no_language_model_is_told(tiny_tower: Callable, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a decoder LLM, found model type clip"):
        vlm.load_llm_config(ModelRef(str(tiny_tower("clip"))))
    with pytest.raises(UserError, match="no readable config.json"):
        vlm.load_llm_config(ModelRef(str(tmp_path)))
