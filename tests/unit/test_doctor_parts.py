"""Are the doctor's parts right one by one: the store's probe, batch arithmetic, placing, step times, what a check says?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dpa_ray.data.cursor import shares
from dpa_ray.doctor import cost
from dpa_ray.doctor.cluster import smallest_gpu_bytes
from dpa_ray.doctor.findings import Findings, number
from dpa_ray.engine.placing import matches, place, problems
from dpa_ray.errors import UserError
from dpa_ray.recipe import Recipe
from dpa_ray.recipe_running import ClusterSection
from dpa_ray.report.metrics import MetricsLog
from dpa_ray.stages.arithmetic import batch_layout, risks
from dpa_ray.stages.runs import Run
from dpa_ray.store import probe
from dpa_ray.store.fs import Store
from tests.s3 import S3

# -- the store


def test_a_probe_tries_everything_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("mine")
    tried = probe.probe(Store(str(tmp_path)))
    assert [each.operation for each in tried] == list(probe.OPERATIONS)
    assert all(each.is_ok and not each.is_risk for each in tried)
    assert [p.name for p in tmp_path.rglob("*")] == ["old.txt"]


def test_a_store_that_was_not_there_is_not_there_after_a_probe(tmp_path: Path) -> None:
    tried = probe.probe(Store(str(tmp_path / "a/b")))
    assert all(each.is_ok for each in tried)
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_written_to_says_so_and_is_tried_no_further() -> None:
    tried = probe.probe(Store("/proc/nowhere"))
    assert [(each.operation, each.is_ok) for each in tried] == [("reach", True), ("write", False)]
    with pytest.raises(UserError, match=r"cannot write: /proc/nowhere/probe-.*see that these credentials may"):
        probe.check(Store("/proc/nowhere"))


def test_a_probe_knows_servers_that_ignore_conditions(s3_server: S3) -> None:
    tried = probe.probe(Store(f"{s3_server.uri}/some/prefix"))
    assert all(each.is_ok for each in tried), tried
    at_risk = [] if s3_server.honours_conditions else ["conditional put"]
    assert [each.operation for each in tried if each.is_risk] == at_risk
    assert s3_server.keys() == []


def test_a_bucket_that_does_not_exist_ends_the_probe(rclone_s3: S3) -> None:
    (tried,) = probe.probe(Store("s3://no-such-bucket/x"))
    assert (tried.operation, tried.is_ok) == ("reach", False)
    assert "no-such-bucket" in tried.detail


# -- batches


@pytest.mark.parametrize("num_workers", [1, 3, 8])
@pytest.mark.parametrize("micro", [1, 2, 5])
@pytest.mark.parametrize("num_samples", [3, 13, 40])
def test_passes_and_filler_are_those_that_the_cursor_deals_out(
    recipe: Callable[..., Recipe], num_workers: int, micro: int, num_samples: int
) -> None:
    made = recipe("stages.instruct.global_batch_size=13", f"stages.instruct.micro_batch_size={micro}")
    found = batch_layout(made, "instruct", num_workers, num_samples)
    dealt = shares(np.arange(min(13, num_samples)), num_workers, micro)
    assert found.num_passes == len(dealt[0])
    assert found.num_filler_passes == sum(len(part) == 0 for rank in dealt for part in rank)
    assert found.num_idle_workers == sum(all(len(part) == 0 for part in rank) for rank in dealt)
    assert bool(risks(found)) == (found.num_idle_workers > 0)


def test_steps_by_hand(recipe: Callable[..., Recipe]) -> None:
    made = recipe("stages.instruct.epochs=2")
    found = batch_layout(made, "instruct", 1, 9)
    assert (found.steps_per_epoch, found.num_steps, found.last_batch_size) == (3, 6, 1)
    assert batch_layout(recipe("stages.instruct.max_steps=2"), "instruct", 1, 9).num_steps == 2
    assert batch_layout(made, "instruct", 1).num_steps is None, "nobody knows how much data there is"


def test_idle_workers_are_told_with_the_key(recipe: Callable[..., Recipe]) -> None:
    (text,) = risks(batch_layout(recipe(), "instruct", 6))
    assert "4 samples a step (stages.instruct.global_batch_size) on 6 workers" in text
    assert "found 2 workers" in text
    (text,) = risks(batch_layout(recipe(), "instruct", 4, 3))
    assert "3 samples in all of its data" in text


# -- placing


def cluster(**values: object) -> ClusterSection:
    return ClusterSection.model_validate({"workers": 4, "gpus_per_worker": 1, "cpus_per_worker": 0.5, **values})


@pytest.mark.parametrize(
    ("nodes", "changes", "by_node", "tasks", "words"),
    [
        ([{"CPU": 8, "GPU": 4}], {}, (4,), 8, ""),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 2}], {}, (2, 2), 8, ""),
        # four halves of a GPU are two in all, but no worker is cut in two
        ([{"CPU": 8, "GPU": 0.5}] * 8, {}, (0,) * 8, 1, "room for 0 on 8 nodes"),
        ([{"CPU": 8, "GPU": 3}], {}, (3,), 6, "expected room for 4 workers of 0.5 CPU and 1 GPU.*found room for 3"),
        ([{"CPU": 8, "GPU": 3}], {"workers": {"min": 2, "max": 4}}, (3,), 6, ""),
        ([{"CPU": 2, "GPU": 4}], {}, (4,), 0, "no batch would ever come"),
        ([{"CPU": 2.5, "GPU": 4}], {}, (4,), 2, "2 of 8 data tasks"),
        ([{"CPU": 2, "GPU": 4}, {"CPU": 1}], {}, (4, 0), 4, "4 of 8 data tasks"),
        ([{"CPU": 5}], {"gpus_per_worker": 0}, (4,), 8, ""),
        ([], {}, (), 0, "found room for 0 on 0 nodes"),
    ],
)
def test_workers_are_placed_whole_and_leave_room_for_data(
    nodes: list[dict[str, float]], changes: dict[str, object], by_node: tuple[int, ...], tasks: int, words: str
) -> None:
    section = cluster(**changes)
    found = place(nodes, section, 2)
    assert found.workers_by_node == by_node
    assert found.num_tasks_placed == tasks
    told = problems(found, nodes, section)
    if not words:
        assert told == []
        return
    with pytest.raises(UserError, match=words):
        raise UserError(*told)


H100, SPOT = {"ray.io/accelerator-type": "H100"}, {"market-type": "spot"}


@pytest.mark.parametrize(
    ("labels", "selector", "expected"),
    [
        ({}, {}, True),
        (H100, {}, True),
        (H100, H100, True),
        ({}, H100, False),
        (H100, H100 | SPOT, False),
        (H100 | SPOT, H100 | SPOT, True),
        (SPOT, {"market-type": "!spot"}, False),
        ({}, {"market-type": "!spot"}, True),
        (SPOT, {"market-type": "in(on-demand, spot)"}, True),
        (SPOT, {"market-type": "in(on-demand,spot)"}, True),
        (SPOT, {"market-type": "in(on-demand)"}, False),
        (SPOT, {"market-type": "!in(on-demand, spot)"}, False),
        ({}, {"market-type": "!in(on-demand, spot)"}, True),
    ],
)
def test_labels_are_compared_as_ray_does(labels: dict[str, str], selector: dict[str, str], expected: bool) -> None:
    """Those of Ray 2.60's LabelSelector; tests/integration/test_placement.py asks Ray itself."""
    assert matches(labels, selector) == expected


