"""Does each stage train what it should, get what it should, and get made only where something needs it?"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpa_ray.data.prepare import Prepared
from dpa_ray.errors import UserError
from dpa_ray.model import lora, vlm
from dpa_ray.model.export import load_exported
from dpa_ray.model.vlm import ModelRef
from dpa_ray.recipe import Recipe, RecipeError, parse
from dpa_ray.recipe_yaml import apply_override
from dpa_ray.stages import instruct, proxy_llm, proxy_mllm
from dpa_ray.stages.pipeline import Pipeline, Plan, make_plan, num_steps
from dpa_ray.stages.preflight import trainables
from dpa_ray.stages.runs import Run, identity
from dpa_ray.stages.spec import (
    ArtifactRef,
    BaseLlm,
    Connector,
    EvalTask,
    InstructTask,
    MergedProxy,
    MergeTask,
    ProxyAdapter,
    ProxyLlmTask,
    ProxyMllmTask,
    Task,
    Weights,
    learning_rate,
)
from dpa_ray.stages.trainable import check_trainable, select_trainable
from dpa_ray.store.artifacts import commit, find
from dpa_ray.store.fs import Store
from tests.random_models import make_llm, make_vlm

# Learning rates


def test_learning_rate_by_hand() -> None:
    """10 steps, ceil(0.25 * 10) = 3 of warm-up: 1/3, 2/3, 1, then half a cosine over the other 7."""
    rates = [learning_rate(step, 10, 6.0, 0.25) for step in range(10)]
    assert rates[:4] == pytest.approx([2.0, 4.0, 6.0, 6.0])
    assert rates[4:] == pytest.approx([6 * 0.5 * (1 + math.cos(math.pi * k / 7)) for k in range(1, 7)])
    assert 0 < rates[-1] < 0.4, "the last step still moves"


@pytest.mark.parametrize(
    ("num", "fraction", "expected"),
    [
        (1, 0.03, [1.0]),  # a single step is all warm-up
        (1, 0.0, [1.0]),
        (2, 0.0, [1.0, 0.5]),
        (4, 1.0, [0.25, 0.5, 0.75, 1.0]),
        (4, 0.03, [1.0, 1.0, 0.75, 0.25]),  # 3 % of a few steps is one step
    ],
)
def test_learning_rate_at_the_edges(num: int, fraction: float, expected: list[float]) -> None:
    assert [learning_rate(step, num, 1.0, fraction) for step in range(num)] == pytest.approx(expected)


def test_learning_rate_of_zero_stays_zero() -> None:
    assert {learning_rate(step, 5, 0.0, 0.5) for step in range(5)} == {0.0}


# What is trained


CONNECTOR = {f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}


def stage_model(stage: str, mode: str) -> Any:
    """Stage 1's is a causal LLM with LoRA; the others are LLaVA, with LoRA where the mode says so."""
    if stage == "proxy_llm":
        llm = make_llm("llama")
        lora.attach(llm, rank=2, alpha=4, dropout=0.0, seed=0)
        return llm
    return make_vlm(lora_rank=2 if mode == "lora" else None)


def expected_names(model: Any, stage: str, mode: str) -> set[str]:
    """By what the method says, from names written out."""
    layers = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    root = "model.layers" if stage == "proxy_llm" else "model.language_model.layers"
    adapter = {f"{root}.{i}.{name}.lora_{ab}.default.weight" for i in (0, 1) for name in layers for ab in "AB"}
    if stage == "proxy_llm":
        return adapter
    if mode == "lora":
        return CONNECTOR | adapter
    if mode == "full":
        norms = ("input_layernorm", "post_attention_layernorm")
        return (
            CONNECTOR
            | {f"{root}.{i}.{name}.weight" for i in (0, 1) for name in (*layers, *norms)}
            | {"model.language_model.embed_tokens.weight", "model.language_model.norm.weight", "lm_head.weight"}
        )
    return CONNECTOR


STAGE_MODES = [("proxy_llm", "lora"), ("proxy_mllm", "frozen"), *(("instruct", m) for m in ("full", "lora", "frozen"))]


