"""Is each artifact made only where something needs it, in order, and handed on by what it is?"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpa_ray.data.prepare import Prepared
from dpa_ray.data.retry import bridged_s
from dpa_ray.engine import assembling
from dpa_ray.errors import LeaseTaken, UserError
from dpa_ray.model import lora, vlm
from dpa_ray.model.vlm import ModelRef
from dpa_ray.recipe import Recipe, RecipeError
from dpa_ray.stages import pipeline
from dpa_ray.stages.pipeline import Pipeline, Plan, make_plan, num_steps
from dpa_ray.stages.runs import Run, identity
from dpa_ray.stages.spec import (
    ArtifactRef,
    BaseLlm,
    BlindTask,
    Connector,
    EvalTask,
    InstructTask,
    MergedProxy,
    MergeTask,
    ProxyAdapter,
    ProxyLlmTask,
    ProxyMllmTask,
    Task,
)
from dpa_ray.store.artifacts import commit, find
from dpa_ray.store.fs import Store
from tests.small_recipes import ORDER, weights_of


def plan_of(recipe: Recipe, *, found: Sequence[str], has_eval: bool = True) -> Plan:
    plan = Plan(recipe, weights_of(), weights_of(), {})
    names = [n for n in ORDER if n != "blind" or recipe.caches_blind("proxy_mllm")]
    names = names if plan.has_proxy else [n for n in names if "proxy" not in n or n == "proxy_mllm"]
    for name in names:
        if has_eval or name != "eval":
            plan.refs[name] = ArtifactRef(name, "0")
    plan.found = dict.fromkeys(found)  # type: ignore[misc]
    return plan


@pytest.mark.parametrize(
    ("found", "needed"),
    [
        ([], ORDER),
        (["proxy_llm"], ("proxy_merged", "blind", "proxy_mllm", "instruct", "eval")),
        (["proxy_merged", "blind"], ("proxy_mllm", "instruct", "eval")),
        (["blind"], ("proxy_llm", "proxy_merged", "proxy_mllm", "instruct", "eval")),  # stage 2 needs more than q
        (["proxy_merged"], ("blind", "proxy_mllm", "instruct", "eval")),  # the adapter is gone, and nobody asks for it
        (["proxy_mllm"], ("instruct", "eval")),
        (["instruct"], ("eval",)),
        (["instruct", "eval"], ()),
        (
            ["eval"],
            ("proxy_llm", "proxy_merged", "blind", "proxy_mllm", "instruct"),
        ),  # the model itself is always wanted
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
        assert plan.needed == (*(["blind"] if method != "vanilla" else []), "proxy_mllm", "instruct", "eval")
        assert plan.stages == ("proxy_mllm", "instruct")
    without_q = tuple(name for name in ORDER[:-1] if name != "blind")
    assert plan_of(recipe("method=pmo"), found=[], has_eval=False).needed == without_q
    assert plan_of(recipe("cmo.blind=live"), found=[], has_eval=False).needed == without_q


def test_a_frozen_llm_in_stage_three_has_its_q_computed_before_it(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    made = recipe("stages.instruct.llm=frozen")
    tasks = carry_out(made, tmp_path)
    assert [task.result.stage for task in tasks] == [
        "proxy-llm", "proxy-merged", "blind", "proxy-mllm", "blind-instruct", "instruct", "eval",
    ]  # fmt: skip
    blind, tuned = tasks[4:6]
    assert isinstance(blind, BlindTask)
    assert blind.reader == tuned
    assert tuned.blind == blind.result
    assert carry_out(recipe("stages.instruct.llm=frozen", "stages.instruct.lr=0.5"), tmp_path)[0].stage == "instruct"
    plan = make_plan(made, Store(made.store), make=False, report=lambda _: None)
    assert plan.shown == ("proxy_llm", "blind", "proxy_mllm", "blind_instruct", "instruct")
    assert plan.needed == (), "all is there"


class Launched:
    """Stands in for the workers: commits a file for each task, and remembers the tasks."""

    def __init__(self, store: Store, tmp_path: Path):
        self.store, self.folder = store, tmp_path
        self.tasks: list[Task] = []
        self.meta: dict[str, Any] = {}

    def __call__(self, tasks: Sequence[Task]) -> None:
        self.tasks += tasks
        for task in tasks:
            folder = self.folder / f"{task.result.stage}-{task.result.key}"
            folder.mkdir()
            (folder / "result.txt").write_text(task.result.stage)
            (folder / "metrics.jsonl").write_text(json.dumps({"stage": task.stage, "step": 1, "loss": 2.5}) + "\n")  # type: ignore[attr-defined]
            commit(self.store, task.result.stage, task.result.key, folder, inputs=task.inputs, meta=self.meta)


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
    assert [type(task) for task in tasks] == [ProxyLlmTask, MergeTask, BlindTask, ProxyMllmTask, InstructTask, EvalTask]
    proxy, merge, blind, mllm, tuned, held_out = tasks
    assert blind.reader == mllm
    assert mllm.blind == blind.result
    assert blind.num_image_tokens == (28 // 7) ** 2
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


def test_all_that_reads_data_waits_for_s3_as_long_as_the_recipe_says(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[tuple[str, float]] = []
    at = {"exists": 1, "read_bytes": 1, "upload": 2}  # which argument is the path

    def noted(kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **options: Any) -> Any:
            if kind not in at or args[at[kind]].startswith("data/"):  # artifacts are written without
                waited.append((kind, bridged_s()))
            return call(*args, **options)

        return note

    monkeypatch.setattr(pipeline, "source_digest", noted("source_digest", pipeline.source_digest))
    for name in ("exists", "read_bytes", "upload", "arrow"):
        monkeypatch.setattr(Store, name, noted(name, getattr(Store, name)))
    made = recipe("data.retry_s=7", "stages.instruct.group_by_length=true")
    tuned = carry_out(made, tmp_path)[4]
    assert {kind for kind, _ in waited} == {
        "source_digest",
        "exists",
        "read_bytes",
        "upload",
        "arrow",
    }  # arrow: check_supervision
    num = len(waited)
    assembling.cursor_of(tuned, Store(made.store)).rows(0, 0)
    assert [kind for kind, _ in waited[num:]] == ["read_bytes"], "the sizes of its rows"
    assert {seconds for _, seconds in waited} == {7}
    assert bridged_s() == 0


def test_without_a_proxy_stage_two_has_the_base_llm(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    tasks = carry_out(recipe("method=cmo", "data.eval=null"), tmp_path)
    assert [type(task) for task in tasks] == [BlindTask, ProxyMllmTask, InstructTask]
    assert tasks[0].reader == tasks[1]
    assert tasks[1].llm == tasks[1].tokenizer == tasks[2].base
    assert isinstance(tasks[1].llm, BaseLlm)


def test_q_is_made_once_for_all_that_train_on_it(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Seeds, bounds, epochs and weights of a method without a proxy; bounds and epochs of one with. Live has none, and
    finds stage 2 where cached made it."""

    number = count()

    def kinds(*overrides: str) -> list[type[Task]]:
        made = recipe(f"name=run{next(number)}", "data.eval=null", *overrides)
        return [type(task) for task in carry_out(made, tmp_path)]

    assert kinds("method=cmo") == [BlindTask, ProxyMllmTask, InstructTask]
    for change in ("seed=8", "cmo.lower=0.2", "stages.proxy_mllm.epochs=2", "stages.proxy_mllm.weights=logit"):
        assert kinds("method=cmo", change) == [ProxyMllmTask, InstructTask], change
    assert kinds("method=cmo", "cmo.blind=live") == []
    assert kinds("cmo.blind=live") == [ProxyLlmTask, MergeTask, ProxyMllmTask, InstructTask]
    assert kinds() == []
    assert kinds("cmo.lower=0.2") == [BlindTask, ProxyMllmTask, InstructTask]
    assert kinds("cmo.lower=0.3") == [ProxyMllmTask, InstructTask]
    told = Store(recipe().store).read_json("runs/run9/run.json")["artifacts"]
    assert told["blind"]["reused"]
    assert not told["proxy-mllm"]["reused"]


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
        "blind",
        "proxy-mllm",
        "instruct",
        "eval",
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
    store.delete(tasks[4].result.path)
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
    assert [type(task) for task in tasks] == [MergeTask, BlindTask, ProxyMllmTask, InstructTask]
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


