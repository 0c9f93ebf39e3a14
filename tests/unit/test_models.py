"""Are the models put together, adapted, imported and exported so that nothing of them changes on the way?"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, GraniteConfig

from dpa_ray.batch import IMAGE_TOKEN
from dpa_ray.errors import UserError
from dpa_ray.model import lora, vlm
from dpa_ray.model.export import check_same_logits, export, load_exported, processor_for
from dpa_ray.model.image_row import RESERVED, ImageRow, add_image_token, load_tokenizer
from dpa_ray.model.tower import TowerSpec, image_processor, tower_spec
from dpa_ray.model.vlm import ModelRef
from tests.random_models import VOCABULARY, make_llm
from tests.tiny_models import make_images, make_tokenizer

FAMILIES = ["llama", "qwen2", "gemma2", "mistral"]
TOWERS = ["clip", "siglip", "dinov2"]


@pytest.fixture(scope="session")
def llm_folder(tiny_llm: Callable[..., Path]) -> Callable[..., Path]:
    """Hardly fitted: here no probability matters."""
    return lambda family, **options: tiny_llm(family, num_steps=1, **options)


@dataclass
class Whole:
    """A LLaVA model put together from two folders, and what belongs to it."""

    model: Any
    tokenizer: Any
    row: ImageRow
    spec: TowerSpec
    processor: Any


def put_together(
    llm_folder: Path, tower_folder: Path, *, tower_dtype: Any = torch.float32, image_size: int | None = None
) -> Whole:
    ref, tower_ref = ModelRef(str(llm_folder)), ModelRef(str(tower_folder))
    tokenizer, row = add_image_token(load_tokenizer(ref), vlm.load_llm_config(ref).vocab_size)
    llm = vlm.load_llm(ref, torch.float32)
    spec = tower_spec(tower_ref, -2, image_size)
    vlm.append_image_row(llm, row)
    model = vlm.assemble(llm, vlm.load_tower(tower_ref, tower_dtype), spec, row, dtype=torch.float32, seed=0).eval()
    processor = processor_for(tokenizer, image_processor(tower_ref, spec, "pad"), spec)
    return Whole(model, tokenizer, row, spec, processor)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Wide, high, grey and with alpha."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    opened = [Image.open(folder / name) for name in make_images(folder, 6)]
    assert {p.mode for p in opened} >= {"RGB", "L", "RGBA"}
    assert {p.width > p.height for p in opened} == {True, False}
    return opened


@torch.no_grad()
def logits_of(model: Any, **inputs: Any) -> Tensor:
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


# The image row


def with_rows(tokenizer: Any, num_rows: int) -> tuple[Any, ImageRow]:
    return add_image_token(tokenizer, num_rows)


def test_a_reserved_token_becomes_the_image_token() -> None:
    """Under its old id; no other text is encoded otherwise, and the tokenizer's size is what it was."""
    before = make_tokenizer("llama", bos=True, reserved="token")
    reserved = before.convert_tokens_to_ids("<|reserved_special_token_0|>")
    text = "On the left there is a <|eot_id|> truly marvellous red square."
    expected = before(text)["input_ids"]
    tokenizer, row = add_image_token(before, len(before))
    assert row == ImageRow(reserved, len(before), "<|reserved_special_token_0|>")
    assert not row.appended
    assert row.num_softmax_rows is None
    assert len(tokenizer) == len(before)
    assert tokenizer(f"a{IMAGE_TOKEN}b", add_special_tokens=False)["input_ids"].count(reserved) == 1
    assert tokenizer(text)["input_ids"] == expected
    assert "<|reserved_special_token_0|>" not in tokenizer.get_vocab()
    assert tokenizer.decode([reserved]) == IMAGE_TOKEN
    assert tokenizer.decode([*expected, reserved], skip_special_tokens=True).endswith("square.")
    assert tokenizer.chat_template == before.chat_template