@pytest.mark.parametrize(("stage", "mode"), STAGE_MODES)
def test_each_stage_trains_exactly_its_set(stage: str, mode: str) -> None:
    """Whatever required a gradient before."""
    for before in (True, False):
        model = stage_model(stage, mode).requires_grad_(before)
        found = select_trainable(model, stage, mode)
        expected = expected_names(model, stage, mode)
        assert set(found.names) == expected
        assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
        named = dict(model.named_parameters())
        assert found.num_parameters == sum(named[name].numel() for name in expected)
        check_trainable(model, {id(named[n]) for n in expected}, found, stage, mode)


@pytest.mark.parametrize(("stage", "mode"), STAGE_MODES)
def test_one_too_many_or_too_few_stops(stage: str, mode: str) -> None:
    """In what has a gradient, in what the optimizer got, and in what was selected at the start."""
    model = stage_model(stage, mode)
    trained = select_trainable(model, stage, mode)
    named = dict(model.named_parameters())
    optimized = {id(named[name]) for name in trained.names}
    frozen = next(name for name in named if name not in trained.names)
    chosen = trained.names[-1]

    named[frozen].requires_grad_(True)
    with pytest.raises(RuntimeError, match=rf"parameters with a gradient.*too much: \['{frozen}'\], missing: \[\]"):
        check_trainable(model, optimized, trained, stage, mode)
    named[frozen].requires_grad_(False)
    named[chosen].requires_grad_(False)
    with pytest.raises(RuntimeError, match=rf"parameters with a gradient.*too much: \[\], missing: \['{chosen}'\]"):
        check_trainable(model, optimized, trained, stage, mode)
    named[chosen].requires_grad_(True)
    for wrong, words in (
        (optimized | {id(named[frozen])}, rf"in the optimizer.*too much: \['{frozen}'\]"),
        (optimized - {id(named[chosen])}, rf"in the optimizer.*missing: \['{chosen}'\]"),
    ):
        with pytest.raises(RuntimeError, match=words):
            check_trainable(model, wrong, trained, stage, mode)
    fewer = dataclasses.replace(trained, names=trained.names[:-1])
    with pytest.raises(RuntimeError, match="selected at the start"):
        check_trainable(model, optimized, fewer, stage, mode)
    check_trainable(model, optimized, trained, stage, mode)


def test_a_stage_that_would_train_nothing_stops() -> None:
    with pytest.raises(RuntimeError, match="nothing to train"):
        select_trainable(make_llm("llama"), "proxy_llm", "lora")


# What a stage is given


def weights_of(digest: str = "1") -> Weights:
    return Weights("somewhere", digest, ref=ModelRef("/somewhere"))


def common(recipe: Recipe) -> dict[str, Any]:
    return {
        "result": ArtifactRef("instruct", "0"), "inputs": {}, "recipe": recipe, "run_path": "runs/x",
        "tower": weights_of(), "data": Prepared("d", 1, (), 0), "num_steps": 1,
    }  # fmt: skip


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


# Recipes and their keys


@pytest.fixture(scope="session")
def models(tiny_llm: Callable[..., Path], tiny_tower: Callable[..., Path]) -> dict[str, str]:
    """Small models in folders, hardly fitted."""
    llm = tiny_llm("llama", num_steps=1, reserved="none")
    return {
        "llm": str(llm), "vision": str(tiny_tower("clip")), "other_llm": str(tiny_llm("llama", num_steps=1, seed=1)),
        "other_vision": str(tiny_tower("clip", seed=1)),
    }  # fmt: skip


