"""Which row of the vocabulary stands for an image, and is every other left as it was?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AddedToken, AutoTokenizer

from dpa_ray.batch import IMAGE_TOKEN
from dpa_ray.errors import UserError
from dpa_ray.model import vlm
from dpa_ray.model.image_row import RESERVED, ImageRow, add_image_token, load_tokenizer
from dpa_ray.model.vlm import ModelRef
from tests.random_models import VOCABULARY, make_llm
from tests.small_models import logits_of
from tests.tiny_models import make_tokenizer

FAMILIES = ["llama", "qwen2", "gemma2", "mistral"]


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


@pytest.mark.parametrize("use", ["padding", "template"])
def test_a_reserved_token_that_has_a_meaning_is_left_alone(use: str) -> None:
    """Fine-tunes pad with one, or end turns with it."""
    tokenizer = make_tokenizer("llama", bos=True, reserved="token")
    name = "<|reserved_special_token_0|>"
    if use == "padding":
        tokenizer.pad_token = name
    else:
        tokenizer.chat_template += f"{{{{ '{name}' }}}}"
    tokenizer, row = add_image_token(tokenizer, len(tokenizer))
    assert row.appended
    assert name in tokenizer.get_vocab()
    assert tokenizer.pad_token_id != row.token_id


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
