"""Does a run that is killed end as one that was not? Workers, or everything, die by SIGKILL, at steps that the tests choose.

fp32 on CPU: bit for bit on as many workers as before, dropout included; on others the same samples in each step, and
losses to 1e-5. Checkpoints come every second step, so that at most two steps are made again.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpa_ray.engine import words
from tests import tiny_models
from tests.integration.runs import STAGES, Run, losses, make_recipe, start_dpa

NUM_STEPS = 24  # a stage must not end while a test that a slow machine holds up is still about to hurt it
EVERY_STEPS = 2


@pytest.fixture(scope="module")
def recipe(assets_dir: Path, tiny_llm: Callable, tiny_tower: Callable) -> Callable[..., dict[str, Any]]:
    """`recipe(**changes)`: all stages train for 24 steps of 8 samples, four epochs of 45; stage 1 with dropout."""
    folder = assets_dir / "survival"
    data = (
        tiny_models.make_captions(folder / "captions", 45, text_only=(4, 20), seed=5),
        tiny_models.make_conversations(folder / "conversations", 45, text_only=(7, 30), several_images=(3,), seed=6),
    )

    def make(**changes: Any) -> dict[str, Any]:
        changed = {
            "checkpoint__every_steps": EVERY_STEPS, "cluster__workers": 2, "stages__proxy_llm__lora__dropout": 0.1,
        } | changes  # fmt: skip
        made = make_recipe(tiny_llm("llama", bos=True), tiny_tower("clip"), *data, method="dpa", **changed)
        for stage, lr in zip(STAGES, (2.0e-3, 2.0e-3, 5.0e-4), strict=True):
            made["stages"][stage] |= {"lr": lr, "global_batch_size": 8, "epochs": 4, "max_steps": NUM_STEPS}
        return made

    return make


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, recipe: Callable[..., dict[str, Any]]) -> Callable[..., Run]:
    """`whole(**changes)`: a run that nobody disturbed, made once for the same changes."""
    done: dict[str, Run] = {}

    def run(**changes: Any) -> Run:
        label = repr(sorted(changes.items()))
        if label not in done:
            done[label] = start_dpa(recipe(**changes), tmp_path_factory.mktemp("whole") / "store", "run").finished()
            assert done[label].returncode == 0, done[label].output
        return done[label]

    return run


def weights(run: Run) -> dict[str, str]:
    """SHA-256 of what each stage trained."""
    files = {stage: sorted(run.artifact(stage).glob("*.safetensors")) for stage in STAGES}
    return {
        stage: hashlib.sha256(b"".join(f.read_bytes() for f in found)).hexdigest() for stage, found in files.items()
    }


def resumed_from(run: Run, stage: str) -> list[int]:
    steps: list[int] = run.info()["timings"][stage]["resumed_from"]
    return steps


def assert_same_samples(run: Run, expected: Run) -> None:
    for stage in STAGES:
        assert [line["step"] for line in run.metrics(stage)] == list(range(1, NUM_STEPS + 1))
        assert run.samples(stage) == expected.samples(stage), stage


def assert_same_to_the_bit(run: Run, expected: Run) -> None:
    assert_same_samples(run, expected)
    for stage in STAGES:
        for key in ("loss", "nll_mean", "weight_mean", "grad_norm"):
            assert losses(run, stage, key) == losses(expected, stage, key), (stage, key)
    assert weights(run) == weights(expected)
    for stage in STAGES:
        found, other = (words.read(each.artifact(stage) / words.FILE) for each in (run, expected))
        assert found == other, f"losses of words before and after {stage}"


def assert_adds_up(goodput: dict[str, Any]) -> None:
    """The parts of the wall time, and each part over the stages."""
    parts = [name for name in goodput["outside_stages"] if name.endswith("_s")]
    whole = sum(goodput[part] for part in parts)
    assert goodput["wall_time_s"] == pytest.approx(whole)
    assert goodput["goodput"] == pytest.approx(goodput["training_s"] / whole)
    for part in parts:
        by_stage = [*goodput["stages"].values(), goodput["outside_stages"]]
        assert goodput[part] == pytest.approx(sum(times[part] for times in by_stage)), part


@pytest.mark.parametrize(
    ("stage", "step"),
    [
        pytest.param("proxy_llm", 7, marks=pytest.mark.full),
        pytest.param("proxy_mllm", 4, marks=pytest.mark.ci),
        pytest.param("instruct", 11, marks=pytest.mark.full),
    ],
)
def test_a_lost_worker_is_replaced_and_nothing_changes(
    tmp_path: Path, recipe: Callable, whole: Callable[..., Run], stage: str, step: int
) -> None:
    running = start_dpa(recipe(), tmp_path / "store", "run")
    running.wait_for(stage, step)
    running.kill_worker(step % 2)
    run = running.finished()
    assert run.returncode == 0, run.output
    assert "was lost" in run.stdout, run.output
    (step_before,) = resumed_from(run, stage)
    assert step - EVERY_STEPS <= step_before, "at most two steps are made again"
    assert_same_to_the_bit(run, whole())
    assert "workers replaced 1 time" in run.stdout
    goodput = run.info()["goodput"]
    assert_adds_up(goodput)
    assert goodput["wall_time_s"] == pytest.approx(run.info()["wall_time_s"], rel=0.1)
    assert goodput["reached"] == dict.fromkeys(STAGES, NUM_STEPS)
    assert [where for _, kind, where, _ in goodput["timeline"]["events"] if kind == "restart"] == [stage]
    for name, parts in goodput["stages"].items():
        assert (parts["training_s"] > 0) == (name in STAGES), name
        assert (parts["lost_s"] > 0) == (name == stage), name
    assert list((tmp_path / "store" / "checkpoints").rglob("*.safetensors")) == [], "finished stages leave none"


@pytest.mark.parametrize(
    "stage", [pytest.param("proxy_mllm", marks=pytest.mark.ci), pytest.param("instruct", marks=pytest.mark.full)]
)
def test_a_lost_controller_is_replaced_with_its_workers_and_nothing_changes(
    tmp_path: Path, recipe: Callable, whole: Callable[..., Run], stage: str
) -> None:
    running = start_dpa(recipe(), tmp_path / "store", "run")
    running.wait_for(stage, 7)
    (controller,) = running.processes("ray::TrainController")
    os.kill(controller, signal.SIGKILL)
    run = running.finished()
    assert run.returncode == 0, run.output
    assert "controller died, and its workers with it; others are started" in run.stdout, run.output
    assert resumed_from(run, stage)[0] >= 7 - EVERY_STEPS
    assert_same_to_the_bit(run, whole())
    assert_adds_up(run.info()["goodput"])


@pytest.mark.ci
def test_the_same_command_goes_on_after_all_was_killed(
    tmp_path: Path, recipe: Callable, whole: Callable[..., Run]
) -> None:
    """In stage 2, and again in stage 3; the first stage is not made a second time."""
    store = tmp_path / "store"
    for stage, step in (("proxy_mllm", 6), ("instruct", 9)):
        running = start_dpa(recipe(), store, "run")
        running.wait_for(stage, step)
        running.kill_all()
    run = start_dpa(recipe(), store, "run").finished()
    assert run.returncode == 0, run.output
    assert run.info()["timings"]["proxy_mllm"]["reused"]
    assert resumed_from(run, "proxy_mllm")
    assert resumed_from(run, "instruct")
    assert_same_to_the_bit(run, whole())
    goodput = run.info()["goodput"]
    assert_adds_up(goodput)
    assert goodput["num_attempts"] == 3
    assert [kind for _, kind, _, _ in goodput["timeline"]["events"]].count("attempt") == 3
    assert goodput["wall_time_s"] > run.info()["wall_time_s"], "that of the killed ones counts too"


@pytest.mark.ci
def test_other_numbers_of_workers_take_the_same_samples(
    tmp_path: Path, recipe: Callable, whole: Callable[..., Run]
) -> None:
    """2 workers, killed, then 1, killed, then 3: one stage, each sample once an epoch. ZeRO-3 at the end, torch first."""
    plain = {"stages__proxy_llm__lora__dropout": 0.0}
    store = tmp_path / "store"
    attempts: list[tuple[dict[str, Any], int | None]] = [
        ({"cluster__workers": 2, "engine": "torch"}, 4),
        ({"cluster__workers": 1}, 8),
        ({"cluster__workers": 3, "deepspeed__zero_stage": 3}, None),
    ]
    for changes, step in attempts:
        running = start_dpa(recipe(**plain, **changes), store, "run")
        if step is not None:
            running.wait_for("proxy_llm", step)
            running.kill_all()
    run = running.finished()
    assert run.returncode == 0, run.output
    assert len(resumed_from(run, "proxy_llm")) == 2
    assert "saved by 1 workers, on 3" in run.stdout, run.output
    assert_same_samples(run, whole(**plain))
    for stage in STAGES:
        assert losses(run, stage) == pytest.approx(losses(whole(**plain), stage), rel=1e-5), stage


@pytest.mark.ci
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(
    tmp_path: Path, recipe: Callable, whole: Callable[..., Run]
) -> None:
    store = tmp_path / "store"
    running = start_dpa(recipe(), store, "run")
    running.wait_for("proxy_mllm", 9)
    running.kill_all()
    saved = sorted((store / "checkpoints").glob("proxy-mllm-*/step-*/manifest.json"))
    assert len(saved) == 2, saved
    state = saved[-1].parent / "rank-00001.safetensors"
    content = bytearray(state.read_bytes())
    content[-3] ^= 1
    state.write_bytes(content)
    run = start_dpa(recipe(), store, "run").finished()
    assert run.returncode == 0, run.output
    assert "a checkpoint is passed over" in run.stdout
    assert "rank-00001.safetensors: expected SHA-256" in run.stdout
    assert resumed_from(run, "proxy_mllm") == [int(saved[0].parent.name.split("-")[1])]
    assert_same_to_the_bit(run, whole())


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.full), pytest.param(1, marks=pytest.mark.ci)])
def test_a_worker_that_stands_still_is_named_and_replaced_and_nothing_changes(
    tmp_path: Path, recipe: Callable, whole: Callable[..., Run], number: int
) -> None:
    """It is stopped, not killed: its connections stay, and the other one waits for it."""
    running = start_dpa(recipe(cluster__collective_timeout_s=20), tmp_path / "store", "run")
    running.wait_for("proxy_mllm", 5)
    stopped = running.processes("ray::RayTrainWorker")[number]
    os.kill(stopped, signal.SIGSTOP)
    run = running.finished()
    assert run.returncode == 0, run.output
    assert "the workers have waited for each other for longer than 20 s (cluster.collective_timeout_s)" in run.stdout
    assert f"(process {stopped} on " in run.stdout, run.output
    assert "does not answer" in run.stdout
    assert "failure 1 of 3, after step" in run.stdout
    assert resumed_from(run, "proxy_mllm")
    assert not Path(f"/proc/{stopped}").exists(), "it does not hold its GPU for ever"
    assert_same_to_the_bit(run, whole())


@pytest.mark.ci
def test_a_worker_that_dies_each_time_ends_the_run_and_keeps_what_was_saved(tmp_path: Path, recipe: Callable) -> None:
    running = start_dpa(recipe(cluster__max_failures=0), tmp_path / "store", "run")
    running.wait_for("proxy_mllm", 5)
    running.kill_worker()
    run = running.finished()
    assert run.returncode == 1, run.output
    assert "was lost" in run.stderr
    assert "cluster.max_failures: 0" in run.stderr
    assert "Traceback" not in run.stderr
    assert list((tmp_path / "store" / "checkpoints").glob("proxy-mllm-*/step-*/manifest.json"))
    assert run.info()["status"] == "failed"


@pytest.mark.full
@pytest.mark.parametrize(
    ("fault", "text"),
    [(signal.SIGKILL, "died"), (signal.SIGSTOP, "has not answered for 120 s")],
    ids=["lost", "stopped"],
)
def test_a_lost_board_ends_the_run_and_the_same_command_goes_on(
    tmp_path: Path, recipe: Callable, whole: Callable[..., Run], fault: int, text: str
) -> None:
    """Of one that is stopped the workers may finish meanwhile; what they told it is lost, and only that."""
    running = start_dpa(recipe(), tmp_path / "store", "run")
    running.wait_for("proxy_mllm", 5)
    (board,) = running.processes("ray::Board")
    os.kill(board, fault)
    run = running.finished()
    assert run.returncode == 1, run.output
    assert f"error: the process that takes what the workers tell (ray::Board, on the job's node) {text}" in run.stderr
    assert not Path(f"/proc/{board}").exists()
    assert "Traceback" not in run.stderr
    assert "Started a local Ray instance" not in run.stderr, "none is started to tell of the end"
    again = start_dpa(recipe(), tmp_path / "store", "run").finished()
    assert again.returncode == 0, again.output
    if fault == signal.SIGKILL:
        assert resumed_from(again, "proxy_mllm")
        assert_same_to_the_bit(again, whole())
    else:
        assert weights(again) == weights(whole())


@pytest.mark.full
@pytest.mark.parametrize("after_s", [0.5, 4.0, 7.0])
def test_a_worker_that_dies_while_workers_start_is_replaced(tmp_path: Path, recipe: Callable, after_s: float) -> None:
    """While it imports, while it looks for the others, and in its first task."""
    running = start_dpa(recipe(), tmp_path / "store", "run")
    workers = running.wait_for_process("ray::RayTrainWorker")
    time.sleep(after_s)
    os.kill(workers[-1], signal.SIGKILL)
    run = running.finished()
    assert run.returncode == 0, run.output


@pytest.mark.full
@pytest.mark.parametrize("after_s", [0.5, 2.0, 5.0])
def test_a_controller_that_dies_while_workers_start_is_replaced(
    tmp_path: Path, recipe: Callable, after_s: float
) -> None:
    """Before and after it has asked for their placement group, and while they import."""
    running = start_dpa(recipe(), tmp_path / "store", "run")
    controllers = running.wait_for_process("ray::TrainController")
    time.sleep(after_s)
    os.kill(controllers[0], signal.SIGKILL)
    run = running.finished()
    assert run.returncode == 0, run.output
    assert "Ray Train's controller died" in run.output


@pytest.mark.full
def test_a_controller_that_stands_still_is_replaced_and_nothing_changes(
    tmp_path: Path, recipe: Callable, whole: Callable[..., Run]
) -> None:
    made = recipe(cluster__collective_timeout_s=10, data__stall_timeout_s=10, data__retry_s=10)
    running = start_dpa(made, tmp_path / "store", "run")
    running.wait_for("proxy_mllm", 5)
    (controller,) = running.processes("ray::TrainController")
    os.kill(controller, signal.SIGSTOP)
    run = running.finished()
    assert run.returncode == 0, run.output
    assert "Ray Train's controller has not answered for 150 s: it is killed" in run.stdout
    assert not Path(f"/proc/{controller}").exists()
    assert_same_to_the_bit(run, whole())


@pytest.mark.full
def test_a_controller_that_dies_once_too_often_ends_the_run(tmp_path: Path, recipe: Callable) -> None:
    running = start_dpa(recipe(cluster__max_failures=0), tmp_path / "store", "run")
    running.wait_for("proxy_mllm", 5)
    (controller,) = running.processes("ray::TrainController")
    os.kill(controller, signal.SIGKILL)
    run = running.finished()
    assert run.returncode == 1, run.output
    assert "Ray Train's controller died" in run.stderr
    assert "Traceback" not in run.stderr
    assert run.info()["status"] == "failed"


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.ci), pytest.param(signal.SIGTERM, marks=pytest.mark.full)]
)
def test_ctrl_c_ends_the_run_with_its_workers_and_the_same_command_goes_on(
    tmp_path: Path, recipe: Callable, number: signal.Signals
) -> None:
    made, num_steps = recipe(), 120  # some seconds more than it takes to end a run
    made["stages"]["proxy_mllm"] |= {"epochs": 60, "max_steps": num_steps}
    running = start_dpa(made, tmp_path / "store", "run")
    running.wait_for("proxy_mllm", 5)
    running.process.send_signal(number)
    interrupted = running.finished(120)
    assert interrupted.returncode == 1, interrupted.output
    assert "interrupted" in interrupted.stderr
    running.wait_for_end_of("ray::RayTrainWorker")
    assert interrupted.info()["status"] == "stopped"
    run = start_dpa(made, tmp_path / "store", "run").finished()
    assert run.returncode == 0, run.output
    (step,) = resumed_from(run, "proxy_mllm")
    assert 4 <= step < num_steps
    assert [line["step"] for line in run.metrics("proxy_mllm")] == list(range(1, num_steps + 1))


@pytest.mark.ci
def test_the_same_command_is_refused_while_the_first_one_lives(tmp_path: Path, recipe: Callable) -> None:
    made = recipe()
    made["stages"]["proxy_llm"] |= {"epochs": 5000, "max_steps": 20_000}  # longer than anybody waits here
    first = start_dpa(made, tmp_path / "store", "run")
    first.wait_for("proxy_llm", 1)
    second = start_dpa(made, tmp_path / "store", "run", folder=tmp_path / "second").finished()
    assert second.returncode == 1, second.output
    assert f"process {first.process.pid} on" in second.stderr, second.output
    assert "is at work on this" in second.stderr
    assert first.process.poll() is None, "the first one goes on"
    first.kill_all()