@pytest.fixture
def recipe(models: dict[str, str], tmp_path: Path) -> Callable[..., Recipe]:
    """`recipe("method=pmo", "stages.instruct.lr=1")`: a small one with overrides, in a store of this test's own."""

    def make(*overrides: str) -> Recipe:
        shapes = {"source": "builtin:shapes"}
        values: dict[str, Any] = {
            "name": "small", "store": str(tmp_path / "store"), "precision": "fp32",
            "model": {"llm": models["llm"], "vision": models["vision"]},
            "data": {
                "pretrain": {**shapes, "options": {"style": "ornate", "size": 10}},
                "instruct": {**shapes, "options": {"style": "qa", "size": 9, "seed": 1}},
                "eval": {**shapes, "options": {"style": "qa", "split": "heldout", "size": 4}},
            },
            "stages": {s: {"global_batch_size": 4} for s in ("proxy_llm", "proxy_mllm", "instruct")},
            "cluster": {"workers": 1, "gpus_per_worker": 0},
        }  # fmt: skip
        for override in overrides:
            error = apply_override(values, override)
            assert error is None, error
        return parse(values)

    return make


def keys_of(made: Recipe) -> dict[str, str]:
    plan = make_plan(made, Store(made.store), make=False, report=lambda _: None)
    return {name: ref.key for name, ref in plan.refs.items()}


ORDER = ("proxy_llm", "proxy_merged", "proxy_mllm", "instruct", "eval")

# Every key of a recipe: another value, and the first result that it changes (all later ones hang on that). None: none.
# A recipe key that is not here fails the test, so that whoever adds one must decide.
CHANGES: dict[str, tuple[Any, str | None]] = {
    "name": ("other", None),
    "store": ("/elsewhere", None),
    "precision": ("bf16", "proxy_llm"),
    "seed": (1, "proxy_llm"),
    "engine": ("torch", None),
    "deepspeed.zero_stage": (3, None),
    "cluster.workers": (2, None),
    "cluster.gpus_per_worker": (1, None),
    "cluster.cpus_per_worker": (1.5, None),
    "cluster.start_timeout_s": (5, None),
    "checkpoint.every_s": (9, None),
    "checkpoint.every_steps": (9, None),
    "checkpoint.keep": (9, None),
    "trackers.tensorboard": (False, None),
    "trackers.wandb": ({"project": "p"}, None),
    "trackers.mlflow": ({"tracking_uri": "u"}, None),
    "debug.record_samples": (True, None),
    "model.llm": ("OTHER_LLM", "proxy_llm"),
    "model.vision": ("OTHER_VISION", "proxy_mllm"),
    "model.vision_layer": (-3, "proxy_mllm"),
    "model.attention": ("eager", None),
    "model.image_size": (28, "proxy_mllm"),
    "model.template_date": ("01 Jan 2025", "instruct"),
    "data.pretrain.fraction": (0.5, "proxy_llm"),
    "data.pretrain.image_aspect": ("pad", "proxy_mllm"),
    "data.pretrain.options.style": ("terse", "proxy_llm"),
    "data.pretrain.options.split": ("heldout", "proxy_llm"),
    "data.pretrain.options.size": (11, "proxy_llm"),
    "data.pretrain.options.seed": (5, "proxy_llm"),
    "data.instruct.fraction": (0.5, "instruct"),
    "data.instruct.image_aspect": ("crop", "instruct"),
    "data.instruct.options.style": ("terse", "instruct"),
    "data.instruct.options.split": ("heldout", "instruct"),
    "data.instruct.options.size": (11, "instruct"),
    "data.instruct.options.seed": (5, "instruct"),
    "data.eval.options.style": ("terse", "eval"),
    "data.eval.options.split": ("train", "eval"),
    "data.eval.options.size": (11, "eval"),
    "data.eval.options.seed": (5, "eval"),
    "data.max_quarantined_fraction": (0.5, None),
    "data.shuffle_window": (7, "proxy_llm"),
    "data.prefetch_batches": (3, None),
    "data.workers": (3, None),
    "cmo.lower": (0.1, "proxy_mllm"),
    "cmo.upper": (0.7, "proxy_mllm"),
    "cmo.window": (5, "proxy_mllm"),
    "cmo.blind": ("live", None),
    "stages.proxy_mllm.weights": ("uniform", "proxy_mllm"),
    "stages.instruct.weights": ("logit", "instruct"),
    "stages.instruct.llm": ("lora", "instruct"),
    "eval.max_samples": (3, "eval"),
    "eval.batch_size": (3, None),
    "eval.max_new_tokens": (3, "eval"),
}
for _stage in ("proxy_llm", "proxy_mllm", "instruct"):
    for _key, _value in {
        "lr": 0.5, "epochs": 2, "global_batch_size": 5, "max_length": 99, "max_steps": 1, "grad_clip": 0.5,
        "betas": [0.8, 0.9], "weight_decay": 0.1, "warmup_fraction": 0.5,
    }.items():  # fmt: skip
        CHANGES[f"stages.{_stage}.{_key}"] = (_value, _stage)
    CHANGES[f"stages.{_stage}.micro_batch_size"] = (3, None)
    CHANGES[f"stages.{_stage}.gradient_checkpointing"] = (False, None)