def test_workers_go_to_nodes_with_the_labels_only() -> None:
    section = cluster(label_selector=H100)
    nodes = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 3.0}, {"CPU": 4.0}]
    found = place(nodes, section, 2, [{}, H100, SPOT])
    assert found.workers_by_node == (0, 3, 0)
    assert found.num_tasks_placed == 6, "data tasks go anywhere"
    (told,) = problems(found, nodes, section)
    assert "4 workers of 0.5 CPU and 1 GPU on nodes labelled {ray.io/accelerator-type: H100} each" in told


# -- what a check says


def test_checks_go_on_whatever_one_raises() -> None:
    findings = Findings()
    with findings.check("a") as check:
        check.note("fine so far")
        raise UserError("expected x, found y; do z")
    with findings.check("b"):
        raise KeyError("of a library")
    with findings.check("c") as check:
        check.warn("near")
    findings.skip("d", "no a")
    with findings.check("e"):
        pass
    assert [(c.name, c.status) for c in findings.checks] == [
        ("a", "fail"), ("b", "fail"), ("c", "warn"), ("d", "skipped"), ("e", "ok"),
    ]  # fmt: skip
    assert findings.checks[0].detail == "expected x, found y; do z\nfine so far", "the worst first"
    assert "KeyError: 'of a library'" in findings.checks[1].detail
    assert findings.exit_code == 1
    json.dumps(findings.to_dict(), allow_nan=False)


