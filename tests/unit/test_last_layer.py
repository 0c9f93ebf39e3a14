"""Is what the last layer leaves out never missed, whatever the decoder?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dpa_ray.model import lora
from dpa_ray.model.last_layer import only_read
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


def test_where_nearly_all_is_read_all_is_computed() -> None:
    llm = make_llm("llama")
    rows, columns = torch.ones(SHAPE).nonzero(as_tuple=True)
    calls: list[int] = []
    llm.base_model.layers[1].mlp.register_forward_hook(lambda _, args, output: calls.append(args[0].shape[1]))
    with only_read(llm.base_model, rows, columns, SHAPE):
        llm.base_model(input_ids=torch.ones(SHAPE, dtype=torch.long), use_cache=False)
    assert calls == [SHAPE[1]]