for _key, _value in {"rank": 7, "alpha": 7, "dropout": 0.5}.items():
    CHANGES[f"stages.proxy_llm.lora.{_key}"] = (_value, "proxy_llm")
    CHANGES[f"stages.instruct.lora.{_key}"] = (_value, None)  # as long as instruct.llm is not lora

ELSEWHERE = {
    "method": "test_methods_share_what_they_have_in_common",
    "stages.proxy_llm.llm": "it has one value",
    "stages.proxy_llm.from": "test_an_adapter_of_ones_own_takes_the_place_of_stage_one",
    "stages.proxy_mllm.from": "test_a_connector_of_ones_own_takes_the_place_of_stages_one_and_two",
    "data.eval_extra": "test_further_held_out_sets_are_in_the_key_of_eval_alone",
    "data.eval.fraction": "held-out sets are cut by eval.max_samples",
    "data.eval.image_aspect": "the finished model's own processor",
    **{f"data.{s}.{k}": "files: what lies there is in the digest" for s in ("pretrain", "instruct", "eval") for k in ("source", "images", "format")},
}  # fmt: skip


def leaves(values: dict[str, Any], path: str = "") -> set[str]:
    found: set[str] = set()
    for key, value in values.items():
        found |= leaves(value, f"{path}{key}.") if isinstance(value, dict) and value else {f"{path}{key}"}
    return found


def test_every_key_of_a_recipe_is_decided_upon(recipe: Callable[..., Recipe]) -> None:
    assert leaves(recipe().to_dict()) == set(CHANGES) | set(ELSEWHERE)


def test_each_key_changes_the_results_that_it_should(recipe: Callable[..., Recipe], models: dict[str, str]) -> None:
    before = keys_of(recipe())
    assert tuple(before) == ORDER
    names = {"OTHER_LLM": models["other_llm"], "OTHER_VISION": models["other_vision"]}
    wrong = {}
    for key, (value, first) in CHANGES.items():
        made = recipe(f"{key}={json.dumps(names.get(value, value) if isinstance(value, str) else value)}")
        after = keys_of(made.model_copy(update={"store": recipe().store}))
        expected = set(ORDER[ORDER.index(first) :]) if first else set()
        found = {name for name in ORDER if after[name] != before[name]}
        if found != expected:
            wrong[key] = (sorted(found), sorted(expected))
    assert not wrong


def test_loras_of_stage_three_count_where_it_has_one(recipe: Callable[..., Recipe]) -> None:
    before = keys_of(recipe("stages.instruct.llm=lora"))
    after = keys_of(recipe("stages.instruct.llm=lora", "stages.instruct.lora.rank=7"))
    assert {name for name in ORDER if after[name] != before[name]} == {"instruct", "eval"}


def test_a_default_said_aloud_is_the_same(recipe: Callable[..., Recipe]) -> None:
    said = recipe(
        "data.pretrain.image_aspect=crop", "data.instruct.image_aspect=pad", "cmo.lower=0.05", "cmo.upper=0.5",
        "stages.instruct.weights=prob",
    )  # fmt: skip
    assert keys_of(said) == keys_of(recipe())


