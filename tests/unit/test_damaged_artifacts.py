"""Is every kind of artifact that was damaged in the store named before it is used, with what to do, and never used?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpa_ray.data.prepared import Prepared
from dpa_ray.engine import assembling
from dpa_ray.engine.evaluate import evaluate
from dpa_ray.errors import UserError
from dpa_ray.recipe import Recipe
from dpa_ray.stages import instruct, proxy_llm, proxy_mllm
from dpa_ray.stages.pipeline import Pipeline, make_plan
from dpa_ray.stages.runs import Run
from dpa_ray.stages.spec import (
    ArtifactRef,
    BaseLlm,
    Connector,
    EvalTask,
    InstructTask,
    MergedProxy,
    MergeTask,
    ProxyAdapter,
    ProxyMllmTask,
    Weights,
)
from dpa_ray.store.artifacts import commit, find
from dpa_ray.store.fs import Store

KEY = "0123456789abcdef"
NONE = ArtifactRef("eval", KEY)
DATA = Prepared("d", 4, (("part-00000.parquet", (4,)),), 0)
FILES = {
    "base-llm": "model.safetensors", "base-vision": "model.safetensors", "proxy-llm": "adapter_model.safetensors",
    "proxy-merged": "model.safetensors", "blind": "shard-00000.parquet", "proxy-mllm": "connector.safetensors",
    "instruct": "model.safetensors", "instruct, placed": "model.safetensors", "metrics of proxy-mllm": "metrics.jsonl",
}  # fmt: skip


class Case:
    """One artifact of each kind, and what uses it."""

    def __init__(self, made: Recipe):
        self.recipe, self.store = made, Store(made.store)
        self.plan = make_plan(made, self.store, make=True, report=lambda _: None)
        self.base = BaseLlm(self.plan.llm)
        self.run = Run(self.store, made)

    def committed(self, kind: str, tmp: Path) -> ArtifactRef:
        """An artifact of `kind` with one file, of the right name but no content: whoever looked into it would fail."""
        stage = "instruct" if kind.startswith("instruct") else kind.removeprefix("metrics of ")
        (tmp / "made").mkdir()
        (tmp / "made" / FILES[kind]).write_bytes(b'{"stage": "proxy_mllm", "step": 1}\n' * 100)
        ref = ArtifactRef(stage, KEY)
        commit(self.store, stage, KEY, tmp / "made", inputs={}, meta={})
        return ref

    def use(self, kind: str, ref: ArtifactRef, tmp: Path) -> None:
        common: dict[str, Any] = {"result": NONE, "inputs": {}, "recipe": self.recipe, "run_path": "runs/a"}
        if kind in ("base-llm", "base-vision"):
            Weights("builtin:tiny", KEY, artifact=ref).located(self.store)
        elif kind == "proxy-llm":
            proxy_llm.merge(MergeTask(**common, base=self.base, adapter=ProxyAdapter(ref)), self.store, tmp)
        elif kind == "proxy-merged":
            proxy_mllm.build_stage(self._stage_two(common, MergedProxy(ref)), self.store)
        elif kind == "blind":
            scores = assembling.blind_scores(self._stage_two(common, self.base, ref), self.store)
            assert scores is not None
            scores.scores(0)
        elif kind == "proxy-mllm":
            task = InstructTask(
                **common, base=self.base, connector=Connector(ref), tower=self.plan.tower, data=DATA, num_steps=1
            )
            instruct.build_stage(task, self.store)
        elif kind == "instruct":
            evaluate(EvalTask(**common, base=self.base, model=ref, sets={}), self.store, torch.device("cpu"))
        else:
            stage = {"proxy-mllm": "proxy_mllm"}.get(ref.stage, ref.stage)
            self.plan.refs[stage], self.plan.found[stage] = ref, ref.found(self.store)
            pipeline = Pipeline(self.plan, self.store, self.run, report=lambda _: None)
            pipeline._place_model() if stage == "instruct" else pipeline._copy_metrics(stage)

    def _stage_two(self, common: dict[str, Any], llm: Any, blind: ArtifactRef | None = None) -> ProxyMllmTask:
        return ProxyMllmTask(
            **common, llm=llm, tokenizer=self.base, tower=self.plan.tower, data=DATA, num_steps=1, blind=blind
        )


@pytest.fixture
def case(recipe: Callable[..., Recipe]) -> Case:
    return Case(recipe())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (flip, "expected SHA-256"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, found"),
    "missing": (lambda path: path.unlink(), "found no file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_named_before_use_with_what_to_do(fault: str, case: Case, tmp_path: Path) -> None:
    for kind, name in FILES.items():
        (tmp_path / kind).mkdir()
        ref = case.committed(kind, tmp_path / kind)
        path = Path(case.store.url(f"{ref.path}/{name}"))
        whole = path.read_bytes()
        damage, found = FAULTS[fault]
        damage(path)
        with pytest.raises(UserError) as caught:
            case.use(kind, ref, tmp_path / kind)
        text = str(caught.value)
        assert f"{name}: expected" in text, (kind, text)
        assert found in text, (kind, text)
        assert f"delete {case.store.url(ref.path)} and run again: it is then made anew" in text, (kind, text)
        path.write_bytes(whole)
        case.store.delete(ref.path)  # as the message says
        assert find(case.store, ref.stage, ref.key) is None
    assert not case.store.list("runs"), "nothing was made of it"


def test_no_flipped_bit_of_a_manifest_is_taken(case: Case, tmp_path: Path) -> None:
    ref = case.committed("blind", tmp_path)
    path = Path(case.store.url(f"{ref.path}/manifest.json"))
    whole, artifact = path.read_bytes(), ref.found(case.store)
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        path.write_bytes(bytes(content))
        try:
            found = find(case.store, ref.stage, ref.key)
        except UserError as err:
            assert str(path) in str(err)
            assert "delete" in str(err)
        else:
            assert found is None or found == artifact, f"byte {place}"  # another's name; a blank that became another
