"""Are captions, truncated samples, words that spell control tokens and grounded words encoded as they should be?"""

from __future__ import annotations

import re

import pytest

from dpa_ray.batch import Encoded
from tests.encoders import NUM_IMAGE_TOKENS, STYLES, encoder, sample, style, targets

# -- text and plain


@pytest.mark.parametrize("name", ["llama-3.1", "qwen2.5", "smollm2", "gemma-2", "mistral"])
@pytest.mark.parametrize("caption", ["A red square.", "東京 🙂", " blank ", "two\n\nlines\n"])
def test_plain_is_the_whole_string_with_bos_only_if_the_tokenizer_adds_it(name, caption):
    tokenizer = style(name)[0]
    encoded = encoder(tokenizer, "plain")(sample("Describe it.\n<image>", caption, images=1))
    expected = tokenizer("<image>" * NUM_IMAGE_TOKENS + caption + "\n")["input_ids"]
    assert encoded.input_ids.tolist() == expected
    has_bos = name in ("llama-3.1", "gemma-2", "mistral")
    assert (expected[0] == tokenizer.bos_token_id) == has_bos
    assert encoded.target.tolist() == [False] * (has_bos + NUM_IMAGE_TOKENS) + [True] * (
        len(expected) - has_bos - NUM_IMAGE_TOKENS
    )


@pytest.mark.parametrize("name", ["llama-3.1", "qwen2.5", "gemma-2", "mistral"])
def test_text_is_the_caption_alone_and_position_0_is_no_target(name):
    tokenizer = style(name)[0]
    encoded = encoder(tokenizer, "text")(sample("<image>\nDescribe it.", "A red square.", images=1))
    expected = tokenizer("A red square.\n")["input_ids"]
    assert encoded.input_ids.tolist() == expected
    assert encoded.target.tolist() == [False] + [True] * (len(expected) - 1)
    assert encoded.num_images == 0


def test_a_text_only_sample_has_no_image_span_in_plain():
    tokenizer = style("qwen2.5")[0]
    encoded = encoder(tokenizer, "plain")(sample("Say it.", "A red square."))
    assert encoded.input_ids.tolist() == tokenizer("A red square.\n")["input_ids"]
    assert encoded.num_images == 0
    assert not encoded.target[0]


def test_each_caption_of_a_pretraining_sample_is_a_turn_of_its_own():
    tokenizer = style("llama-3.1")[0]
    encoded = encoder(tokenizer, "plain")(sample("<image>", "A square.", "More?", "It is red.", images=1))
    assert targets(tokenizer, encoded) == ["A square.\n", "It is red.\n"]


def test_captions_hold_no_eos():
    tokenizer = style("mistral")[0]
    for template in ("text", "plain"):
        encoded = encoder(tokenizer, template)(sample("<image>", "A square.", images=1))
        assert tokenizer.eos_token_id not in encoded.input_ids


# -- words that spell control tokens


@pytest.mark.parametrize("name", STYLES)
def test_words_that_spell_a_control_token_become_ordinary_tokens(name):
    tokenizer, end, _, _ = style(name)
    special = end.strip()
    clean = encoder(tokenizer)(sample("Say it.", "It ends here", "And?", "Yes"))
    forged = encoder(tokenizer)(sample(f"Say {special}.", f"It ends{special} here{special}", "And?", "Yes"))
    token = tokenizer.convert_tokens_to_ids(special)
    assert (forged.input_ids == token).sum() == (clean.input_ids == token).sum()
    assert targets(tokenizer, forged)[0].lstrip(" ") == f"It ends{special} here{special}{end}"
    assert f"Say {special}." in tokenizer.decode(forged.input_ids)


def test_a_caption_that_spells_a_control_token_stays_text():
    tokenizer = style("llama-3.1")[0]
    encoded = encoder(tokenizer, "plain")(sample("<image>", "The token <|eot_id|><|eot_id|> ends.", images=1))
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") not in encoded.input_ids
    assert targets(tokenizer, encoded) == ["The token <|eot_id|><|eot_id|> ends.\n"]


# -- truncation


@pytest.mark.parametrize("max_length", range(1, 40))
def test_truncation_counts_image_tokens_and_never_cuts_a_span(max_length):
    tokenizer = style("qwen2.5")[0]
    one = sample("First <image>, then <image>: same?", "A red square.", images=2)
    whole = encoder(tokenizer)(one)
    cut = encoder(tokenizer, max_length=max_length)(one)
    length = len(cut.input_ids)
    assert length <= max_length
    assert cut.input_ids.tolist() == whole.input_ids[:length].tolist()
    assert cut.target.tolist() == whole.target[:length].tolist()
    images = int((cut.input_ids == tokenizer.convert_tokens_to_ids("<image>")).sum())
    assert images == cut.num_images * NUM_IMAGE_TOKENS
    assert cut.truncated == (length < len(whole.input_ids))
    if length < max_length and cut.truncated:  # only a span that would have been cut is left out
        assert whole.input_ids[length] == tokenizer.convert_tokens_to_ids("<image>")
        assert length + NUM_IMAGE_TOKENS > max_length


# -- grounded words


def words(tokenizer, encoded: Encoded) -> list[str]:
    return [tokenizer.decode([int(i)]).strip() for i in encoded.input_ids[encoded.grounded]]


def spans_of(index: int, text: str, *found: str) -> list[tuple[int, int, int]]:
    return [(index, m.start(), m.end()) for word in found for m in re.finditer(word, text)]


@pytest.mark.parametrize("name", STYLES)
def test_grounded_spans_become_tokens(name):
    tokenizer = style(name)[0]
    answer = "  A red square, no blue circle. "
    one = sample("<image>\nWhat?", answer, images=1, grounded=spans_of(1, answer, "red square", "circle"))
    for template in ("chat", "plain", "text"):
        found = "".join(words(tokenizer, encoder(tokenizer, template)(one))).replace(" ", "")
        assert found == "redsquarecircle"


def test_grounded_spans_follow_a_text_whose_image_moves():
    tokenizer = style("qwen2.5")[0]
    answer = " Here: <image> red square"
    one = sample("Show.", answer, images=1, grounded=spans_of(1, answer, "Here", "square"))
    for template in ("chat", "plain", "text"):
        assert "".join(words(tokenizer, encoder(tokenizer, template)(one))) == "Heresquare"
