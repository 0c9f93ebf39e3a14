"""Are ids and targets of every template exactly what they should be? Chat templates in the styles of real families."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dpa_ray.batch import NO_TURN, Encoded
from dpa_ray.data.chat import pin_template
from dpa_ray.data.encode import Encoder
from dpa_ray.data.sample import ImageFile, Sample, Turn
from dpa_ray.errors import UserError

NUM_IMAGE_TOKENS = 4

TEXTS = [
    "What is in the picture? Answer in one word.",
    "A red square stands to the left of a small blue circle, below it a green triangle.",
    "Yes. No. user assistant system model INST\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024",
    "Ünïcödé 東京 🙂 ¿qué? — straße\tand\n  indented\n\n\nlines",
]


def byte_level(special: list[str], *, bos: str | None = None, adds_bos: bool = False, regex: bool = True):
    """A byte-level BPE tokenizer with `special` tokens and `<image>`: Llama-3's and Qwen's way to split words with
    `regex`, without it GPT-2's (SmolLM2), whose offsets leave blanks out."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\s*[\r\n]+|\s+(?!\S)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+") if regex else None
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        if words
        else pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in [*special, "<image>"]])
    steps = [processors.ByteLevel(trim_offsets=not regex)]
    if adds_bos:
        assert bos is not None
        steps.append(
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
        )
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos)