def test_no_password_is_kept_in_what_a_check_says() -> None:
    findings = Findings()
    with findings.check("a") as check:
        for say in (check.note, check.warn, check.fail, check.skip):
            say("see https://me:secret@host/path")
    findings.skip("b", "see https://me:secret@host/path")
    assert "secret" not in json.dumps(findings.to_dict())
    assert "https://***@host/path" in findings.checks[0].detail


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("skipped", 0), ("warn", 1), ("fail", 1)])
def test_what_is_at_risk_is_an_exit_code(status: str, code: int) -> None:
    findings = Findings()
    with findings.check("a") as check:
        {"ok": check.note, "skipped": check.skip, "warn": check.warn, "fail": check.fail}[status]("x")
    assert findings.exit_code == code


def test_numbers_are_told_with_their_nouns() -> None:
    assert [number(1, "pass"), number(2, "pass"), number(1, "step"), number(2000, "step")] == [
        "1 pass", "2 passes", "1 step", "2,000 steps",
    ]  # fmt: skip


# -- time


def write_run(store: Store, made: Recipe, stage: str, times: list[float]) -> None:
    run = Run(store, made)
    run.write("done")
    log = MetricsLog(store, run.path)
    log.start(stage)
    for step, time_s in enumerate(times, 1):
        log.append({"stage": stage, "step": step, "step_time_s": time_s})
    log.flush()


def test_step_times_come_from_an_earlier_run_that_computes_the_same(recipe: Callable[..., Recipe]) -> None:
    made = recipe()
    store = Store(made.store)
    assert cost.earlier_step_times(store, made, ("instruct",)) == {}
    write_run(store, recipe("name=larger", "stages.instruct.micro_batch_size=4"), "instruct", [9.0] * 4)
    assert cost.earlier_step_times(store, made, ("instruct",)) == {}
    write_run(
        store, recipe("name=other", "stages.instruct.lr=0.5", "seed=7"), "instruct", [60.0, 5.0, 5.0, 1.0, 3.0, 2.0]
    )
    found = cost.earlier_step_times(store, made, ("proxy_mllm", "instruct"))
    assert found.keys() == {"instruct"}
    assert found["instruct"].time_s == 2.0, "the median without the first three steps"
    assert "3 steps of the run other" in found["instruct"].origin


def test_given_step_times() -> None:
    stages = ("proxy_mllm", "instruct")
    found = cost.given_step_times(["2", "instruct=3.5"], stages)
    assert {stage: each.time_s for stage, each in found.items()} == {"proxy_mllm": 2.0, "instruct": 3.5}
    for wrong in ("fast", "-1", "0", "nan", "inf", "proxy_llm=2", "instruct="):
        with pytest.raises(ValueError, match="--step-time: expected SECONDS or STAGE=SECONDS"):
            cost.given_step_times([wrong], stages)


# -- GPUs


def test_the_smallest_gpus_memory_is_what_its_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits` prints it: MiB, a line for each GPU."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '81559\\n40960\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert smallest_gpu_bytes() == 40960 * 2**20
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert smallest_gpu_bytes() == 0
    tool.unlink()
    assert smallest_gpu_bytes() == 0
