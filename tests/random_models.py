"""What the tests of the mathematics run on: random decoders and LLaVA models in memory, and batches from a short notation.

A sample is written as its parts: `s3` three tokens of text, `I` an image, `t4` four targets of turn 0, `u2` two of turn
1, `g2` two of turn 0 that are visually grounded. So "s1 I t4" is a caption behind BOS and image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from dpa_ray.batch import IGNORE_INDEX, NO_TURN, Batch, Encoded
from dpa_ray.data.collate import collate
from dpa_ray.model import lora, vlm
from dpa_ray.model.cmo import Weighting
from dpa_ray.model.image_row import ImageRow
from dpa_ray.model.step import StepModule
from dpa_ray.model.tower import TowerSpec

VOCABULARY = 13  # few, so that probabilities are neither 0 nor 1
IMAGE_SIZE, PATCH_SIZE, NUM_IMAGE_TOKENS = 12, 6, 4
WIDTH = 32
CHUNK_ROWS = 4  # fewer than most samples have targets: ranks differ in their number of chunks


def make_llm(family: str, *, window: int = 16, attention: str | None = None, seed: int = 0, **changes: Any) -> Any:
    """A random decoder with a head, in float32 and eval mode; Mistral and every other layer of Gemma-2 slide."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3,
        "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, **changes,
    }  # fmt: skip
    config: Any
    if family == "llama":
        config = LlamaConfig(**common)
    elif family == "qwen2":
        config = Qwen2Config(**common, use_sliding_window=False)
    elif family == "mistral":
        config = MistralConfig(**common, head_dim=8, sliding_window=window)
    else:
        config = Gemma2Config(
            **common, head_dim=8, query_pre_attn_scalar=8, sliding_window=window, final_logit_softcapping=3.0,
            attn_logit_softcapping=4.0,
        )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def make_vlm(
    family: str = "llama",
    *,
    appended: bool = True,
    dtype: torch.dtype = torch.float32,
    lora_rank: int | None = None,
    **changes: Any,
) -> Any:
    """LLaVA of a random decoder and a random CLIP tower; `<image>` is a row of its own or the vocabulary's last."""
    llm = make_llm(family, **changes)
    if lora_rank is not None:
        lora.attach(llm, rank=lora_rank, alpha=2 * lora_rank, dropout=0.0, seed=3)
    config = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tower = CLIPVisionModel(config).eval()
    row = ImageRow(VOCABULARY if appended else VOCABULARY - 1, VOCABULARY)
    vlm.append_image_row(llm, row)
    spec = TowerSpec(config, -2, IMAGE_SIZE, NUM_IMAGE_TOKENS)
    model = vlm.assemble(llm.to(dtype), tower.to(dtype), spec, row, dtype=dtype, seed=2)
    with torch.no_grad():  # loud enough to be heard beside the embeddings, which Gemma-2 scales
        model.model.multi_modal_projector.linear_2.weight.mul_(20 if family == "gemma2" else 4)
    return model.eval()


def make_step(model: Any, kind: str, *, window: int = 3, bounds: tuple[float, float] | None = None) -> StepModule:
    """The StepModule of a model from here; the bounds are the method's. The head takes CHUNK_ROWS targets at once,
    and as many rows of the vocabulary."""
    lower, upper = bounds or {"uniform": (1.0, 1.0), "prob": (0.05, 0.5), "logit": (1.0, 5.0)}[kind]
    config = model.config.get_text_config()
    num_rows = VOCABULARY if config.vocab_size > VOCABULARY else None
    weighting = Weighting(kind, lower, upper, window)
    return StepModule(
        model, weighting, softcap=vlm.softcap_of(config), num_softmax_rows=num_rows,
        chunk_bytes=4 * CHUNK_ROWS**2,
    )  # fmt: skip


@dataclass
class Row:
    """One sample: ids with the image token in its places, and what each position is."""

    ids: list[int]
    turn: list[int]
    grounded: list[bool]
    num_images: int


def row_of(notation: str, image_token_id: int, generator: torch.Generator) -> Row:
    """The sample of a notation (see the file's first lines), its tokens drawn from `generator`."""
    row = Row([], [], [], 0)
    for part in notation.split():
        if part == "I":
            row.ids += [image_token_id] * NUM_IMAGE_TOKENS
            row.turn += [NO_TURN] * NUM_IMAGE_TOKENS
            row.grounded += [False] * NUM_IMAGE_TOKENS
            row.num_images += 1
            continue
        count = int(part[1:])
        # below the vocabulary's last id, which may be the image token's
        row.ids += torch.randint(0, VOCABULARY - 1, (count,), generator=generator).tolist()
        row.turn += [{"s": NO_TURN, "t": 0, "g": 0, "u": 1}[part[0]]] * count
        row.grounded += [part[0] == "g"] * count
    return row


