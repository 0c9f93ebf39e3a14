"""Are ids and targets of every chat template exactly what they should be, with images or without?"""

from __future__ import annotations

import numpy as np
import pytest

from dpa_ray.data.chat import pin_template
from dpa_ray.errors import UserError
from tests.encoders import NUM_IMAGE_TOKENS, STYLES, encoder, sample, style, targets


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize(
    "answers",
    [
        ["Yes"],
        ["A red square stands to the left.", "No.", "A small blue circle"],
        ["Ünïcödé 東京 🙂 — straße", "¿qué?"],
        ["one\n\n\ntwo\n  three\ttab", "a\n\nb"],
        ["x"],
    ],
    ids=["one token", "three turns", "unicode", "empty lines", "one letter"],
)
def test_targets_are_the_answers_and_their_end_of_turn_only(name, answers):
    tokenizer, end, _, _ = style(name)
    texts = [t for i, answer in enumerate(answers) for t in (f"<image>\nWhat? {i}" if i == 0 else f"And {i}?", answer)]
    encoded = encoder(tokenizer)(sample(*texts, images=1))
    assert [t.lstrip(" ") for t in targets(tokenizer, encoded)] == [answer + end for answer in answers]
    assert encoded.num_images == 1
    assert int((encoded.input_ids == tokenizer.convert_tokens_to_ids("<image>")).sum()) == NUM_IMAGE_TOKENS


@pytest.mark.parametrize("name", STYLES)
def test_ids_are_the_templates_rendering_tokenised_as_a_whole(name):
    tokenizer, _, _, _ = style(name)
    texts = ["<image>\nWhat is in the picture?", "A red square.  ", "  And\n\n東京?", "  Yes \n"]
    encoded = encoder(tokenizer)(sample(*texts, images=1))
    messages = [{"role": r, "content": t} for r, t in zip(["user", "assistant"] * 2, texts, strict=True)]
    template = pin_template(tokenizer.chat_template, "26 Jul 2024")
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    expected = tokenizer(text.replace("<image>", "<image>" * NUM_IMAGE_TOKENS), add_special_tokens=False)["input_ids"]
    # a user's text is moved and stripped only where it holds an image: the second one keeps its blanks
    assert encoded.input_ids.tolist() == expected


@pytest.mark.parametrize("name", STYLES)
def test_blanks_around_an_answer_are_targets_where_the_template_keeps_them(name):
    tokenizer, end, trims, _ = style(name)
    encoded = encoder(tokenizer)(sample("What?", "  Yes. \n", "Sure?", " No  "))
    expected = ["Yes." + end, "No" + end] if trims else ["  Yes. \n" + end, " No  " + end]
    if name == "qwen3":
        expected[1] = " No  " + end  # its last answer loses leading newlines only
    found = targets(tokenizer, encoded)
    # the header's newline and the answer's blanks are one token, which holds characters of the answer
    assert [t.lstrip(" ") if trims else t.removeprefix("\n") for t in found] == expected


def test_an_empty_answer_between_others_trains_its_end_of_turn():
    tokenizer, end, _, _ = style("qwen2.5")
    assert targets(tokenizer, encoder(tokenizer)(sample("What?", "", "And?", "Yes"))) == [end, "Yes" + end]


def test_an_answer_may_equal_the_question_or_the_templates_own_words():
    tokenizer, end, _, _ = style("qwen2.5")
    encoded = encoder(tokenizer)(sample("assistant", "assistant", "user\n", "Be helpful.", "x", "zqMark1bz"))
    assert targets(tokenizer, encoded) == ["assistant" + end, "Be helpful." + end, "zqMark1bz" + end]


def test_a_system_turn_goes_to_the_template_as_system_message():
    tokenizer, end, _, _ = style("qwen2.5")
    encoded = encoder(tokenizer)(sample("What?", "Yes", system="Answer briefly."))
    assert tokenizer.decode(encoded.input_ids).startswith("<|im_start|>system\nAnswer briefly.<|im_end|>\n")
    assert targets(tokenizer, encoded) == ["Yes" + end]


@pytest.mark.parametrize("name", ["gemma-2", "mistral"])
def test_a_template_without_system_role_is_refused_with_its_words_and_the_samples_place(name):
    tokenizer = style(name)[0]
    with pytest.raises(UserError, match=r"set.json#7: the chat template refuses .*system, user.*fold the system"):
        encoder(tokenizer)(sample("What?", "Yes", system="Be brief."))
    with pytest.raises(UserError, match="refuses"):
        encoder(tokenizer).check(system=True)
    encoder(tokenizer).check()


