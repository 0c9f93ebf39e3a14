"""What the tests train on: tiny language models, vision towers and LLaVA data sets, written to folders from a seed.

The language models are fitted for a moment to the data's own little language, in which every slot has a few
equally likely words. Their probabilities are then neither 0 nor 1, an image moves them both ways, and token weights
clamp at both bounds: with plain random weights p - q would be about 0 everywhere, and a wrong weight would not show.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipConfig,
    SiglipModel,
)

Family = Literal["llama", "qwen2", "gemma2", "mistral"]
Tower = Literal["clip", "siglip", "dinov2"]
Reserved = Literal["none", "row", "token"]

COLOURS, SHAPES, PLACES = ("red", "green", "blue"), ("square", "circle", "star"), ("left", "right")
QUESTIONS = ("Which colour is the shape?", "What shape is it?", "Where is the shape?")

# Chat templates in the style of each family. {BOS} becomes the family's BOS token, or nothing. Llama's reads the clock.
CHAT_TEMPLATES: dict[Family, str] = {
    "llama": (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{BOS}<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}<|eot_id|>"
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "qwen2": (
        "{BOS}{% if messages[0].role != 'system' %}<|im_start|>system\nBe terse.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "gemma2": (
        "{BOS}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "mistral": (
        "{BOS}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    ),
}

SPECIAL_TOKENS: dict[Family, list[str]] = {
    "llama": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "gemma2": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
    "mistral": ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"],
}

# BOS, EOS and padding token. Qwen2 has no BOS of its own (bos=True lends it one); Llama and Mistral have no padding
# token; Gemma-2's EOS is not what ends a turn.
ROLES: dict[Family, tuple[str, str, str | None]] = {
    "llama": ("<|begin_of_text|>", "<|eot_id|>", None),
    "qwen2": ("<|endoftext|>", "<|im_end|>", "<|endoftext|>"),
    "gemma2": ("<bos>", "<eos>", "<pad>"),
    "mistral": ("<s>", "</s>", None),
}
END_OF_TURN: dict[Family, str] = {
    "llama": "<|eot_id|>", "qwen2": "<|im_end|>", "gemma2": "<end_of_turn>", "mistral": "</s>"
}  # fmt: skip


SHARPEN = 2.5
"""How much larger the fitted models' logits are made."""

Scene = tuple[str, str, str]
"""Colour, shape and place: what an image would show."""


def scene(rng: random.Random) -> Scene:
    """A scene of the data's language."""
    return rng.choice(COLOURS), rng.choice(SHAPES), rng.choice(PLACES)


def caption(rng: random.Random, shown: Scene) -> str:
    """A caption of `shown`, terse or ornate."""
    colour, shape, place = shown
    return rng.choice(
        (f"A {colour} {shape} on the {place}.", f"On the {place} there is a truly marvellous {colour} {shape}.")
    )


def answer(question: str, rng: random.Random, shown: Scene) -> str:
    """An answer to one of QUESTIONS: one token, or a short sentence."""
    word = shown[QUESTIONS.index(question)]
    return rng.choice((word, f"It is {word}."))


