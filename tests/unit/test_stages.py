"""Is each stage built from the right parts, and is what it saves what was trained?"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from dpa_ray.errors import UserError
from dpa_ray.model import vlm
from dpa_ray.model.export import load_exported
from dpa_ray.model.step import vision_features
from dpa_ray.model.vlm import ModelRef
from dpa_ray.recipe import Recipe
from dpa_ray.stages import instruct, proxy_llm, proxy_mllm
from dpa_ray.stages.preflight import trainables
from dpa_ray.stages.spec import (
    ArtifactRef,
    BaseLlm,
    Connector,
    FullProxy,
    InstructTask,
    MergedProxy,
    MergeTask,
    ProxyAdapter,
    ProxyLlmTask,
    ProxyMllmTask,
    Weights,
)
from dpa_ray.stages.trainable import select_trainable
from dpa_ray.store.artifacts import commit, find
from dpa_ray.store.fs import Store
from tests.small_recipes import CONNECTOR, common, weights_of
from tests.tiny_models import END_OF_TURN, ROLES, Family


def test_stage_three_refuses_a_proxy(recipe: Callable[..., Recipe]) -> None:
    """The classic error: it would begin with the merged proxy, or with its adapter in place of the connector."""
    base, connector = BaseLlm(weights_of()), Connector(ArtifactRef("proxy-mllm", "2"))
    merged, adapter = MergedProxy(ArtifactRef("proxy-merged", "3")), ProxyAdapter(ArtifactRef("proxy-llm", "4"))
    InstructTask(**common(recipe()), base=base, connector=connector)
    for wrong in (
        {"base": merged},
        {"connector": adapter},
        {"connector": merged},
        {"base": adapter},
        {"base": weights_of()},
    ):
        with pytest.raises(TypeError, match="takes the base LLM and a connector, never a proxy"):
            InstructTask(**{**common(recipe()), "base": base, "connector": connector, **wrong})  # type: ignore[arg-type]


def test_a_template_that_writes_a_token_without_a_row_is_refused(
    recipe: Callable[..., Recipe], llm_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Its targets would index the head past its end, in the middle of a run."""
    folder = tmp_path / "llm"
    shutil.copytree(llm_folder("llama", reserved="none"), folder)
    tokenizer, num_rows = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder).vocab_size
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|late|>"]})
    assert tokenizer.convert_tokens_to_ids("<|late|>") == num_rows
    tokenizer.chat_template = tokenizer.chat_template.replace("<|eot_id|>", "<|late|>")
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        UserError, match=rf"chat template writes '<\|late\|>', token {num_rows}; expected a token below"
    ):
        from_configs(recipe(f"model.llm={folder}"))


def test_flash_attention_is_refused_where_the_blind_pass_needs_masks(
    recipe: Callable[..., Recipe], llm_folder: Callable[..., Path]
) -> None:
    sliding = f"model.llm={llm_folder('mistral', sliding_window=16)}"
    flash, short = (
        "model.attention=flash_attention_2",
        [f"stages.{s}.max_length=16" for s in ("proxy_mllm", "instruct")],
    )
    with pytest.raises(
        UserError, match=r"in stages\.proxy_mllm the pass without the image.*window \(16\).*expected sdpa"
    ):
        from_configs(recipe(sliding, flash))
    with pytest.raises(UserError, match=r"in stages\.instruct the pass.*max_length \(2048\)"):
        from_configs(recipe(sliding, flash, short[0]))
    with pytest.raises(UserError, match=r"losses of words"):
        from_configs(recipe(sliding, flash, "method=pmo"))
    for allowed in ([flash, *short], ["model.attention=sdpa"]):
        from_configs(recipe(sliding, *allowed))
    from_configs(recipe(flash))  # no layer slides


def test_flex_attention_is_refused_on_cpus(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=r"model.attention: flex_attention trains on GPUs only.*expected auto, sdpa"):
        from_configs(recipe("model.attention=flex_attention", "cluster.gpus_per_worker=0"))
    from_configs(recipe("model.attention=flex_attention", "cluster.gpus_per_worker=1"))