def test_uniform_weights_have_no_bounds(recipe: Callable[..., Recipe]) -> None:
    bounds = ("cmo.lower=0.1", "cmo.upper=0.9", "cmo.window=7")
    assert keys_of(recipe("method=vanilla", *bounds)) == keys_of(recipe("method=vanilla"))
    assert keys_of(recipe("method=pmo", *bounds)) == keys_of(recipe("method=pmo"))


def test_methods_share_what_they_have_in_common(recipe: Callable[..., Recipe]) -> None:
    """The proxy of pmo and dpa; nothing else of any two, but where the switches are the same by hand."""
    found = {m: keys_of(recipe(f"method={m}")) for m in ("vanilla", "pmo", "cmo", "cal", "dpa")}
    assert [set(found[m]) for m in ("vanilla", "cmo", "cal")] == [{"proxy_mllm", "instruct", "eval"}] * 3
    assert found["pmo"]["proxy_llm"] == found["dpa"]["proxy_llm"]
    assert found["pmo"]["proxy_merged"] == found["dpa"]["proxy_merged"]
    for name in ("proxy_mllm", "instruct", "eval"):
        assert len({keys[name] for keys in found.values()}) == 5
    by_hand = keys_of(recipe("method=pmo", "stages.proxy_mllm.weights=prob", "stages.instruct.weights=prob"))
    assert by_hand == found["dpa"]


def test_further_held_out_sets_are_in_the_key_of_eval_alone(recipe: Callable[..., Recipe]) -> None:
    extra = 'data.eval_extra={pairs: {source: "builtin:shapes", options: {split: heldout_pairs, size: 3}}}'
    before, after = keys_of(recipe()), keys_of(recipe(extra))
    assert {name for name in ORDER if after[name] != before[name]} == {"eval"}


def test_another_file_of_the_same_model_folder_is_another_model(
    recipe: Callable[..., Recipe], models: dict[str, str], tmp_path: Path
) -> None:
    """Weights, tokenizer and configs are what a model is; where it lies is not."""
    import shutil

    shutil.copytree(models["llm"], tmp_path / "copy")
    moved = recipe(f"model.llm={tmp_path / 'copy'}")
    assert keys_of(moved) == keys_of(recipe())
    config = tmp_path / "copy" / "tokenizer_config.json"
    config.write_text(config.read_text() + "\n")
    assert keys_of(moved) != keys_of(recipe())


def test_a_dry_run_writes_nothing(recipe: Callable[..., Recipe]) -> None:
    made = recipe()
    make_plan(made, Store(made.store), make=False, report=lambda _: None)
    assert not Path(made.store).exists() or not list(Path(made.store).rglob("*"))


# What is needed, and in which order


def plan_of(recipe: Recipe, *, found: Sequence[str], has_eval: bool = True) -> Plan:
    plan = Plan(recipe, weights_of(), weights_of(), {})
    names = ORDER if plan.has_proxy else ("proxy_mllm", "instruct", "eval")
    for name in names:
        if has_eval or name != "eval":
            plan.refs[name] = ArtifactRef(name, "0")
    plan.found = dict.fromkeys(found)  # type: ignore[misc]
    return plan


@pytest.mark.parametrize(
    ("found", "needed"),
    [
        ([], ORDER),
        (["proxy_llm"], ("proxy_merged", "proxy_mllm", "instruct", "eval")),
        (["proxy_merged"], ("proxy_mllm", "instruct", "eval")),  # the adapter is gone, and nobody asks for it
        (["proxy_mllm"], ("instruct", "eval")),
        (["instruct"], ("eval",)),
        (["instruct", "eval"], ()),
        (["eval"], ("proxy_llm", "proxy_merged", "proxy_mllm", "instruct")),  # the model itself is always wanted
        (["proxy_llm", "proxy_mllm"], ("instruct", "eval")),
        (["proxy_llm", "proxy_merged", "instruct"], ("eval",)),
    ],
)
def test_only_what_something_absent_needs_is_made(
    found: list[str], needed: tuple[str, ...], recipe: Callable[..., Recipe]
) -> None:
    assert plan_of(recipe(), found=found).needed == needed


