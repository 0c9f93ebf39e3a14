"""Do the embedded default's models load as any others do, the same for the same seed, and has the LLM its priors?"""

from __future__ import annotations

import io
import json
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from dpa_ray.data import shapes
from dpa_ray.model import tiny
from dpa_ray.recipe import SourceOptions

TOKENIZER = tiny.make_tokenizer(shapes.vocabulary_texts())
STEPS = 40


@pytest.fixture(scope="module")
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llm")
    losses: list[float] = []
    tiny.make_tiny_llm(
        folder, texts=shapes.pretraining_texts(0, 1500), vocabulary=shapes.vocabulary_texts(), seed=0, steps=STEPS,
        report=lambda step, loss: losses.append(loss),
    )  # fmt: skip
    assert len(losses) == STEPS
    (folder / "losses.json").write_text(json.dumps(losses))
    return folder


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-vit")
    tiny.make_tiny_vit(folder, seed=0)
    return folder


def captions(style: str, num: int) -> list[str]:
    options = SourceOptions(style=style, split="heldout", size=num, seed=9)  # type: ignore[arg-type]
    return [sample.turns[1].text for sample in shapes.generate(options)]


# Tokenizer and template


@given(st.text(max_size=40))
@settings(deadline=None, max_examples=200)
def test_any_text_comes_back_from_the_tokenizer(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert TOKENIZER.decode(ids) == text


def test_text_outside_the_vocabulary_comes_back_from_the_saved_tokenizer(llm_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llm_folder)
    for text in ("a small red circle", " lead", "Größe: 漢字 🙂\n\n\ttwo  blanks", "<image>"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert ids == TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_a_word_of_the_vocabulary_is_one_token_in_every_style() -> None:
    texts = [turn.text.removeprefix("<image>") for style in ("terse", "ornate", "qa") for split in ("train", "heldout")
             for sample in shapes.generate(SourceOptions(style=style, split=split, size=150, seed=5)) for turn in sample.turns]  # fmt: skip
    texts += [t for text in shapes.pretraining_texts(5, 300) for t in ([text] if isinstance(text, str) else text)]
    for text in texts:
        tokens = TOKENIZER.convert_ids_to_tokens(TOKENIZER(text, add_special_tokens=False)["input_ids"])
        assert not [token for token in tokens if len(token) == 1 and token.isalpha() and token not in "aĊ"], text


def test_special_tokens_are_apart_and_bos_is_added() -> None:
    ids = (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id)
    assert len(set(ids)) == 3
    assert TOKENIZER("a ring")["input_ids"][0] == TOKENIZER.bos_token_id
    assert "<image>" not in TOKENIZER.get_vocab()


def test_the_chat_template_renders_roles_and_ends_every_turn(llm_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llm_folder)
    messages = [{"role": "system", "content": "see"}, {"role": "user", "content": "<image>\nwhat?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|begin|><|system|>see<|end|><|user|><image>\nwhat?<|end|><|assistant|>"
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "red"}], tokenize=False)
    assert whole == f"{prompt}red<|end|>"
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    with pytest.raises(jinja2.TemplateError, match="found tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


# LLM


def test_the_llm_loads_from_its_folder_and_has_about_a_million_parameters(llm_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llm_folder)
    tokenizer = AutoTokenizer.from_pretrained(llm_folder)
    assert model.config.model_type == "llama"
    assert 0.8e6 < model.num_parameters() < 1.2e6
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert (llm_folder / "model.safetensors").is_file()


def test_the_same_seed_makes_the_same_llm_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    texts, vocabulary = shapes.pretraining_texts(0, 60), shapes.vocabulary_texts()
    state = torch.get_rng_state()
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        tiny.make_tiny_llm(tmp_path / name, texts=texts, vocabulary=vocabulary, seed=seed, steps=2)
        torch.rand(1)
    torch.set_rng_state(state)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@torch.no_grad()
def nll_per_token(folder: Path, texts: list[str]) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([TOKENIZER(text)["input_ids"]])
        total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def test_pretraining_lowers_the_loss_and_gives_priors_that_ornate_captions_conflict_with(llm_folder: Path) -> None:
    losses = json.loads((llm_folder / "losses.json").read_text())
    terse, ornate = nll_per_token(llm_folder, captions("terse", 40)), nll_per_token(llm_folder, captions("ornate", 40))
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    assert terse < 0.5 * np.log(len(TOKENIZER))
    assert ornate > 2 * terse


def test_a_conversation_is_pretrained_in_the_chat_template() -> None:
    ids = tiny._encode(TOKENIZER, ["is there a ring?", "no"])
    assert TOKENIZER.decode(ids) == "<|begin|><|user|>is there a ring?<|end|><|assistant|>no<|end|>"
    assert TOKENIZER.decode(tiny._encode(TOKENIZER, "a ring")) == "<|begin|>a ring<|end|>"


def test_rows_hold_whole_documents() -> None:
    rows = tiny._rows([[1] * 50, [2] * 50, [3] * 40, [4] * (tiny.ROW_TOKENS + 9)], pad=0)
    assert rows.shape == (3, tiny.ROW_TOKENS)
    assert [sorted(set(row.tolist()) - {0}) for row in rows] == [[1], [2, 3], [4]]


# Tower


def test_the_tower_loads_with_its_processor_and_gives_a_vector_a_patch(vit_folder: Path) -> None:
    tower, processor = AutoModel.from_pretrained(vit_folder), AutoImageProcessor.from_pretrained(vit_folder)
    image = Image.new("RGB", (100, 70), (240, 70, 70))
    pixels = processor(images=[image, image], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    hidden = tower(pixels, output_hidden_states=True).hidden_states
    num_patches = (tiny.IMAGE_SIZE // tiny.PATCH_SIZE) ** 2
    assert 16 <= num_patches <= 64
    assert hidden[-2].shape == (2, 1 + num_patches, tower.config.hidden_size)
    assert tower.config.model_type == "clip_vision_model"


def test_the_same_seed_makes_the_same_tower(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        tiny.make_tiny_vit(tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@torch.no_grad()
def test_colour_and_place_can_be_read_from_the_tower_by_a_linear_map(vit_folder: Path) -> None:
    """By least squares on 500 pictures of one object, tried on 100 others; chance is 1/6 and 1/2."""
    tower, processor = AutoModel.from_pretrained(vit_folder), AutoImageProcessor.from_pretrained(vit_folder)
    options = SourceOptions(style="terse", size=1900)
    samples = [s for s in shapes.generate(options) if s.turns[1].text.count(" at ") == 1][:600]
    images = [Image.open(io.BytesIO(s.images[0].data)) for s in samples]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    patches = pixels.unfold(2, tiny.PATCH_SIZE, tiny.PATCH_SIZE).unfold(3, tiny.PATCH_SIZE, tiny.PATCH_SIZE)
    where = patches.std((1, 4, 5)).flatten(1).argmax(1)  # the patch that the object stands in
    features = tower(pixels, output_hidden_states=True).hidden_states[-2][torch.arange(len(where)), 1 + where]
    features = torch.cat([features, torch.ones(len(features), 1)], 1)
    words = [s.turns[1].text.rstrip(".").split() for s in samples]
    for said in ([w[2] for w in words], [w[-2] for w in words], [w[-1] for w in words]):
        names = sorted(set(said))
        wanted = torch.eye(len(names))[[names.index(word) for word in said]]
        weights = torch.linalg.lstsq(features[:500], wanted[:500]).solution
        right = (features[500:] @ weights).argmax(1) == wanted[500:].argmax(1)
        assert float(right.float().mean()) > 0.75
