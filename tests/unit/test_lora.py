"""Is the proxy's LoRA where it should be, and does it survive saving, loading and merging?"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpa_ray.errors import UserError
from dpa_ray.model import lora
from tests.random_models import VOCABULARY, make_llm
from tests.small_models import logits_of

FAMILIES = ["llama", "qwen2", "gemma2", "mistral"]


def attach(llm: Any, *, rank: int = 4, seed: int = 0) -> Any:
    return lora.attach(llm, rank=rank, alpha=8, dropout=0.0, seed=seed)


def trained_adapter(llm: Any, folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """An adapter that is not zero, saved as stage 1 saves one: from the tensors by the LLM's own names."""
    peft_model = attach(llm)
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    tensors = {f"base_model.model.{n}": p.detach() for n, p in llm.named_parameters() if p.requires_grad}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns where it would like to ask the hub for the base
        lora.save_adapter(peft_model, tensors, folder, base_name="somewhere/base")
    return peft_model, tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_is_on_every_linear_layer_but_the_head(family: str) -> None:
    llm = make_llm(family)
    attach(llm)
    adapted = {name.split(".lora_")[0] for name, p in llm.named_parameters() if p.requires_grad}
    layers = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert adapted == {f"model.layers.{i}.{layer}" for i in range(2) for layer in layers}
    assert all(".lora_" in name for name, p in llm.named_parameters() if p.requires_grad)


def test_a_fresh_adapter_changes_nothing_and_scales_by_alpha_over_rank() -> None:
    llm = make_llm("llama")
    ids = torch.arange(VOCABULARY).unsqueeze(0)
    before = logits_of(llm, input_ids=ids)
    attach(llm)
    assert torch.equal(logits_of(llm, input_ids=ids), before)
    layer = llm.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 2.0
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(0.1)
    x = torch.randn(3, 32)
    expected = (
        x @ layer.base_layer.weight.T + 2.0 * x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    )
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_lora_starts_from_its_seed_alone() -> None:
    """Neither from the global RNG, nor does it move that."""

    def start(seed: int, global_seed: int) -> Tensor:
        llm = make_llm("llama")
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        attach(llm, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([p.detach().flatten() for name, p in llm.named_parameters() if "lora_A" in name])

    assert torch.equal(start(1, 0), start(1, 99))
    assert not torch.equal(start(1, 0), start(2, 0))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_loads_on_the_base_llm(family: str, tmp_path: Path) -> None:
    """As PEFT loads any; its logits are the trained module's, and so are those of the merge (fp32 rounding: 1e-4)."""
    llm = make_llm(family)
    trained_adapter(llm, tmp_path)
    ids = torch.arange(VOCABULARY).unsqueeze(0)
    expected = logits_of(llm, input_ids=ids)
    assert (expected - logits_of(make_llm(family), input_ids=ids)).abs().max() > 0.1
    loaded = PeftModel.from_pretrained(make_llm(family), str(tmp_path))
    torch.testing.assert_close(logits_of(loaded, input_ids=ids), expected, rtol=0, atol=1e-6)
    merged = lora.merge(make_llm(family), tmp_path)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert type(merged) is type(make_llm(family))
    torch.testing.assert_close(logits_of(merged, input_ids=ids), expected, rtol=1e-4, atol=1e-4)


def test_the_adapter_folder_holds_lora_alone(tmp_path: Path) -> None:
    _, tensors = trained_adapter(make_llm("llama"), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {*lora.ADAPTER_FILES}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == len(tensors) == 2 * 7 * 2
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in saved)
    assert '"base_model_name_or_path": "somewhere/base"' in (tmp_path / "adapter_config.json").read_text()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_poisoned_adapter_is_refused(value: float, tmp_path: Path) -> None:
    trained_adapter(make_llm("llama"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[3]
    tensors[name][0, 0] = value
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"1 tensors are not finite, the first is {name}"):
        lora.merge(make_llm("llama"), tmp_path)


def test_what_is_no_adapter_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found no adapter_config\.json"):
        lora.check_adapter(tmp_path)
    trained_adapter(make_llm("llama"), tmp_path)
    lora.check_adapter(tmp_path)
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[:100])
    with pytest.raises(UserError, match="not readable as a PEFT adapter"):
        lora.check_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(whole)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"IA3"'))
    with pytest.raises(UserError, match="expected peft_type LORA, found IA3"):
        lora.check_adapter(tmp_path)


def test_an_adapter_of_another_llm_is_told(tmp_path: Path) -> None:
    trained_adapter(make_llm("llama", hidden_size=16), tmp_path)
    with pytest.raises(UserError, match="this adapter does not fit the LLM"):
        lora.merge(make_llm("llama"), tmp_path)
