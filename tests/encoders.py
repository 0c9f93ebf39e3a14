"""Tokenizers and chat templates in the styles of real families, and encoders and samples from them."""

from __future__ import annotations

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dpa_ray.batch import NO_TURN, Encoded
from dpa_ray.data.encode import Encoder
from dpa_ray.data.sample import ImageFile, Sample, Turn

NUM_IMAGE_TOKENS = 4

TEXTS = [
    "What is in the picture? Answer in one word.",
    "A red square stands to the left of a small blue circle, below it a green triangle.",
    "Yes. No. user assistant system model INST\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024",
    "Ünïcödé 東京 🙂 ¿qué? — straße\tand\n  indented\n\n\nlines",
]


def _with_image(special: list[str], has_image: bool) -> list[str]:
    return [*special, "<image>"] if has_image else special


def byte_level(
    special: list[str], *, bos: str | None = None, adds_bos: bool = False, regex: bool = True, has_image: bool = True
):
    """A byte-level BPE tokenizer with `special` tokens and `<image>` (unless not `has_image`): Llama-3's and Qwen's way to split words with
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
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in _with_image(special, has_image)]
    )
    steps = [processors.ByteLevel(trim_offsets=not regex)]
    if adds_bos:
        assert bos is not None
        steps.append(
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
        )
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos)


def sentencepiece(
    special: list[str], *, bos: str = "<s>", eos: str = "</s>", prefix: str = "first", has_image: bool = True
):
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
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in _with_image(special, has_image)]
    )
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