def from_configs(made: Recipe) -> Any:
    stages = ("proxy_llm", "proxy_mllm", "instruct")
    return trainables(made, ModelRef(made.model.llm), ModelRef(made.model.vision), stages)


@pytest.fixture
def connector_artifact(random_connector: Path, tmp_path: Path) -> Callable[[Store], ArtifactRef]:
    def make(store: Store) -> ArtifactRef:
        folder = tmp_path / "connector-artifact"
        folder.mkdir()
        (folder / vlm.CONNECTOR_FILE).write_bytes(random_connector.read_bytes())
        commit(store, "proxy-mllm", "1", folder, inputs={}, meta={})
        return ArtifactRef("proxy-mllm", "1")

    return make


def instruct_task(made: Recipe, connector: ArtifactRef) -> InstructTask:
    base = BaseLlm(Weights(made.model.llm, "1", ref=ModelRef(made.model.llm)))
    tower = Weights(made.model.vision, "2", ref=ModelRef(made.model.vision))
    return InstructTask(**{**common(made), "tower": tower}, base=base, connector=Connector(connector))


def trained(model: Any, stage: str, mode: str) -> dict[str, Tensor]:
    """Select, then move every trained parameter by something; gives them by name as an engine gathers them."""
    names = select_trainable(model, stage, mode).names
    with torch.no_grad():
        for index, (_, parameter) in enumerate((n, p) for n, p in model.named_parameters() if p.requires_grad):
            generator = torch.Generator().manual_seed(index)
            parameter += (torch.randn(parameter.shape, generator=generator) * 0.02).to(parameter.dtype)
    named = dict(model.named_parameters(remove_duplicate=False))
    return {name: named[name].detach().clone() for name in names}


