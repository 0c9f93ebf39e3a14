"""Where do the embedded default's models come from? A tiny Llama, pretrained in seconds, and a tiny CLIP tower."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dpa_ray.batch import IGNORE_INDEX

VERSION = 1
"""Of what is made here: raise it with every change, because the models are kept under it."""

Text = str | list[str]
"""A plain text, or the turns of a conversation: user and assistant by turns."""

PAD, BOS, END = "<|pad|>", "<|begin|>", "<|end|>"
ROLES = ("system", "user", "assistant")
MAX_WORDS = 2000

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('expected a system, user or assistant message, found ' ~ message['role']) }}{% endif %}"
    "{{ '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

STEPS, BATCH_ROWS, ROW_TOKENS, LEARNING_RATE = 150, 24, 96, 2e-3

IMAGE_SIZE, PATCH_SIZE = 64, 16


def make_tiny_llm(
    folder: Path,
    *,
    texts: Sequence[Text],
    vocabulary: Sequence[str],
    seed: int,
    steps: int = STEPS,
    report: Callable[[int, float], None] | None = None,
) -> None:
    """Write a Llama of about a million parameters to `folder`, pretrained on `texts`, with a tokenizer of its own.

    Args:
        vocabulary: texts whose words become one token each; anything else is encoded by bytes.
        steps: optimizer steps of BATCH_ROWS rows of ROW_TOKENS tokens; 0 leaves the weights random.
        report: called with (step from 1, loss).
    """
    tokenizer = make_tokenizer(vocabulary)
    rows = _rows([_encode(tokenizer, text) for text in texts], tokenizer.pad_token_id)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_llm_config(tokenizer))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    for step, batch in zip(range(steps), _batches(rows, generator), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 5) * 0.5 * (1 + math.cos(math.pi * step / steps))
        labels = batch.masked_fill(batch == tokenizer.pad_token_id, IGNORE_INDEX)
        loss = model(input_ids=batch, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if report is not None:
            report(step + 1, float(loss.detach()))
    model.eval()
    ids: dict[str, Any] = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word of `vocabulary` and for each byte: it encodes any text, without loss."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    counts = Counter(word for text in vocabulary for word, _ in pre_tokenizer.pre_tokenize_str(text))
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))[:MAX_WORDS]
    roles = [f"<|{role}|>" for role in ROLES]
    special = [PAD, BOS, END, *roles]
    ids = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *words])}
    # ignore_merges: a word of the vocabulary is its token; with no merges, any other word falls into its bytes.
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=END, pad_token=PAD, extra_special_tokens=roles,
        clean_up_tokenization_spaces=False, padding_side="right", model_max_length=1024,
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _llm_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        # About 1/sqrt(hidden_size). With the usual 0.02, which suits a width of 2,000, attention starts so flat that
        # looking something up in the text before is not learned in ten times as many steps.
        initializer_range=0.08,
    )  # fmt: skip


def _encode(tokenizer: PreTrainedTokenizerFast, text: Text) -> list[int]:
    if isinstance(text, str):
        text = f"{BOS}{text}{END}"
    else:
        messages = [{"role": ROLES[1 + i % 2], "content": turn} for i, turn in enumerate(text)]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _rows(documents: Sequence[Sequence[int]], pad: int) -> Tensor:
    """(R, ROW_TOKENS) int64: whole documents one after another, as many as a row takes (a longer one is cut), padded."""
    rows: list[list[int]] = [[]]
    for ids in documents:
        if rows[-1] and len(rows[-1]) + len(ids) > ROW_TOKENS:
            rows.append([])
        rows[-1] += ids[: ROW_TOKENS - len(rows[-1])]
    return torch.tensor([row + [pad] * (ROW_TOKENS - len(row)) for row in rows])


def _batches(rows: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """(BATCH_ROWS, ROW_TOKENS) int64 at a time, for ever: every row once before any comes again."""
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < BATCH_ROWS:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        chosen, order = order[:BATCH_ROWS], order[BATCH_ROWS:]
        yield rows[chosen]


def make_tiny_vit(folder: Path, *, seed: int) -> None:
    """Write a small CLIP vision tower with weights from `seed`, and its image processor's settings, to `folder`.

    Nothing trains it, so its weights are drawn to hand on what it sees: few layers, whose branches add little; filters
    that whiten (`_whitening_filters`); positions that a linear map reads as row and column.
    """
    config = CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, projection_dim=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=IMAGE_SIZE, patch_size=PATCH_SIZE,
    )  # fmt: skip
    side, width = IMAGE_SIZE // PATCH_SIZE, config.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = CLIPVisionModel(config)
        filters = _whitening_filters(width)
        positions = 0.15 * (torch.randn(side, 1, width) + torch.randn(1, side, width)).reshape(side * side, width)
    with torch.no_grad():
        tower.get_parameter("embeddings.patch_embedding.weight").copy_(filters)
        tower.get_parameter("embeddings.position_embedding.weight")[1:] = positions  # row 0 is the class token's
    tower.eval()
    tower.save_pretrained(folder)
    # Mean and standard deviation of the pictures it is made for (builtin:shapes): dark, with bright objects.
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": IMAGE_SIZE}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.15, 0.15, 0.15], "image_std": [0.25, 0.25, 0.25],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def _whitening_filters(width: int, num_frequencies: int = 8) -> Tensor:
    """(width, 3, PATCH_SIZE, PATCH_SIZE) random filters of norm 1, with amplitude growing as frequency does.

    Pictures hold most of their energy in low frequencies, so that white-noise filters give little but colour and area.
    Growing amplitudes even this out, as trained filters do: a linear map then tells shapes in half as many steps.
    """
    position = (torch.arange(PATCH_SIZE) + 0.5) * math.pi / PATCH_SIZE
    frequency = torch.arange(num_frequencies)
    waves = torch.cos(frequency[:, None] * position) * (2 / PATCH_SIZE) ** 0.5  # (F, PATCH_SIZE), orthogonal
    waves[0] /= 2**0.5
    amplitude = 1 + torch.hypot(frequency[:, None].float(), frequency[None, :].float())
    mix = torch.randn(width, 3, num_frequencies, num_frequencies) * amplitude
    mix /= mix.flatten(1).norm(dim=1)[:, None, None, None]
    return torch.einsum("dcuv,uy,vx->dcyx", mix, waves, waves)
