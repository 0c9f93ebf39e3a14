"""Is what the last layer leaves out never missed, whatever the decoder?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dpa_ray.model import lora
from dpa_ray.model.last_layer import KNOWN, only_read
from dpa_ray.stages.build import checkpointing
from tests.random_models import VOCABULARY, make_llm

ROWS, COLUMNS = torch.tensor([0, 0, 1, 1]), torch.tensor([3, 9, 0, 9])
SHAPE = (2, 12)


def outcome(llm: Any, trained: Tensor, *, limited: bool, checkpointed: bool = False) -> tuple[Tensor, ...]:
    """Hidden states at ROWS, COLUMNS, and gradients of a sum over them by the embeddings and by `trained`."""
    llm.train()
    if checkpointed:
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(VOCABULARY, SHAPE, generator=torch.Generator().manual_seed(3))
    embeds = llm.get_input_embeddings()(ids).detach().requires_grad_()

    def call() -> Tensor:
        return llm.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[ROWS, COLUMNS]  # type: ignore[no-any-return]

    if limited:
        with only_read(llm.base_model, ROWS, COLUMNS, SHAPE):
            hidden = call()
    else:
        hidden = call()
    scale = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
    return hidden.detach(), *torch.autograd.grad((hidden * scale).sum(), [embeds, trained])


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mistral"])
def test_what_is_read_and_its_gradients_are_the_same(family: str, checkpointed: bool) -> None:
    llm = make_llm(family, window=4)
    trained = llm.base_model.layers[1].mlp.down_proj.weight
    whole = outcome(llm, trained, limited=False)
    torch.testing.assert_close(outcome(llm, trained, limited=True, checkpointed=checkpointed), whole)
    torch.testing.assert_close(outcome(llm, trained, limited=False), whole)  # nothing is left behind


SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "query_pre_attn_scalar": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "sliding_window": 5, "max_position_embeddings": 256, "initializer_range": 0.3, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0, "residual_dropout": 0.0,
}  # fmt: skip


def of_family(model_type: str) -> Any:
    """A small random causal LLM."""
    kind = type(AutoConfig.for_model(model_type))
    default = kind()
    config = kind(**{key: value for key, value in SMALL.items() if hasattr(default, key)})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in llm.parameters():  # some families leave theirs as they lie in memory, or begin with zeros
            torch.nn.init.normal_(parameter, std=0.3)
    return llm


@pytest.mark.parametrize("model_type", sorted(KNOWN))
def test_every_known_family_says_the_same_where_it_is_read(model_type: str) -> None:
    llm = of_family(model_type)
    trained = next(llm.base_model.layers[-1].parameters())
    assert num_hooks(llm) > 0, "there is something to leave out"
    torch.testing.assert_close(outcome(llm, trained, limited=True), outcome(llm, trained, limited=False))


def test_a_family_that_is_not_known_computes_all() -> None:
    """The last layer of Kimi Linear here mixes what its `q_proj` makes over positions."""
    llm = of_family("kimi_linear")
    assert hasattr(llm.base_model.layers[-1].self_attn, "q_proj")
    assert num_hooks(llm) == 0


def num_hooks(llm: Any) -> int:
    """Within `only_read`."""
    with only_read(llm.base_model, ROWS, COLUMNS, SHAPE):
        return sum(len(part._forward_hooks) for part in llm.modules())


def test_adapters_see_only_what_is_read() -> None:
    llm = make_llm("llama")
    lora.attach(llm, rank=2, alpha=4, dropout=0.0, seed=0)
    (trained,) = [p for name, p in llm.named_parameters() if "layers.1.mlp.down_proj.lora_B" in name]
    torch.nn.init.normal_(trained, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(outcome(llm, trained, limited=True), outcome(llm, trained, limited=False))


def test_the_rest_is_not_computed() -> None:
    llm = make_llm("llama")
    seen: dict[str, int] = {}
    for name, part in llm.named_modules():
        if name.endswith(("q_proj", "k_proj", "o_proj", "down_proj")):
            part.register_forward_hook(
                lambda _, args, output, name=name: seen.update({name: args[0].numel() // args[0].shape[-1]})
            )
    outcome(llm, llm.base_model.layers[1].mlp.down_proj.weight, limited=True)
    every, read = SHAPE[0] * SHAPE[1], len(ROWS) + 1  # the first position is always there
    assert {name.rpartition(".")[2]: n for name, n in seen.items() if ".0." in name} == dict.fromkeys(
        ("q_proj", "k_proj", "o_proj", "down_proj"), every
    )
    assert {name.rpartition(".")[2]: n for name, n in seen.items() if ".1." in name} == {
        "q_proj": read, "k_proj": every, "o_proj": read, "down_proj": read,
    }  # fmt: skip


def test_a_layer_that_is_recomputed_is_so_again_where_all_is_computed() -> None:
    llm = make_llm("llama")
    outcome(llm, llm.base_model.layers[1].mlp.down_proj.weight, limited=True, checkpointed=True)
    assert llm.base_model.layers[-1].gradient_checkpointing


def test_where_nearly_all_is_read_all_is_computed() -> None:
    llm = make_llm("llama")
    rows, columns = torch.ones(SHAPE).nonzero(as_tuple=True)
    calls: list[int] = []
    llm.base_model.layers[1].mlp.register_forward_hook(lambda _, args, output: calls.append(args[0].shape[1]))
    with only_read(llm.base_model, rows, columns, SHAPE):
        llm.base_model(input_ids=torch.ones(SHAPE, dtype=torch.long), use_cache=False)
    assert calls == [SHAPE[1]]


@pytest.mark.parametrize("num_read", [1, SHAPE[1]])
def test_it_is_not_recomputed_however_much_is_read(num_read: int) -> None:
    """Ranks that read more than others would gather sharded layers in another order (ZeRO-3)."""
    llm = make_llm("llama")
    checkpointing(llm, True)
    last = llm.base_model.layers[-1]
    rows, columns = torch.ones(SHAPE[0], num_read).nonzero(as_tuple=True)
    with only_read(llm.base_model, rows, columns, SHAPE):
        assert not last.gradient_checkpointing
        assert bool(last.mlp._forward_hooks) == (num_read == 1)
    assert last.gradient_checkpointing