def test_the_export_is_checked_with_the_attention_that_it_was_trained_with(
    recipe: Callable[..., Recipe], connector_artifact: Callable[[Store], ArtifactRef], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And a stage is trained with the attention that the recipe asks for."""
    made = recipe("model.attention=eager")
    store = Store(made.store)
    built = instruct.build_stage(instruct_task(made, connector_artifact(store)), store)
    built.save(trained(built.module.model, "instruct", made.stages.instruct.llm), tmp_path / "out")
    seen, probe = [], instruct.probe_logits

    def watched(model: Any, *rest: Any) -> Tensor:
        seen.append(model.model.language_model.config._attn_implementation)
        return probe(model, *rest)

    monkeypatch.setattr(instruct, "probe_logits", watched)
    sample = instruct.probe_sample(16, built.encoder.image_token_id, 28)
    device = torch.device("cpu")
    expected = instruct.probe_logits(built.module.model.eval(), sample, device, built.module.num_softmax_rows or 0)
    assert built.finish is not None
    built.finish(tmp_path / "out", expected, device)
    assert seen == ["eager", "eager"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["full", "lora", "frozen"])
def test_the_finished_model_is_the_trained_one(
    mode: str,
    precision: str,
    recipe: Callable[..., Recipe],
    connector_artifact: Callable[[Store], ArtifactRef],
    tmp_path: Path,
) -> None:
    """Built, trained (moved by hand), saved, loaded as any user would: the same logits. And what was frozen is the
    source's, bit for bit; in a LoRA run, no trace of an adapter but in the weights.

    1e-4 in fp32. bf16: the same numbers; but a LoRA is merged into bf16 weights, which rounds them (2^-9 relative each):
    logits up to 10 are off by 0.1, about as far as bf16 has them from fp32 anyway.
    """
    made = recipe(f"stages.instruct.llm={mode}", "stages.instruct.lora={rank: 4, alpha: 8}", f"precision={precision}")
    store = Store(made.store)
    built = instruct.build_stage(instruct_task(made, connector_artifact(store)), store)
    model = built.module.model
    assert set(from_configs(made)["instruct"].names) == set(select_trainable(model, "instruct", mode).names)
    start = load_file(Path(made.store) / "artifacts" / "proxy-mllm-1" / vlm.CONNECTOR_FILE)["linear_1.weight"]
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, start.to(model.dtype)), "stage 2's connector"
    tensors = trained(model, "instruct", mode)
    built.save(tensors, tmp_path / "out")
    loaded, processor = load_exported(tmp_path / "out")

    ids, pixels = instruct.probe_sample(16, built.encoder.image_token_id, 28)
    device, rows = torch.device("cpu"), built.module.num_softmax_rows or 0
    expected = instruct.probe_logits(model.eval(), (ids, pixels), device, rows)
    found = instruct.probe_logits(loaded, (ids, pixels), device, rows)
    assert loaded.dtype == found.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
    tolerance = 0.3 if (mode, precision) == ("lora", "bf16") else 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=tolerance)
    assert built.finish is not None
    built.finish(tmp_path / "out", expected, device)
    with pytest.raises(UserError, match="does not give the trained model's logits"):
        built.finish(tmp_path / "out", expected + 3, device)

    exported = load_file(tmp_path / "out" / "model.safetensors")
    source = load_file(Path(made.model.llm) / "model.safetensors")

    def same(name: str, source_name: str, files: dict[str, Tensor] = source) -> bool:
        found = [t for n, t in exported.items() if n.replace("language_model.model.", "language_model.").endswith(name)]
        wanted = next(t for n, t in files.items() if n.endswith(source_name))
        assert len(found) == 1, (name, sorted(exported))
        return found[0].dtype == wanted.dtype and torch.equal(found[0][: len(wanted)], wanted)

    assert same("lm_head.weight", "lm_head.weight") == (mode == "frozen" or (mode, precision) == ("lora", "fp32"))
    assert same("embed_tokens.weight", "embed_tokens.weight") == (
        mode == "frozen" or (mode, precision) == ("lora", "fp32")
    )
    query = "layers.0.self_attn.q_proj.weight"
    assert same(f"language_model.{query}", query) == (mode == "frozen")
    tower = load_file(Path(made.model.vision) / "model.safetensors")
    patches = "embeddings.patch_embedding.weight"
    assert same(patches, patches, {n: t for n, t in tower.items() if "vision" in n})
    assert not any("lora" in name for name in loaded.state_dict())
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == built.encoder.image_token_id


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generation_stops_at_the_end_of_turn_and_at_the_base_llms_eos(
    family: Family, recipe: Callable[..., Recipe], llm_folder: Callable[..., Path],
    connector_artifact: Callable[[Store], ArtifactRef], tmp_path: Path,
) -> None:  # fmt: skip
    """Llama's EOS is what ends a turn; Gemma-2's is another token."""
    made = recipe("stages.instruct.llm=frozen", f"model.llm={llm_folder(family)}")
    store = Store(made.store)
    built = instruct.build_stage(instruct_task(made, connector_artifact(store)), store)
    built.save(trained(built.module.model, "instruct", "frozen"), tmp_path / "out")
    loaded, processor = load_exported(tmp_path / "out")
    ends = loaded.generation_config.eos_token_id
    expected = {processor.tokenizer.convert_tokens_to_ids(token) for token in (END_OF_TURN[family], ROLES[family][1])}
    assert set(ends if isinstance(ends, list) else [ends]) == expected
    assert built.encoder.image_token_id in loaded.generation_config.suppress_tokens
    assert loaded.generation_config.pad_token_id is not None


def test_a_stage_scores_by_its_llms_capped_logits(
    recipe: Callable[..., Recipe], llm_folder: Callable[..., Path], connector_artifact: Callable[[Store], ArtifactRef]
) -> None:
    """As transformers has them of Gemma-2. 1e-5: fp32 sums in another order."""
    made = recipe("stages.instruct.llm=frozen", f"model.llm={llm_folder('gemma2')}")
    store = Store(made.store)
    module = instruct.build_stage(instruct_task(made, connector_artifact(store)), store).module.eval()
    ids, llm = torch.arange(8), vlm.load_llm(ModelRef(made.model.llm), torch.float32).eval()
    with torch.no_grad():
        hidden = module.decoder(input_ids=ids.unsqueeze(0), use_cache=False).last_hidden_state[0]
        found = module.scorer.score(hidden, ids).log_prob
        expected = llm(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].log_softmax(-1)[ids, ids]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def with_dropout(folder: str, copy: Path) -> Path:
    """A copy of a model's folder that drops attention while it trains."""
    shutil.copytree(folder, copy)
    values = json.loads((copy / "config.json").read_text())
    for section in (values, values.get("vision_config", {})):
        section["attention_dropout"] = 0.3
    (copy / "config.json").write_text(json.dumps(values))
    return copy


@pytest.mark.parametrize("stage", ["proxy_mllm", "instruct"])
def test_nothing_is_dropped_in_what_is_frozen(
    stage: str, recipe: Callable[..., Recipe], models: dict[str, str],
    connector_artifact: Callable[[Store], ArtifactRef], tmp_path: Path,
) -> None:  # fmt: skip
    """Train mode turns checkpointing on; p under dropout would be less than q for no reason of the image's."""
    llm, vision = (with_dropout(models[name], tmp_path / name) for name in ("llm", "vision"))
    made = recipe("stages.instruct.llm=frozen", f"model.llm={llm}", f"model.vision={vision}")
    store = Store(made.store)
    task = instruct_task(made, connector_artifact(store))
    if stage == "instruct":
        model = instruct.build_stage(task, store).module.train().model
    else:
        values = {**common(made), "tower": task.tower}
        model = (
            proxy_mllm.build_stage(ProxyMllmTask(**values, llm=task.base, tokenizer=task.base), store)
            .module.train()
            .model
        )
    pixels, ids = torch.randn(1, 3, 28, 28), torch.arange(8).unsqueeze(0)
    for read in (lambda: vision_features(model, pixels), lambda: model.model.language_model(ids).last_hidden_state):
        assert torch.equal(read(), read())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stage_one_saves_an_adapter_and_merges_it_in_the_runs_precision(
    precision: str, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """The merge is the base plus B A alpha / rank, in the run's precision, and a plain LLM with no row for `<image>`."""
    made = recipe(f"precision={precision}", "stages.proxy_llm.lora.rank=4", "stages.proxy_llm.lora.alpha=12")
    store = Store(made.store)
    base = BaseLlm(Weights("hub/name", "1", ref=ModelRef(made.model.llm)))
    values = {**common(made), "result": ArtifactRef("proxy-llm", "1")}
    del values["tower"]
    built = proxy_llm.build_stage(ProxyLlmTask(**values, base=base), store)
    assert built.image_processor is None
    assert set(from_configs(made)["proxy_llm"].names) == set(
        select_trainable(built.module.model, "proxy_llm", "lora").names
    )
    tensors = trained(built.module.model, "proxy_llm", "lora")
    built.save(tensors, tmp_path / "adapter")
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "hub/name"
    )
    commit(store, "proxy-llm", "1", tmp_path / "adapter", inputs={}, meta={})

    task = MergeTask(
        result=ArtifactRef("proxy-merged", "1"), inputs={}, recipe=made, run_path="runs/x", base=base,
        adapter=ProxyAdapter(ArtifactRef("proxy-llm", "1")),
    )  # fmt: skip
    proxy_llm.merge(task, store, tmp_path / "merged")
    merged = vlm.load_llm(ModelRef(str(tmp_path / "merged")), "auto")
    assert merged.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
    source = load_file(Path(made.model.llm) / "model.safetensors")
    assert merged.get_input_embeddings().weight.shape == source["model.embed_tokens.weight"].shape
    name = "model.layers.1.mlp.up_proj"
    a, b = (tensors[f"{name}.lora_{ab}.default.weight"].float() for ab in "AB")
    expected = source[f"{name}.weight"] + 3 * b @ a
    found = dict(merged.named_parameters())[f"{name}.weight"].float()
    # bf16: one rounding of the base and one of the sum, each of 2^-9 relative on weights up to 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if precision == "fp32" else 2**-8)
    assert (expected - source[f"{name}.weight"]).abs().max() > 1e-3


def test_a_proxy_trained_in_full_is_the_whole_llm_again(
    recipe: Callable[..., Recipe], models: dict[str, str], tmp_path: Path
) -> None:
    """What is merged has every trained number, whatever the base LLM's were; another LLM's parameters are refused."""
    made = recipe("stages.proxy_llm.llm=full")
    store = Store(made.store)
    base = BaseLlm(Weights("hub/name", "1", ref=ModelRef(made.model.llm)))
    values = {**common(made), "result": ArtifactRef("proxy-llm", "1")}
    del values["tower"]
    built = proxy_llm.build_stage(ProxyLlmTask(**values, base=base), store)
    assert from_configs(made)["proxy_llm"] == select_trainable(built.module.model, "proxy_llm", built.llm_mode)
    tensors = trained(built.module.model, "proxy_llm", "full")
    assert set(tensors) == {name for name, _ in vlm.load_llm(ModelRef(made.model.llm), "auto").named_parameters()}
    (tmp_path / "full").mkdir()
    built.save(tensors, tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == [proxy_llm.FULL_FILE]
    commit(store, "proxy-llm", "1", tmp_path / "full", inputs={}, meta={})
    task = MergeTask(
        result=ArtifactRef("proxy-merged", "1"), inputs={}, recipe=made, run_path="runs/x", base=base,
        adapter=FullProxy(ArtifactRef("proxy-llm", "1")),
    )  # fmt: skip
    proxy_llm.merge(task, store, tmp_path / "merged")
    merged = dict(vlm.load_llm(ModelRef(str(tmp_path / "merged")), "auto").named_parameters())
    assert all(torch.equal(merged[name], tensor) for name, tensor in tensors.items())
    del tensors["lm_head.weight"]
    (tmp_path / "other").mkdir()
    built.save(tensors, tmp_path / "other")
    commit(store, "proxy-llm", "2", tmp_path / "other", inputs={}, meta={})
    other = dataclasses.replace(task, adapter=FullProxy(ArtifactRef("proxy-llm", "2")))
    with pytest.raises(UserError, match=r"found others in 1 places, the first lm_head.weight: expected \(.*found None"):
        proxy_llm.merge(other, store, tmp_path / "never")


def test_stage_two_trains_a_fresh_connector_on_the_merged_proxy(
    recipe: Callable[..., Recipe], models: dict[str, str], tmp_path: Path
) -> None:
    """Its LLM is the artifact's, its tokenizer the base LLM's, its result the connector alone."""
    made = recipe("stages.proxy_mllm.gradient_checkpointing=true")
    store = Store(made.store)
    proxy = vlm.load_llm(ModelRef(models["other_llm"]), torch.float32)
    with torch.no_grad():
        proxy.get_input_embeddings().weight *= 1000  # far above what a new connector gives
    proxy.save_pretrained(tmp_path / "proxy")  # no tokenizer beside it
    commit(store, "proxy-merged", "1", tmp_path / "proxy", inputs={}, meta={})
    base = BaseLlm(Weights(made.model.llm, "1", ref=ModelRef(made.model.llm)))
    values = {**common(made), "tower": Weights(made.model.vision, "2", ref=ModelRef(made.model.vision))}
    values["result"] = ArtifactRef("proxy-mllm", "1")
    llm = MergedProxy(ArtifactRef("proxy-merged", "1"))
    built = proxy_mllm.build_stage(ProxyMllmTask(**values, llm=llm, tokenizer=base), store)
    model = built.module.model
    expected = proxy.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(model.model.language_model.layers[0].self_attn.q_proj.weight, expected)
    pixels = torch.randn(2, 3, model.config.vision_config.image_size, model.config.vision_config.image_size)
    images = model.model.multi_modal_projector(vision_features(model, pixels))
    assert images.square().mean().sqrt() > 0.8 * proxy.get_input_embeddings().weight.square().mean().sqrt()
    assert set(from_configs(made)["proxy_mllm"].names) == CONNECTOR
    tensors = trained(model, "proxy_mllm", "frozen")
    assert set(tensors) == CONNECTOR
    built.save(tensors, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == [vlm.CONNECTOR_FILE]
    again = proxy_mllm.build_stage(ProxyMllmTask(**values, llm=llm, tokenizer=base), store).module.model
    vlm.load_connector(again, tmp_path / "out" / vlm.CONNECTOR_FILE)
    for name, tensor in tensors.items():
        assert torch.equal(dict(again.named_parameters())[name], tensor), name
    assert find(store, "proxy-mllm", "1") is None, "building commits nothing"