def make_tokenizer(family: Family, *, bos: bool, reserved: Reserved = "none") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the special tokens and the chat template of `family`.

    `bos`: it puts BOS before every text by itself (and the chat template writes it); otherwise neither does.
    """
    rng = random.Random(0)
    texts = [caption(rng, scene(rng)) for _ in range(200)]
    texts += [f"{q} {answer(q, rng, scene(rng))}" for q in QUESTIONS for _ in range(60)]
    texts += ["Today Date: 26 Jul 2024", "system user assistant model Be terse."]
    special = list(SPECIAL_TOKENS[family]) + (["<|reserved_special_token_0|>"] if reserved == "token" else [])
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    bos_token, eos_token, pad_token = ROLES[family]
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos_token} $A",
            pair=f"{bos_token} $A {bos_token} $B",
            special_tokens=[(bos_token, core.token_to_id(bos_token))],
        )
    given = {"eos_token": eos_token, **({"pad_token": pad_token} if pad_token else {})}
    if bos or family != "qwen2":  # a BOS that exists is not one that the tokenizer adds
        given["bos_token"] = bos_token
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **given)
    tokenizer.chat_template = CHAT_TEMPLATES[family].replace("{BOS}", bos_token if bos else "")
    return tokenizer


def _config(family: Family, num_rows: int, *, tied: bool, sliding_window: int | None, tokenizer: Any) -> Any:
    common: dict[str, Any] = {
        "vocab_size": num_rows, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.15,
        "tie_word_embeddings": tied, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "dtype": "float32",
    }  # fmt: skip
    if family == "llama":
        return LlamaConfig(**common)
    if family == "qwen2":
        return Qwen2Config(**common, use_sliding_window=False)
    if family == "mistral":
        return MistralConfig(**common, head_dim=12, sliding_window=sliding_window or 16)
    return Gemma2Config(
        **common, head_dim=12, query_pre_attn_scalar=12, sliding_window=sliding_window or 64,
        final_logit_softcapping=10.0, attn_logit_softcapping=20.0,
    )  # fmt: skip


def _fit(model: Any, tokenizer: Any, seed: int, num_steps: int) -> None:
    """Teach the model the data's little language for some seconds: texts and conversations, half of them with a picture.

    A picture is 8 vectors at a random place near the start: the sum of its words' own vectors, and noise. So the model
    learns to look. What it sees in a tower's features is arbitrary, and by the sharpening at the end it is sure of it.
    """
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    embed = model.get_input_embeddings()
    width = embed.weight.shape[1]
    look = {word: torch.randn(width) for word in COLOURS + SHAPES + PLACES}
    for _ in range(num_steps):
        rows, labels = [], []
        for i in range(16):
            shown = scene(rng)
            text = caption(rng, shown) + "\n"
            if i % 2:
                question = rng.choice(QUESTIONS)
                turns = [{"role": "user", "content": question}]
                turns.append({"role": "assistant", "content": answer(question, rng, shown)})
                text = tokenizer.apply_chat_template(turns, tokenize=False, date_string="26 Jul 2024")
            ids = torch.tensor(tokenizer(text, add_special_tokens=i % 2 == 0)["input_ids"])
            vectors, gold = embed(ids), ids
            if i % 4 < 2:
                picture = (sum(look[word] for word in shown) + torch.randn(8, width)) * rng.choice((0.1, 0.3, 1.0))
                at = rng.randint(0, 3)
                vectors = torch.cat([vectors[:at], picture, vectors[at:]])
                gold = torch.cat([gold[:at], torch.full((8,), -100), gold[at:]])
            rows.append(vectors)
            labels.append(gold)
        pad = torch.nn.utils.rnn.pad_sequence
        real = pad([torch.ones(len(r), dtype=torch.long) for r in rows], batch_first=True)
        logits = model(inputs_embeds=pad(rows, batch_first=True), attention_mask=real).logits
        gold = pad(labels, batch_first=True, padding_value=-100)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), gold[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    one = 1.0 if model.config.model_type == "gemma2" else 0.0  # Gemma-2's norm multiplies by 1 + weight
    with torch.no_grad():
        model.model.norm.weight.add_(one).mul_(SHARPEN).sub_(one)


def make_llm(
    folder: Path,
    family: Family,
    *,
    bos: bool = True,
    reserved: Reserved = "none",
    tied: bool | None = None,
    sliding_window: int | None = None,
    num_steps: int = 150,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write a decoder LLM with its tokenizer as transformers loads them.

    `reserved`: "row" leaves 5 embedding rows beyond the tokenizer, "token" adds `<|reserved_special_token_0|>`, "none"
    leaves no row unused. `tied`: input and output embedding are one (default: Gemma-2 only).
    """
    tokenizer = make_tokenizer(family, bos=bos, reserved=reserved)
    num_rows = len(tokenizer) + (5 if reserved == "row" else 0)
    tied = family == "gemma2" if tied is None else tied
    config = _config(family, num_rows, tied=tied, sliding_window=sliding_window, tokenizer=tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        _fit(model, tokenizer, seed, num_steps)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tower(folder: Path, kind: Tower, *, image_size: int = 28, patch_size: int = 7, seed: int = 0) -> Path:
    """Write a vision tower with its image processor, laid out as on the hub.

    CLIP and SigLIP come as the whole two-tower model (as openai/clip-... and google/siglip-... are), DINOv2 alone.
    """
    common: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
        "image_size": image_size, "patch_size": patch_size, "initializer_range": 0.2,
    }  # fmt: skip
    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64,
        "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    square = {"height": image_size, "width": image_size}
    processor: dict[str, Any] = {
        "do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "do_convert_rgb": True, "image_mean": mean, "image_std": std,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any
        if kind == "clip":
            model = CLIPModel(CLIPConfig(text_config=text, vision_config=common, projection_dim=16))
            kind_keys: dict[str, Any] = {
                "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": image_size},
                "do_center_crop": True, "crop_size": square,
            }  # fmt: skip
        elif kind == "siglip":
            vision = {k: v for k, v in common.items() if k != "initializer_range"}
            model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
            kind_keys = {
                "image_processor_type": "SiglipImageProcessor", "size": square,
                "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
            }  # fmt: skip
        else:
            model = Dinov2Model(Dinov2Config(**{**common, "layerscale_value": 1.0}))
            kind_keys = {
                "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": image_size},
                "do_center_crop": True, "crop_size": square,
            }  # fmt: skip
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, **kind_keys}, indent=1))
    return folder