def test_an_unused_row_of_the_embedding_becomes_the_image_token() -> None:
    tokenizer = make_tokenizer("qwen2", bos=False)
    size = len(tokenizer)
    tokenizer, row = add_image_token(tokenizer, size + 5)
    assert (row.token_id, row.appended, row.num_softmax_rows) == (size, False, None)
    assert list(row.appended_ids) == []


def test_without_a_spare_row_one_is_appended() -> None:
    tokenizer = make_tokenizer("gemma2", bos=True)
    size = len(tokenizer)
    tokenizer, row = add_image_token(tokenizer, size)
    assert (row.token_id, row.appended, row.num_softmax_rows) == (size, True, size)
    assert list(row.appended_ids) == [size]
    assert tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == size


def test_special_tokens_beyond_the_embedding_get_rows_too() -> None:
    """A padding token that somebody added to the tokenizer alone."""
    tokenizer = make_tokenizer("mistral", bos=True)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer, row = add_image_token(tokenizer, size)
    assert (row.token_id, row.num_softmax_rows, list(row.appended_ids)) == (size + 1, size, [size, size + 1])
    llm = vlm.AutoModelForCausalLM.from_config(make_llm("llama", vocab_size=size).config)
    vlm.append_image_row(llm, row)
    assert (
        llm.get_input_embeddings().weight.shape[0]
        == llm.lm_head.weight.shape[0]
        == llm.lm_head.out_features
        == size + 2
    )
    assert llm.get_input_embeddings().num_embeddings == llm.config.vocab_size == size + 2


@pytest.mark.parametrize("reserved", ["token", "row"])
def test_padding_always_has_a_row(reserved: str) -> None:
    """Also where `<image>` needs no further row but the tokenizer's padding token has none: batches are padded with it."""
    tokenizer = make_tokenizer("llama", bos=True, reserved="token" if reserved == "token" else "none")
    size = len(tokenizer)
    if reserved == "row":
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
        size += 1
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer, row = add_image_token(tokenizer, size)
    num_rows = size + len(row.appended_ids)
    assert tokenizer.pad_token_id < num_rows


def test_words_beyond_the_embedding_are_refused() -> None:
    tokenizer = make_tokenizer("llama", bos=True)
    size = len(tokenizer)
    tokenizer.add_tokens(["marvellousness"])
    with pytest.raises(
        UserError, match=rf"ids below {size}.*found 1 tokens beyond, the first 'marvellousness' with id {size}"
    ):
        add_image_token(tokenizer, size)


@pytest.mark.parametrize("special", [True, False])
def test_an_image_token_that_is_there_is_taken(special: bool) -> None:
    tokenizer = make_tokenizer("qwen2", bos=False)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=special)], special_tokens=special)
    size, token_id = len(tokenizer), tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    tokenizer, row = add_image_token(tokenizer, size)
    assert (row.token_id, row.appended) == (token_id, False)
    assert len(tokenizer) == size
    assert tokenizer.decode([token_id], skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    ("name", "is_reserved"),
    [
        ("<|reserved_special_token_0|>", True), ("<|reserved_special_token_247|>", True), ("<unused0>", True),
        ("<unused_token_12>", True), ("[control_700]", True), ("[unused99]", True), ("<|eot_id|>", False),
        ("<unk>", False), ("reserved", False), ("<|reserved_special_token|>", False), ("<image>", False),
    ],
)  # fmt: skip
def test_names_of_reserved_tokens(name: str, is_reserved: bool) -> None:
    assert bool(RESERVED.fullmatch(name)) == is_reserved


def test_a_tokenizer_without_padding_pads_with_eos() -> None:
    tokenizer, _ = add_image_token(make_tokenizer("llama", bos=True), 500)
    assert tokenizer.pad_token == tokenizer.eos_token