def test_methods_without_a_proxy_never_need_one(recipe: Callable[..., Recipe]) -> None:
    for method in ("vanilla", "cmo", "cal"):
        plan = plan_of(recipe(f"method={method}"), found=[])
        assert plan.needed == ("proxy_mllm", "instruct", "eval")
        assert plan.stages == ("proxy_mllm", "instruct")
    assert plan_of(recipe("method=pmo"), found=[], has_eval=False).needed == ORDER[:-1]


class Launched:
    """Stands in for the workers: commits a file for each task, and remembers the tasks."""

    def __init__(self, store: Store, tmp_path: Path):
        self.store, self.folder = store, tmp_path
        self.tasks: list[Task] = []

    def __call__(self, tasks: Sequence[Task]) -> None:
        self.tasks += tasks
        for task in tasks:
            folder = self.folder / f"{task.result.stage}-{task.result.key}"
            folder.mkdir()
            (folder / "result.txt").write_text(task.result.stage)
            (folder / "metrics.jsonl").write_text(json.dumps({"stage": task.stage, "step": 1, "loss": 2.5}) + "\n")  # type: ignore[attr-defined]
            commit(self.store, task.result.stage, task.result.key, folder, inputs=task.inputs, meta={})


def carry_out(made: Recipe, tmp_path: Path) -> list[Any]:
    """Plan and carry out; gives the tasks that were launched."""
    store = Store(made.store)
    plan = make_plan(made, store, make=True, report=lambda _: None)
    launched = Launched(store, Path(tmp_path) / f"made-{len(list(tmp_path.iterdir()))}")
    launched.folder.mkdir()
    Pipeline(plan, store, Run(store, made), report=lambda _: None).carry_out(launched)
    return launched.tasks


