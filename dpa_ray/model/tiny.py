"""Where do the embedded default's models come from? A tiny Llama pretrained in seconds, and a tiny CLIP tower."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPVisionConfig, CLIPVisionModel, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpa_ray.batch import IGNORE_INDEX

BOS, PAD, END = "<|begin|>", "<|pad|>", "<|end|>"
ROLES = ("system", "user", "assistant")
MAX_WORDS = 1024

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('expected the role system, user or assistant, found ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each word of `vocabulary` and one for each byte, so that it encodes any text."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = Counter(word for text in vocabulary for word, _ in byte_level.pre_tokenize_str(text))
    special = [PAD, BOS, END, *(f"<|{role}|>" for role in ROLES)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    kept = sorted((w for w in words if len(w) > 1), key=lambda w: (-words[w], w))[:MAX_WORDS]
    ids = {token: i for i, token in enumerate([*special, *alphabet, *kept])}
    # Without merges, and with ignore_merges, a word of the vocabulary is one token and any other falls to bytes.
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=END, pad_token=PAD,
        extra_special_tokens=[f"<|{role}|>" for role in ROLES], clean_up_tokenization_spaces=False, padding_side="right",
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def llm_config(tok, *, hidden=128, layers=4, inter=384, heads=4, tie=False):
    return LlamaConfig(
        vocab_size=len(tok), hidden_size=hidden, intermediate_size=inter, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, max_position_embeddings=1024, rope_theta=10_000.0, tie_word_embeddings=tie,
        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id, initializer_range=0.02)