def sentencepiece(special: list[str], *, bos: str = "<s>", eos: str = "</s>", prefix: str = "first"):
    """A BPE tokenizer over ▁-words with byte fallback (Mistral, Llama-2; Gemma with prefix "never")."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prefix, split=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=620, special_tokens=["<unk>", bos, eos, *byte_tokens], limit_alphabet=60, show_progress=False
    )
    tokenizer.train_from_iterator([t for t in TEXTS[:3] for _ in range(3)], trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in [*special, "<image>"]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token="<unk>")


CHATML = """{% for message in messages %}
{% if loop.first and message.role != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' }}
{{- 'Today Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

QWEN3 = r"""{%- for message in messages %}
{%- if message.role != 'assistant' %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- else %}
    {%- set content = message.content %}{%- set thought = '' %}
    {%- if '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {%- if loop.last %}
{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
    {%- else %}
{{- '<|im_start|>assistant\n' + content }}
    {%- endif %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

GEMMA2 = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}
{% endif %}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

MISTRAL = """{{- bos_token }}{%- for message in messages %}
{%- if message.role == 'user' %}{{- '[INST] ' + message.content + '[/INST]' }}
{%- elif message.role == 'assistant' %}{{- ' ' + message.content | trim + eos_token }}
{%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}{%- endif %}{%- endfor %}"""

LLAMA2 = """{%- for message in messages %}
{%- if message.role == 'user' %}{{- bos_token + '[INST] ' + message.content.strip() + ' [/INST]' }}
{%- else %}{{- ' ' + message.content.strip() + ' ' + eos_token }}{%- endif %}{%- endfor %}"""

IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TURNS = ["<start_of_turn>", "<end_of_turn>"]


def _style(name: str):
    """(tokenizer, end of turn, whether the template trims, header of an answer) of a family's style."""
    if name == "llama-3.1":
        tokenizer = byte_level(HEADERS, bos="<|begin_of_text|>", adds_bos=True)
        tokenizer.chat_template = LLAMA31
        return tokenizer, "<|eot_id|>", True, "<|start_header_id|>assistant<|end_header_id|>\n\n"
    if name in ("qwen2.5", "smollm2"):
        tokenizer = byte_level(IM, regex=name != "smollm2")
        tokenizer.chat_template = CHATML
        return tokenizer, "<|im_end|>", False, "<|im_start|>assistant\n"
    if name == "qwen3":
        tokenizer = byte_level(IM)
        tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
        tokenizer.chat_template = QWEN3
        return tokenizer, "<|im_end|>", False, "<|im_start|>assistant\n"
    if name == "gemma-2":
        tokenizer = sentencepiece(TURNS, bos="<bos>", eos="<eos>", prefix="never")
        tokenizer.chat_template = GEMMA2
        return tokenizer, "<end_of_turn>", True, "<start_of_turn>model\n"
    if name == "mistral":
        tokenizer = sentencepiece(["[INST]", "[/INST]"])
        tokenizer.chat_template = MISTRAL
        return tokenizer, "</s>", True, "[/INST] "
    tokenizer = sentencepiece([])
    tokenizer.chat_template = LLAMA2
    return tokenizer, " </s>", True, "[/INST] "


STYLES = ["llama-3.1", "qwen2.5", "smollm2", "qwen3", "gemma-2", "mistral", "llama-2"]
CACHE: dict[str, tuple] = {}


def style(name: str):
    if name not in CACHE:
        CACHE[name] = _style(name)
    return CACHE[name]


def encoder(tokenizer, template="chat", max_length=10_000, date="26 Jul 2024") -> Encoder:
    image = tokenizer.convert_tokens_to_ids("<image>")
    return Encoder(tokenizer, template, max_length, NUM_IMAGE_TOKENS, image, date)


def sample(*texts: str, images: int = 0, system: str | None = None, grounded=()) -> Sample:
    roles = ["human", "gpt"] * len(texts)
    turns = [Turn(role, text) for role, text in zip(roles, texts, strict=False)]
    if system is not None:
        turns.insert(0, Turn("system", system))
    return Sample("7", "set.json#7", turns, [ImageFile(f"{i}.png", b"x") for i in range(images)], list(grounded))


def targets(tokenizer, encoded: Encoded) -> list[str]:
    """The text of each turn's targets, decoded as it stands in the conversation (with the token before it)."""
    out = []
    for number in range(int(encoded.turn.max()) + 1):
        places = np.flatnonzero(encoded.turn == number)
        assert encoded.target[places].all()
        assert np.array_equal(places, np.arange(places[0], places[-1] + 1)), "one run of tokens"
        before = encoded.input_ids[: places[0]].tolist()
        whole = tokenizer.decode(before + encoded.input_ids[places].tolist())
        out.append(whole[len(tokenizer.decode(before)) :])
    assert (encoded.target == (encoded.turn != NO_TURN)).all()
    return out


# -- chat


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


# -- templates


def test_a_template_that_rewrites_answers_is_refused_with_an_explanation():
    tokenizer = byte_level(IM)
    for rewrite in ("message.content | upper", "message.content[:3]", "'' if loop.last else message.content"):
        tokenizer.chat_template = (
            "{% for message in messages %}<|im_start|>{{ message.role }}: {{ " + rewrite + " }}<|im_end|>{% endfor %}"
        )
        with pytest.raises(UserError, match="no way to find the texts"):
            encoder(tokenizer).check()


def test_a_template_that_repeats_answers_is_refused():
    tokenizer = byte_level(IM)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(UserError, match="no way to find the texts"):
        encoder(tokenizer)(sample("What?", "Yes"))


def test_a_template_that_drops_the_image_is_refused():
    tokenizer = byte_level(IM)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content.replace('<image>', '') }}<|im_end|>{% endfor %}"
    with pytest.raises(UserError, match="expected 1 <image>, found 0"):
        encoder(tokenizer)(sample("<image>\nWhat?", "Yes", images=1))


def test_check_refuses_a_template_without_an_end_of_turn():
    tokenizer = byte_level(IM)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(UserError, match="would never stop"):
        encoder(tokenizer).check()


def test_no_chat_template_is_an_error_in_stage_3_only():
    tokenizer = byte_level(IM)
    with pytest.raises(UserError, match="expected a tokenizer with a chat template"):
        encoder(tokenizer)
    encoder(tokenizer, "plain").check()


@pytest.mark.parametrize("name", STYLES)
def test_check_accepts_every_style(name):
    encoder(style(name)[0]).check()


def test_the_clock_is_pinned():
    tokenizer = byte_level(IM)
    tokenizer.chat_template = (
        "{{ 'Today: ' + strftime_now('%Y-%m-%d') + strftime_now(' %d %B %Y, %-d') + '\n' }}" + CHATML
    )
    text = tokenizer.decode(encoder(tokenizer, date="6 Jul 2024")(sample("What?", "Yes")).input_ids)
    assert text.startswith("Today: 2024-07-06 06 July 2024, 6\n")
    llama = style("llama-3.1")[0]
    assert "Today Date: 3 Feb 2021\n" in llama.decode(
        encoder(llama, date="3 Feb 2021")(sample("What?", "Yes")).input_ids
    )
    with pytest.raises(UserError, match="expected a date like"):
        encoder(llama, date="yesterday")


def test_a_template_without_clock_is_left_as_it_is():
    assert pin_template(CHATML, "26 Jul 2024") == CHATML
    assert (
        pin_template("\n  {% if true %}x{% endif %} date_string", None) == "\n  {% if true %}x{% endif %} date_string"
    )


def test_pinning_keeps_the_blanks_at_the_start_of_a_template():
    tokenizer = byte_level(IM)
    for template in ("\n\n{{ date_string }}", "  {% if true %}{{ date_string }}{% endif %}", "  {{ date_string }}"):
        given = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], chat_template=template, tokenize=False, date_string="1 Jan 2024"
        )
        pinned = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], chat_template=pin_template(template, "1 Jan 2024"), tokenize=False
        )
        assert pinned == given


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(UserError, match="fast tokenizer"):
        Encoder(object(), "plain", 10, 1, 0)


def test_an_encoder_survives_pickling():
    tokenizer = style("llama-3.1")[0]
    encode = encoder(tokenizer)
    one = sample("<image>\nWhat?", "Yes", images=1)
    again = pickle.loads(pickle.dumps(encode))
    assert again(one).input_ids.tolist() == encode(one).input_ids.tolist()
