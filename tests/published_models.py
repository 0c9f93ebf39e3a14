"""The models of jobs/recipes without their weights: published configs, and small tokenizers in each family's style."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import CLIPConfig, Gemma2Config, LlamaConfig, Qwen2Config

from tests.encoders import CHATML, GEMMA2, HEADERS, IM, LLAMA31, TURNS, byte_level, sentencepiece

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""Of every model in the cache that `hub_cache` makes."""

CLIP = "openai/clip-vit-large-patch14-336"


def _llama() -> Any:
    return LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5, bos_token_id=128000, eos_token_id=128009,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip


def _qwen(width: int, middle: int, layers: int, heads: int, key_heads: int, rows: int, tied: bool) -> Any:
    return Qwen2Config(
        vocab_size=rows, hidden_size=width, intermediate_size=middle, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, max_position_embeddings=32768, rms_norm_eps=1e-6, bos_token_id=151643,
        eos_token_id=151645, tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )  # fmt: skip


def _gemma() -> Any:
    return Gemma2Config(
        vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
        num_key_value_heads=8, head_dim=256, max_position_embeddings=8192, sliding_window=4096, query_pre_attn_scalar=256,
        final_logit_softcapping=30.0, attn_logit_softcapping=50.0, bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip


CONFIGS = {
    "meta-llama/Llama-3.1-8B-Instruct": _llama,
    "Qwen/Qwen2.5-7B-Instruct": lambda: _qwen(3584, 18944, 28, 28, 4, 152064, tied=False),
    "Qwen/Qwen2.5-1.5B-Instruct": lambda: _qwen(1536, 8960, 28, 12, 2, 151936, tied=True),
    "google/gemma-2-9b-it": _gemma,
}

NUM_PARAMETERS = {
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "google/gemma-2-9b-it": 9_241_705_984,
}
"""What the model cards' safetensors hold; a tied head counts once."""


def _tokenizer(name: str) -> Any:
    """The family's special tokens, reserved ones and chat template over a vocabulary of some hundred tokens."""
    if name.startswith("meta-llama"):
        made = byte_level([*HEADERS, "<|reserved_special_token_0|>"], bos=HEADERS[0], adds_bos=True, has_image=False)
        made.chat_template, made.eos_token = LLAMA31, "<|eot_id|>"
    elif name.startswith("Qwen"):
        made = byte_level(IM, has_image=False)
        made.chat_template, made.eos_token = CHATML, "<|im_end|>"
    else:
        made = sentencepiece([*TURNS, "<unused0>"], bos="<bos>", eos="<eos>", prefix="never", has_image=False)
        made.chat_template = GEMMA2
    made.add_special_tokens({"pad_token": AddedToken("<pad>", special=True, normalized=False)})
    return made


def _clip(folder: Path) -> None:
    vision = dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    CLIPConfig(vision_config=vision, projection_dim=768).save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 336}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": 336, "width": 336}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], "do_convert_rgb": True,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def hub_cache(folder: Path) -> Path:
    """A cache of the hub under `folder`, as its client leaves it, with every model's config and small files."""
    for name in (*CONFIGS, CLIP):
        model = folder / f"models--{name.replace('/', '--')}"
        snapshot = model / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text(COMMIT)
        if name == CLIP:
            _clip(snapshot)
        else:
            _tokenizer(name).save_pretrained(snapshot)
            CONFIGS[name]().save_pretrained(snapshot)
    return folder