def test_qwen3_thinking_block_of_the_template_is_header_and_one_of_the_data_is_target():
    tokenizer, end, _, _ = style("qwen3")
    think, over = (tokenizer.convert_tokens_to_ids(t) for t in ("<think>", "</think>"))
    plain = encoder(tokenizer)(sample("What?", "Yes"))
    assert targets(tokenizer, plain) == ["Yes" + end]
    assert (plain.input_ids == think).sum() == 1
    assert not plain.target[plain.input_ids == think].any()
    thought = encoder(tokenizer)(sample("What?", "<think>\nHm, red.\n</think>\n\nYes", "And?", "<think>Mh</think>No"))
    assert targets(tokenizer, thought) == ["Yes" + end, "<think>\nMh\n</think>\n\nNo" + end]
    assert (thought.input_ids == think).sum() == (thought.input_ids == over).sum() == 1  # real tokens, in the last turn


def test_qwen3_prompt_holds_the_empty_thinking_block_that_training_has():
    tokenizer = style("qwen3")[0]
    encode = encoder(tokenizer)
    one = sample("What?", "Yes")
    prompt, _ = encode.prompt(one, 0)
    encoded = encode(one)
    first = int(np.flatnonzero(encoded.target)[0])
    assert prompt.tolist() == encoded.input_ids[:first].tolist()


@pytest.mark.parametrize("name", [n for n in STYLES if n != "mistral"])
def test_prompt_is_what_stands_before_the_answer_in_training(name):
    tokenizer = style(name)[0]
    encode = encoder(tokenizer)
    one = sample("<image>\nWhat?", "A red square.", "Sure?", "Yes", images=1)
    encoded = encode(one)
    for turn in (0, 1) if name != "qwen3" else (1,):
        prompt, images = encode.prompt(one, turn)
        start = int(np.flatnonzero(encoded.turn == turn)[0])
        text = tokenizer.decode(encoded.input_ids[:start])
        assert tokenizer.decode(prompt) in (text, text.removesuffix(" "))
        assert [i.name for i in images] == ["0.png"]
        if name not in ("llama-2",):
            assert prompt.tolist() == encoded.input_ids[:start].tolist()


def test_prompt_equals_transformers_processor():
    from PIL import Image
    from transformers import LlavaImageProcessorPil, LlavaProcessor

    tokenizer = style("llama-3.1")[0]
    processor = LlavaProcessor(
        LlavaImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        chat_template=pin_template(tokenizer.chat_template, "26 Jul 2024"),
    )
    prompt, _ = encoder(tokenizer).prompt(sample("What is <image> it?", "x", images=1), 0)
    messages = [{"role": "user", "content": "<image>\nWhat is  it?"}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    expected = processor(images=Image.new("RGB", (9, 5)), text=text, add_special_tokens=False)["input_ids"]
    assert prompt.tolist() == list(np.asarray(expected).ravel())


# -- images in texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is <image> this?", "<image>\nWhat is  this?"),
        ("What is this?\n<image>", "<image>\nWhat is this?"),
        ("<image>", "<image>"),
        ("<image>Look", "<image>\nLook"),
    ],
)
def test_a_single_image_moves_to_the_start_of_its_turn(text, expected):
    tokenizer = style("qwen2.5")[0]
    moved, written = (encoder(tokenizer)(sample(t, "Yes", images=1)) for t in (text, expected))
    assert moved.input_ids.tolist() == written.input_ids.tolist()
    assert f"user\n{expected.replace('<image>', '<image>' * NUM_IMAGE_TOKENS)}<|im_end|>" in tokenizer.decode(
        moved.input_ids
    )


def test_several_images_stay_where_they_are():
    tokenizer = style("qwen2.5")[0]
    encoded = encoder(tokenizer)(sample("First <image>, then <image>: same? ", "Yes", images=2))
    run = "<image>" * NUM_IMAGE_TOKENS
    assert f"user\nFirst {run}, then {run}: same? <|im_end|>" in tokenizer.decode(encoded.input_ids)
    assert encoded.num_images == 2


def test_an_image_in_an_answer_is_never_a_target():
    tokenizer, end, _, _ = style("qwen2.5")
    encoded = encoder(tokenizer)(sample("Show it.", "Here <image> it is", images=1))
    image = encoded.input_ids == tokenizer.convert_tokens_to_ids("<image>")
    assert image.sum() == NUM_IMAGE_TOKENS
    assert not encoded.target[image].any()
    assert tokenizer.decode(encoded.input_ids[encoded.target]) == "\nHere  it is" + end