def test_what_another_run_makes_meanwhile_is_reused_with_its_metrics(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Another run of the same proxy finishes stage 1 and the merge while this one waits, and is at work on q then."""
    made = recipe()
    store = Store(made.store)
    plan = make_plan(made, store, make=True, report=lambda _: None)
    mine, other = (Launched(store, tmp_path / name) for name in ("mine", "other"))
    for launched in (mine, other):
        launched.folder.mkdir()
    asked: list[list[str]] = []

    def claim(tasks: Sequence[Task]) -> int:
        names = [task.result.stage for task in tasks]
        asked.append(names)
        if names[0] in ("proxy-llm", "proxy-merged"):
            other(tasks[:1])
            return 0
        return 1 if names[0] == "blind" else len(tasks)

    run = Run(store, made)
    pipeline_ = Pipeline(plan, store, run, report=lambda _: None)
    pipeline_.carry_out(mine, claim=claim)
    assert [task.result.stage for task in mine.tasks] == ["blind", "proxy-mllm", "instruct", "eval"]
    assert [names[0] for names in asked] == ["proxy-llm", "proxy-merged", "blind", "proxy-mllm"]
    assert pipeline_.reused == ("proxy_llm", "proxy_merged")
    lines = [json.loads(line) for line in store.read_bytes(f"{run.path}/metrics.jsonl").decode().splitlines()]
    assert [(line["stage"], line["reused"]) for line in lines] == [("proxy_llm", True)]
    assert store.read_json(f"{run.path}/run.json")["artifacts"]["proxy-llm"]["reused"]


def test_a_run_that_was_slower_to_a_stage_waits_for_it(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Another run takes the lease of stage 2 between the claim and the worker's look; this one had made all before it."""
    made = recipe()
    store = Store(made.store)
    plan = make_plan(made, store, make=True, report=lambda _: None)
    run = Run(store, made)
    mine, other = (Launched(store, tmp_path / name) for name in ("mine", "other"))
    for launched in (mine, other):
        launched.folder.mkdir()
    mine.meta = {"run": run.path}
    notes: list[str] = []

    def launch(tasks: Sequence[Task]) -> None:
        names = [task.result.stage for task in tasks]
        if "blind" in names:
            mine(tasks[: names.index("proxy-mllm")])
            raise LeaseTaken("process 1 on another machine is at work on this")
        mine(tasks)

    def claim(tasks: Sequence[Task]) -> int:
        if tasks[0].result.stage == "proxy-mllm":
            other(tasks[:1])
        return 0 if find(store, tasks[0].result.stage, tasks[0].result.key) else len(tasks)

    pipeline_ = Pipeline(plan, store, run, report=notes.append)
    pipeline_.carry_out(launch, claim=claim)
    assert [task.result.stage for task in mine.tasks] == ["proxy-llm", "proxy-merged", "blind", "instruct", "eval"]
    assert pipeline_.reused == ("proxy_mllm",)
    assert "process 1 on another machine is at work on this" in notes