def test_tasks_hand_over_by_artifact_in_order(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    made = recipe()
    tasks = carry_out(made, tmp_path)
    assert [type(task) for task in tasks] == [ProxyLlmTask, MergeTask, ProxyMllmTask, InstructTask, EvalTask]
    proxy, merge, mllm, tuned, held_out = tasks
    assert merge.adapter == ProxyAdapter(proxy.result)
    assert mllm.llm == MergedProxy(merge.result)
    assert tuned.connector == Connector(mllm.result)
    assert held_out.model == tuned.result
    assert proxy.base == merge.base == mllm.tokenizer == tuned.base == BaseLlm(proxy.base.weights)
    assert proxy.base.weights.ref == ModelRef(made.model.llm)
    assert (proxy.data.num_rows, mllm.data.num_rows, tuned.data.num_rows) == (10, 10, 9)
    assert proxy.data.digest == mllm.data.digest != tuned.data.digest
    assert (proxy.num_steps, tuned.num_steps) == (3, 3)
    assert {name: data.num_rows for name, data in held_out.sets.items()} == {"heldout": 4}
    store = Store(made.store)
    assert store.read_bytes("runs/small/model/result.txt") == b"instruct"
    assert store.list("runs/small/model") == ["result.txt"], "the metrics of a stage are no part of the model"


def test_without_a_proxy_stage_two_has_the_base_llm(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    tasks = carry_out(recipe("method=cmo", "data.eval=null"), tmp_path)
    assert [type(task) for task in tasks] == [ProxyMllmTask, InstructTask]
    assert tasks[0].llm == tasks[0].tokenizer == tasks[1].base
    assert isinstance(tasks[0].llm, BaseLlm)


def test_what_is_there_is_reused_and_told(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Under another name nothing is launched; with another learning rate of stage 3, stage 3 and what hangs on it."""
    carry_out(recipe(), tmp_path)
    again = recipe("name=again", "cluster.workers=3", "engine=torch")
    assert carry_out(again, tmp_path) == []
    store = Store(again.store)
    assert store.read_bytes("runs/again/model/result.txt") == b"instruct"
    told = store.read_json("runs/again/run.json")["artifacts"]
    assert {stage for stage, entry in told.items() if entry.get("reused")} == {
        "proxy-llm",
        "proxy-merged",
        "proxy-mllm",
        "instruct",
    }
    lines = [json.loads(line) for line in store.read_bytes("runs/again/metrics.jsonl").decode().splitlines()]
    assert [(line["stage"], line["loss"]) for line in lines] == [
        (s, 2.5) for s in ("proxy_llm", "proxy_mllm", "instruct")
    ]

    other = carry_out(recipe("name=other", "stages.instruct.lr=0.125"), tmp_path)
    assert [type(task) for task in other] == [InstructTask, EvalTask]
    vanilla = carry_out(recipe("name=vanilla", "method=vanilla"), tmp_path)
    assert [type(task) for task in vanilla] == [ProxyMllmTask, InstructTask, EvalTask]


def test_a_deleted_artifact_is_made_again_where_it_is_needed(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    made = recipe()
    tasks = carry_out(made, tmp_path)
    store = Store(made.store)
    store.delete(tasks[0].result.path)
    assert carry_out(made, tmp_path) == [], "nobody needs the adapter any more"
    store.delete(tasks[3].result.path)
    assert [type(task) for task in carry_out(made, tmp_path)] == [InstructTask]


# Artifacts of one's own


def test_an_adapter_of_ones_own_takes_the_place_of_stage_one(
    recipe: Callable[..., Recipe], models: dict[str, str], tmp_path: Path
) -> None:
    llm = vlm.load_llm(ModelRef(models["llm"]), torch.float32)
    peft_model = lora.attach(llm, rank=2, alpha=4, dropout=0.0, seed=0)
    tensors = {f"base_model.model.{n}": p for n, p in llm.named_parameters() if p.requires_grad}
    lora.save_adapter(peft_model, tensors, tmp_path / "mine", base_name="x")
    made = recipe(f"stages.proxy_llm.from={tmp_path / 'mine'}", "data.eval=null")
    tasks = carry_out(made, tmp_path)
    assert [type(task) for task in tasks] == [MergeTask, ProxyMllmTask, InstructTask]
    folder = tasks[0].adapter.artifact.fetched(Store(made.store))
    for name in lora.ADAPTER_FILES:
        assert (folder / name).read_bytes() == (tmp_path / "mine" / name).read_bytes()
    first = keys_of_made(made)
    file = tmp_path / "mine" / "adapter_model.safetensors"
    save_file({name: t + 1 for name, t in load_file(file).items()}, file, {"format": "pt"})
    assert not set(first.values()) & set(keys_of_made(made).values()), "by what is in it, not by where it lies"


def keys_of_made(made: Recipe) -> dict[str, str]:
    plan = make_plan(made, Store(made.store), make=True, report=lambda _: None)
    return {name: ref.key for name, ref in plan.refs.items()}


def test_a_connector_of_ones_own_takes_the_place_of_stages_one_and_two(
    recipe: Callable[..., Recipe], random_connector: Path, tmp_path: Path
) -> None:
    """The proxy has no other use than to train one."""
    made = recipe(f"stages.proxy_mllm.from={random_connector}", "data.eval=null")
    tasks = carry_out(made, tmp_path)
    assert [type(task) for task in tasks] == [InstructTask]
    taken = load_file(tasks[0].connector.artifact.fetched(Store(made.store)) / vlm.CONNECTOR_FILE)
    assert all(torch.equal(taken[name], t) for name, t in load_file(random_connector).items())


@pytest.mark.parametrize("stage", ["proxy_llm", "proxy_mllm"])
def test_what_is_not_there_cannot_be_taken(stage: str, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    made = recipe(f"stages.{stage}.from={tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match=rf"stages.{stage}.from: expected a file or folder, found none at .*nowhere"):
        make_plan(made, Store(made.store), make=True, report=lambda _: None)


# Names of runs


def test_a_name_taken_by_another_recipe_is_refused(recipe: Callable[..., Recipe]) -> None:
    made = recipe()
    store = Store(made.store)
    Run(store, made).check_name()
    Run(store, made).write("finished")
    Run(store, made).check_name()
    with pytest.raises(
        RecipeError, match="the run small exists in this store with another recipe: its digest is"
    ) as caught:
        Run(store, recipe("stages.instruct.lr=0.125")).check_name()
    assert caught.value.errors[0][0] == "name"
    assert identity(made) in str(caught.value)
    Run(store, recipe("name=other", "stages.instruct.lr=0.125")).check_name()


def test_a_name_goes_on_with_what_says_how_alone(recipe: Callable[..., Recipe]) -> None:
    """By the table of keys: what changes a result is another run; what changes none is not (but for a few, which may)."""
    base = identity(recipe())
    for key, (value, first) in CHANGES.items():
        if isinstance(value, str) and value.startswith("OTHER"):
            value = "/other"
        same = identity(recipe(f"{key}={json.dumps(value)}")) == base
        if first is not None:
            assert not same, f"{key} changes {first}"
        elif key not in ("data.max_quarantined_fraction", "eval.batch_size") and ".lora." not in key:
            assert same, f"{key} changes nothing"


def test_a_run_that_never_trained_leaves_its_name(recipe: Callable[..., Recipe]) -> None:
    store = Store(recipe().store)
    Run(store, recipe()).write("failed")
    other = recipe("stages.instruct.lr=0.125")
    Run(store, other).check_name()
    store.write_bytes("runs/small/metrics.jsonl", b"{}\n")
    with pytest.raises(RecipeError):
        Run(store, other).check_name()


def test_a_run_file_of_something_else_is_told(recipe: Callable[..., Recipe]) -> None:
    store = Store(recipe().store)
    store.write_json("runs/small/run.json", ["not ours"])
    with pytest.raises(UserError, match="expected a run.json of dpa_ray, found something else"):
        Run(store, recipe()).check_name()


def test_number_of_steps_by_hand(recipe: Callable[..., Recipe]) -> None:
    """10 samples by 4: 3 steps an epoch; half of them: 5 samples, 2 steps."""
    ten = Prepared("d", 10, (("a", (6,)), ("b", (3, 1))), 0)
    assert num_steps(recipe(), "proxy_llm", ten) == 3
    assert num_steps(recipe("stages.proxy_llm.epochs=2"), "proxy_llm", ten) == 6
    assert num_steps(recipe("data.pretrain.fraction=0.5"), "proxy_llm", ten) == 2
    assert num_steps(recipe("data.pretrain.fraction=0.5"), "instruct", ten) == 3
    assert num_steps(recipe("stages.instruct.max_steps=2"), "instruct", ten) == 2
    assert num_steps(recipe("stages.instruct.max_steps=99"), "instruct", ten) == 3


# The stages as they are built and saved


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


def test_generation_stops_at_the_end_of_turn(
    recipe: Callable[..., Recipe], connector_artifact: Callable[[Store], ArtifactRef], tmp_path: Path
) -> None:
    made = recipe("stages.instruct.llm=frozen")
    store = Store(made.store)
    built = instruct.build_stage(instruct_task(made, connector_artifact(store)), store)
    built.save(trained(built.module.model, "instruct", "frozen"), tmp_path / "out")
    loaded, processor = load_exported(tmp_path / "out")
    ends = loaded.generation_config.eos_token_id
    end = processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert end in (ends if isinstance(ends, list) else [ends])
    assert built.encoder.image_token_id in loaded.generation_config.suppress_tokens
    assert loaded.generation_config.pad_token_id is not None


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


def test_stage_two_trains_a_fresh_connector_on_the_merged_proxy(
    recipe: Callable[..., Recipe], models: dict[str, str], tmp_path: Path
) -> None:
    """Its LLM is the artifact's, its tokenizer the base LLM's, its result the connector alone."""
    made = recipe("stages.proxy_mllm.gradient_checkpointing=true")
    store = Store(made.store)
    proxy = vlm.load_llm(ModelRef(models["other_llm"]), torch.float32)
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