def test_the_token_survives_saving(tmp_path: Path) -> None:
    for reserved in ("token", "none"):
        made = make_tokenizer("llama", bos=True, reserved=reserved)  # type: ignore[arg-type]
        tokenizer, row = add_image_token(made, len(made))
        tokenizer.save_pretrained(tmp_path / reserved)
        loaded = AutoTokenizer.from_pretrained(tmp_path / reserved)
        ids = loaded(f"a{IMAGE_TOKEN}b", add_special_tokens=False)["input_ids"]
        assert ids == tokenizer(f"a{IMAGE_TOKEN}b", add_special_tokens=False)["input_ids"]
        assert ids.count(row.token_id) == 1


def test_a_folder_without_tokenizer_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="expected a (fast )?tokenizer"):
        load_tokenizer(ModelRef(str(tmp_path)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_appended_row_moves_no_other_logit(family: str, tied: bool) -> None:
    """And is the mean of the others; tied weights stay one tensor, as does whether they are trained."""
    llm = make_llm(family, tie_word_embeddings=tied)
    ids = torch.arange(VOCABULARY).unsqueeze(0)
    before = logits_of(llm, input_ids=ids)
    weights = [llm.get_input_embeddings().weight.detach().clone(), llm.lm_head.weight.detach().clone()]
    llm.requires_grad_(False)
    vlm.append_image_row(llm, ImageRow(VOCABULARY + 1, VOCABULARY))
    after = logits_of(llm, input_ids=ids)
    assert after.shape[-1] == VOCABULARY + 2
    torch.testing.assert_close(after[..., :VOCABULARY], before, rtol=1e-6, atol=1e-6)
    for old, module in zip(weights, (llm.get_input_embeddings(), llm.lm_head), strict=True):
        assert torch.equal(module.weight[:VOCABULARY], old)
        for row in module.weight[VOCABULARY:]:
            torch.testing.assert_close(row, old.mean(0), rtol=1e-5, atol=1e-6)
        assert not module.weight.requires_grad
    assert (llm.lm_head.weight is llm.get_input_embeddings().weight) == tied


# Put together, exported, loaded


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


# The tower's numbers and pixels


@pytest.mark.parametrize("kind", TOWERS)
def test_tower_spec_by_hand(kind: str, tiny_tower: Callable) -> None:
    """28 pixels, patches of 7, 4 layers; only SigLIP has no CLS."""
    spec = tower_spec(ModelRef(str(tiny_tower(kind))), -2, None)
    assert (spec.image_size, spec.num_image_tokens, spec.layer) == (28, 16, -2)
    assert (spec.has_cls, spec.select_strategy) == ((True, "default") if kind != "siglip" else (False, "full"))


@pytest.mark.parametrize("layer", [5, -6, 24])
def test_a_layer_that_the_tower_has_not_is_told(layer: int, tiny_tower: Callable) -> None:
    folder = tiny_tower("clip")
    for fine in (-5, -1, 0, 4):
        tower_spec(ModelRef(str(folder)), fine, None)
    with pytest.raises(UserError, match=rf"model.vision_layer: .* -5 to 4 \(4 layers\), found {layer}"):
        tower_spec(ModelRef(str(folder)), layer, None)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_size_that_does_not_fit_is_told(kind: str, tiny_tower: Callable) -> None:
    with pytest.raises(UserError, match="model.image_size: .* takes images of 28 pixels, found 42"):
        tower_spec(ModelRef(str(tiny_tower(kind))), -2, 42)


@pytest.mark.parametrize(("size", "num_tokens"), [(42, 36), (14, 4), (45, 36)])
def test_dinov2_takes_other_sizes(size: int, num_tokens: int, tiny_tower: Callable) -> None:
    """And gives as many features as are counted, pixels beyond whole patches left out."""
    ref = ModelRef(str(tiny_tower("dinov2")))
    spec = tower_spec(ref, -2, size)
    assert spec.num_image_tokens == num_tokens
    states = vlm.load_tower(ref, torch.float32)(torch.randn(1, 3, size, size), output_hidden_states=True).hidden_states
    assert states[-2].shape[1] - 1 == num_tokens
    with pytest.raises(UserError, match="at least one patch of 7 pixels, found 6"):
        tower_spec(ref, -2, 6)


def test_what_is_no_tower_is_told(llm_folder: Callable, tiny_tower: Callable, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a CLIP, SigLIP or DINOv2 tower, found model type llama"):
        tower_spec(ModelRef(str(llm_folder("llama"))), -2, None)
    with pytest.raises(UserError, match="no readable config.json"):
        tower_spec(ModelRef(str(tmp_path)), -2, None)
    shutil.copy(tiny_tower("clip") / "config.json", tmp_path)
    with pytest.raises(UserError, match="no readable preprocessor_config.json"):
        tower_spec(ModelRef(str(tmp_path)), -2, None)


def normalised(picture: Any, mean: list[float], std: list[float]) -> Tensor:
    import numpy as np

    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float64) / 255)
    normal: Tensor = ((pixels - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)
    return normal


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("aspect", ["pad", "crop", "stretch"])
def test_pixels_are_those_of_the_plain_formula(
    aspect: str, kind: str, tiny_tower: Callable, pictures: list[Any]
) -> None:
    """PIL alone: transparency on white; to a square with the mean colour, or the shorter edge to the size and the centre of the longer one, or
    both edges to the size; bicubic as in the tower's processor. 1e-5 on values of about 1: theirs is float32."""
    from PIL import Image

    ref = ModelRef(str(tiny_tower(kind)))
    processor = image_processor(ref, tower_spec(ref, -2, None), aspect)
    mean, std = ([0.5] * 3, [0.5] * 3) if kind == "siglip" else ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28])
    for picture in pictures:
        white = Image.new("RGBA", picture.size, "white")
        plain = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
        width, height = plain.size
        if aspect == "pad":
            side = max(plain.size)
            square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in mean))
            square.paste(plain, ((side - width) // 2, (side - height) // 2))
            shown = square.resize((28, 28), Image.Resampling.BICUBIC)
        elif aspect == "stretch":
            shown = plain.resize((28, 28), Image.Resampling.BICUBIC)
        else:
            short = min(plain.size)
            larger = plain.resize((28 * width // short, 28 * height // short), Image.Resampling.BICUBIC)
            left, top = (larger.width - 28) // 2, (larger.height - 28) // 2
            shown = larger.crop((left, top, left + 28, top + 28))
        found = processor(picture, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(found.double(), normalised(shown, mean, std), rtol=0, atol=1e-5)


def test_an_unknown_aspect_is_refused(tiny_tower: Callable) -> None:
    ref = ModelRef(str(tiny_tower("clip")))
    with pytest.raises(ValueError, match="expected image_aspect crop, pad or stretch, found tile"):
        image_processor(ref, tower_spec(ref, -2, None), "tile")


# The proxy's LoRA


def attach(llm: Any, *, rank: int = 4, seed: int = 0) -> Any:
    return lora.attach(llm, rank=rank, alpha=8, dropout=0.0, seed=seed)


def trained_adapter(llm: Any, folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """An adapter that is not zero, saved as stage 1 saves one: from the tensors by the LLM's own names."""
    peft_model = attach(llm)
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    tensors = {f"base_model.model.{n}": p.detach() for n, p in llm.named_parameters() if p.requires_grad}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns where it would like to ask the hub for the base
        lora.save_adapter(peft_model, tensors, folder, base_name="somewhere/base")
    return peft_model, tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_is_on_every_linear_layer_but_the_head(family: str) -> None:
    llm = make_llm(family)
    attach(llm)
    adapted = {name.split(".lora_")[0] for name, p in llm.named_parameters() if p.requires_grad}
    layers = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert adapted == {f"model.layers.{i}.{layer}" for i in range(2) for layer in layers}
    assert all(".lora_" in name for name, p in llm.named_parameters() if p.requires_grad)


def test_a_fresh_adapter_changes_nothing_and_scales_by_alpha_over_rank() -> None:
    llm = make_llm("llama")
    ids = torch.arange(VOCABULARY).unsqueeze(0)
    before = logits_of(llm, input_ids=ids)
    attach(llm)
    assert torch.equal(logits_of(llm, input_ids=ids), before)
    layer = llm.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 2.0
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(0.1)
    x = torch.randn(3, 32)
    expected = (
        x @ layer.base_layer.weight.T + 2.0 * x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    )
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_lora_starts_from_its_seed_alone() -> None:
    """Neither from the global RNG, nor does it move that."""

    def start(seed: int, global_seed: int) -> Tensor:
        llm = make_llm("llama")
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        attach(llm, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([p.detach().flatten() for name, p in llm.named_parameters() if "lora_A" in name])

    assert torch.equal(start(1, 0), start(1, 99))
    assert not torch.equal(start(1, 0), start(2, 0))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_loads_on_the_base_llm(family: str, tmp_path: Path) -> None:
    """As PEFT loads any; its logits are the trained module's, and so are those of the merge (fp32 rounding: 1e-4)."""
    llm = make_llm(family)
    trained_adapter(llm, tmp_path)
    ids = torch.arange(VOCABULARY).unsqueeze(0)
    expected = logits_of(llm, input_ids=ids)
    assert (expected - logits_of(make_llm(family), input_ids=ids)).abs().max() > 0.1
    loaded = PeftModel.from_pretrained(make_llm(family), str(tmp_path))
    torch.testing.assert_close(logits_of(loaded, input_ids=ids), expected, rtol=0, atol=1e-6)
    merged = lora.merge(make_llm(family), tmp_path)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert type(merged) is type(make_llm(family))
    torch.testing.assert_close(logits_of(merged, input_ids=ids), expected, rtol=1e-4, atol=1e-4)


def test_the_adapter_folder_holds_lora_alone(tmp_path: Path) -> None:
    _, tensors = trained_adapter(make_llm("llama"), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {*lora.ADAPTER_FILES}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == len(tensors) == 2 * 7 * 2
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in saved)
    assert '"base_model_name_or_path": "somewhere/base"' in (tmp_path / "adapter_config.json").read_text()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_poisoned_adapter_is_refused(value: float, tmp_path: Path) -> None:
    trained_adapter(make_llm("llama"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[3]
    tensors[name][0, 0] = value
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"1 tensors are not finite, the first is {name}"):
        lora.merge(make_llm("llama"), tmp_path)


def test_what_is_no_adapter_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found no adapter_config\.json"):
        lora.check_adapter(tmp_path)
    trained_adapter(make_llm("llama"), tmp_path)
    lora.check_adapter(tmp_path)
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[:100])
    with pytest.raises(UserError, match="not readable as a PEFT adapter"):
        lora.check_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(whole)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"IA3"'))
    with pytest.raises(UserError, match="expected peft_type LORA, found IA3"):
        lora.check_adapter(tmp_path)


def test_an_adapter_of_another_llm_is_told(tmp_path: Path) -> None:
    trained_adapter(make_llm("llama", hidden_size=16), tmp_path)
    with pytest.raises(UserError, match="this adapter does not fit the LLM"):
        lora.merge(make_llm("llama"), tmp_path)


# A connector of one's own


def llava_connector(width: int = 32, hidden: int = 48) -> dict[str, Tensor]:
    """The keys of LLaVA's mm_projector.bin."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (hidden, width), "0.bias": (hidden,), "2.weight": (hidden, hidden), "2.bias": (hidden,)}
    return {f"model.mm_projector.{k}": torch.randn(s, generator=generator) for k, s in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llavas_projector_file_is_taken(
    dtype: torch.dtype, llm_folder: Callable, tiny_tower: Callable, tmp_path: Path
) -> None:
    """Into a model, where it computes linear, GELU, linear of these tensors."""
    made = {name: t.to(dtype) for name, t in llava_connector().items()}
    torch.save(made, tmp_path / "mm_projector.bin")
    tensors = vlm.import_connector(tmp_path / "mm_projector.bin")
    assert tuple(tensors) == vlm.CONNECTOR_KEYS
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    save_file(tensors, tmp_path / vlm.CONNECTOR_FILE)
    model = put_together(llm_folder("llama"), tiny_tower("clip")).model
    vlm.load_connector(model, tmp_path / vlm.CONNECTOR_FILE)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    a, b, c, d = (made[f"model.mm_projector.{k}"].float() for k in ("0.weight", "0.bias", "2.weight", "2.bias"))
    expected = torch.nn.functional.gelu(x @ a.T + b) @ c.T + d
    torch.testing.assert_close(model.model.multi_modal_projector(x), expected, rtol=1e-4, atol=1e-4)
    again = vlm.import_connector(tmp_path)
    assert all(torch.equal(again[k], tensors[k]) for k in vlm.CONNECTOR_KEYS), "our own file, by its folder"


class Malicious:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_malicious_projector_file_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "was-here"
    torch.save({**llava_connector(), "x": Malicious(f"touch {trace}")}, tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match="not readable as a connector"):
        vlm.import_connector(tmp_path / "mm_projector.bin")
    assert not trace.exists()
    torch.load(tmp_path / "mm_projector.bin", weights_only=False)
    assert trace.exists(), "the file is malicious indeed"


@pytest.mark.parametrize(
    "content",
    [
        {"model.mm_projector.0.weight": torch.zeros(2, 2)},
        {},
        [torch.zeros(2)],
        torch.zeros(2),
        dict.fromkeys(llava_connector(), 1),
    ],
)
def test_a_projector_file_of_other_content_is_told(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match="mm_projector.bin: "):
        vlm.import_connector(tmp_path / "mm_projector.bin")


def test_a_connector_that_is_absent_or_damaged_is_told(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "none.bin"):
        with pytest.raises(UserError, match="found no such file"):
            vlm.import_connector(source)
    (tmp_path / vlm.CONNECTOR_FILE).write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="not readable as a connector"):
        vlm.import_connector(tmp_path)


def test_a_connector_of_other_shape_is_told_by_tensor(
    llm_folder: Callable, tiny_tower: Callable, tmp_path: Path
) -> None:
    model = put_together(llm_folder("llama"), tiny_tower("clip")).model
    before = model.model.multi_modal_projector.linear_1.weight.detach().clone()
    torch.save(llava_connector(width=31), tmp_path / "mm_projector.bin")
    tensors = vlm.import_connector(tmp_path / "mm_projector.bin")
    save_file(tensors, tmp_path / vlm.CONNECTOR_FILE)
    with pytest.raises(UserError, match=r"expected linear_1.weight of shape \(48, 32\), found \(48, 31\)"):
        vlm.load_connector(model, tmp_path / vlm.CONNECTOR_FILE)
    del tensors["linear_2.bias"], tensors["linear_1.weight"]
    save_file({**tensors, "linear_1.weight": before}, tmp_path / vlm.CONNECTOR_FILE)
    with pytest.raises(UserError, match=r"expected linear_2.bias of shape \(48,\), found none"):
        vlm.load_connector(model, tmp_path / vlm.CONNECTOR_FILE)


def test_a_connector_with_nan_is_refused(tmp_path: Path) -> None:
    made = llava_connector()
    made["model.mm_projector.2.bias"][0] = torch.nan
    torch.save(made, tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match="not finite"):
        vlm.import_connector(tmp_path / "mm_projector.bin")


def test_a_saved_connector_is_picked_from_longer_names(tmp_path: Path) -> None:
    made = {f"model.multi_modal_projector.{k}": torch.randn(2, 2) for k in vlm.CONNECTOR_KEYS}
    vlm.save_connector({**made}, tmp_path)
    saved = load_file(tmp_path / vlm.CONNECTOR_FILE)
    assert {f"model.multi_modal_projector.{k}" for k in saved} == set(made)
    assert all(torch.equal(saved[k.rpartition("projector.")[2]], t) for k, t in made.items())