def batch_of(
    notations: Sequence[str],
    *,
    image_token_id: int = VOCABULARY,
    seed: int = 0,
    pad_id: int = 0,
    extra_padding: int = 0,
    num_filler: int = 0,
) -> Batch:
    """The micro-batch of these samples. A sample is the same whatever stands beside it: its tokens and pixels come from
    `seed` and its notation alone. The last `num_filler` are filler."""
    rows, pixels = [], []
    for index, notation in enumerate(notations):
        order = sum(map(ord, notation)) + 1000 * notations[:index].count(notation)
        generator = torch.Generator().manual_seed(seed * 100_003 + order)
        rows.append(row_of(notation, image_token_id, generator))
        pixels += list(torch.randn(rows[-1].num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator))
    shape = (len(rows), max(len(row.ids) for row in rows) + extra_padding)
    ids, mask = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.long)
    turn, grounded = torch.full(shape, NO_TURN, dtype=torch.int32), torch.zeros(shape, dtype=torch.bool)
    for b, row in enumerate(rows):
        ids[b, : len(row.ids)] = torch.tensor(row.ids)
        mask[b, : len(row.ids)] = 1
        if b < len(rows) - num_filler:
            turn[b, : len(row.ids)] = torch.tensor(row.turn, dtype=torch.int32)
            grounded[b, : len(row.ids)] = torch.tensor(row.grounded)
    labels = torch.where(turn != NO_TURN, ids, IGNORE_INDEX)
    num_real = len(rows) - num_filler
    return Batch(
        input_ids=ids, attention_mask=mask, labels=labels, turn=turn, grounded=grounded,
        image_mask=(ids == image_token_id) & mask.bool(),
        pixel_values=torch.stack(pixels) if pixels else torch.zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE),
        num_samples=num_real, num_tokens=int(mask[:num_real].sum()), num_targets=int((labels != IGNORE_INDEX).sum()),
        rows=[("data", b) for b in range(num_real)], ids=[None] * num_real,
    )  # fmt: skip


def packed_of(batch: Batch, layout: Sequence[Sequence[int]], *, pad_id: int = 0) -> Batch:
    """The same samples (none of them filler) in packed rows, laid out by the numbers of `layout`."""
    image_token_id = int(batch.input_ids[batch.image_mask][0]) if batch.image_mask.any() else VOCABULARY
    encoded = []
    for b, mask in enumerate(batch.attention_mask.bool()):
        ids, turn = batch.input_ids[b, mask].numpy(), batch.turn[b, mask].numpy()
        num_images = int(batch.image_mask[b].sum()) // NUM_IMAGE_TOKENS
        encoded.append(Encoded(ids, turn != NO_TURN, turn, batch.grounded[b, mask].numpy(), num_images))
    return Batch.of(collate(
        encoded, list(batch.pixel_values.numpy()), pad_token_id=pad_id, image_token_id=image_token_id,
        rows=batch.rows, ids=batch.ids, image_shape=(3, IMAGE_SIZE, IMAGE_SIZE), layout=layout,
    ))  # fmt: skip


def blind_mask(image: Tensor, window: int | None) -> Tensor:
    """(1, 1, T, T) float32 mask of one sample: causal, no image key but a position's own, within the window if any.

    This is the masked form of q: the image stays in the sequence, nothing but the image itself looks at it.
    """
    index = torch.arange(len(image))
    distance = index.unsqueeze(1) - index.unsqueeze(0)
    seen = (distance >= 0) & ~image.unsqueeze(0)
    if window is not None:
        seen &= distance < window
    seen |= (distance == 0) & image
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


def masked_hidden(decoder: Any, embeds: Tensor, image: Tensor) -> Tensor:
    """(T, D) last hidden states of one sample (T, D) by the masked form, positions 0..T-1."""
    config = decoder.config
    window = getattr(config, "sliding_window", None)
    mask: Any = blind_mask(image, window if config.model_type == "mistral" else None)
    if config.model_type == "gemma2":
        mask = {"full_attention": mask, "sliding_attention": blind_mask(image, window)}
    positions = torch.arange(len(image)).unsqueeze(0)
    out = decoder(inputs_embeds=embeds.unsqueeze(0), attention_mask=mask, position_ids=positions, use_cache=False)
    hidden: Tensor = out.last_hidden_state[0]
    return hidden