@dataclass(frozen=True)
class LlavaData:
    """A LLaVA JSON file, its image folder, and the samples as they stand in the file, by id."""

    file: Path
    images: Path
    samples: dict[str, dict[str, Any]]


def make_images(folder: Path, num_images: int, *, seed: int = 0) -> list[str]:
    """PNG and JPEG files of differing sizes, aspect ratios and modes (RGB, grey, with alpha), bright and varied."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    names = []
    for i in range(num_images):
        width, height = (int(n) for n in rng.integers(18, 70, 2))
        blocks = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
        if i % 5 == 3:
            picture = picture.convert("L")
        if i % 5 == 4:
            picture.putalpha(Image.fromarray(rng.integers(0, 2, (height, width), dtype=np.uint8) * 255))
        names.append(f"{i:03d}.{'png' if i % 2 == 0 or picture.mode == 'RGBA' else 'jpg'}")
        picture.save(folder / names[-1], **({"quality": 95} if names[-1].endswith("jpg") else {}))
    return names


def write_llava(folder: Path, samples: Sequence[dict[str, Any]], name: str = "data.json") -> LlavaData:
    """Write `samples` (LLaVA records with unique ids) beside `folder`/images."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(list(samples), indent=1))
    return LlavaData(folder / name, folder / "images", {s["id"]: s for s in samples})


def make_captions(folder: Path, num_samples: int, *, text_only: Sequence[int] = (), seed: int = 0) -> LlavaData:
    """Image-caption pairs; the samples numbered in `text_only` have no image."""
    rng = random.Random(seed)
    names = make_images(folder / "images", num_samples, seed=seed)
    samples: list[dict[str, Any]] = []
    for i, image in enumerate(names):
        prompt = "Describe the image.\n<image>" if i % 3 else "<image>"
        if i in text_only:
            prompt = "Describe something."
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": caption(rng, scene(rng))}]
        samples.append({"id": f"c{i}", **({} if i in text_only else {"image": image}), "conversations": turns})
    return write_llava(folder, samples)


def make_conversations(
    folder: Path,
    num_samples: int,
    *,
    text_only: Sequence[int] = (),
    several_images: Sequence[int] = (),
    no_target: Sequence[int] = (),
    seed: int = 1,
) -> LlavaData:
    """Conversations of one to three question-answer turns about an image; placeholder before or after the question.

    `several_images`: samples with two images, the placeholders inside the question. `no_target`: samples whose first
    question is so long that a `max_length` of 150 tokens leaves no answer.
    """
    rng = random.Random(seed)
    names = make_images(folder / "images", num_samples + 1, seed=seed)
    samples: list[dict[str, Any]] = []
    for i in range(num_samples):
        turns: list[dict[str, str]] = []
        shown = scene(rng)
        for _ in range(rng.choice((1, 1, 2, 3))):
            question = rng.choice(QUESTIONS)
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer(question, rng, shown)}]
        record: dict[str, Any] = {"id": f"q{i}"}
        first = turns[0]
        if i in no_target:
            first["value"] = " ".join(rng.choice(COLOURS + SHAPES + PLACES) for _ in range(200))
        if i in several_images:
            record["image"] = [names[i], names[i + 1]]
            first["value"] = "Here <image> and there <image>\n" + first["value"]
        elif i not in text_only:
            record["image"] = names[i]
            first["value"] = f"<image>\n{first['value']}" if i % 2 else f"{first['value']}\n<image>"
        samples.append({**record, "conversations": turns})
    return write_llava(folder, samples)
