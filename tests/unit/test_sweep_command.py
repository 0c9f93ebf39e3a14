"""Is wrong input refused with every reason, before anything is started, and is there room for what is?"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dpa_ray.errors import UserError
from dpa_ray.recipe import RecipeError, load
from dpa_ray.recipe_running import ClusterSection
from dpa_ray.sweep.main import Options, default_space, make_plan_of
from dpa_ray.sweep.search import Grid, Optuna, Random

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def command() -> ModuleType:
    """jobs/sweep.py."""
    spec = importlib.util.spec_from_file_location("jobs_sweep", ROOT / "jobs/sweep.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def space(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        (tmp_path / "space.yaml").write_text(text)
        return tmp_path / "space.yaml"

    return write


@pytest.mark.parametrize(
    ("text", "arguments", "told"),
    [
        ("stages.proxy_llm.lora.rnk: [1, 2]\nseed: []\n", [], ["did you mean rank?", "not empty", "2 errors"]),
        ("cmo.lower: [0.6]\ncmo.upper: [0.4]\n", [], ["lower > upper in all 1 combinations"]),
        ("cmo.upper: {uniform: [0.4, 0.5]}\n", [], ["--trials: expected a number of trials"]),
        ("cmo.upper: {uniform: [0.4, 0.5]}\n", ["--search", "grid"], ["found uniform"]),
        ("seed: [1, 2]\n", ["--metric", "eval.other.accuracy"], ["one of the held-out sets (heldout, unseen_pairs)"]),
        ("seed: [1, 2]\n", ["--metric", "eval.heldout.acuracy"], ["one of num_questions, accuracy,"]),
        ("seed: [1, 2]\nsweep: {asha: {grace_steps: 5, metric: eval.heldout.accuracy}}\n", [], ["while a stage runs"]),
        ("seed: [1, 2]\n", ["--compare", "dpa,vanilla"], ["found both"]),
        ("seed: [1, 2]\n", ["stages.instruct.lrr=1"], ["did you mean lr?"]),
        ("seed: [1, 2]\n", ["--name", "a/b"], ["--name: expected letters"]),
        ("- 1\n", [], ["expected a mapping"]),
        (None, ["--compare", "dap"], ["'dap'"]),
        (None, ["--compare", "vanilla,cal,dpa", "cmo.upper=0.3"], ["lower 1.0 > upper 0.3", "of cal in --compare"]),
        (None, ["--space", "/nowhere.yaml"], ["/nowhere.yaml"]),
    ],
)
def test_wrong_input_exits_2_and_starts_nothing(
    text: str | None, arguments: list[str], told: list[str], command: ModuleType, space: Callable[[str], Path],
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = [] if text is None else ["--space", str(space(text))]
    assert command.main(["tiny", "--store", str(tmp_path / "store"), *given, *arguments]) == 2
    error = capsys.readouterr().err
    assert [part for part in told if part not in error] == [], error
    assert list(tmp_path.glob("store/*/*")) == [], "nothing was written"


def test_no_password_is_shown(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise UserError("no answer from https://me:secret@host/x")

    monkeypatch.setattr("dpa_ray.sweep.main.run", fail)
    assert command.main(["tiny"]) == 1
    assert capsys.readouterr().err == "error: no answer from https://***@host/x\n"


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--trials", "x"], ["--search", "best"]])
def test_wrong_arguments_exit_2(arguments: list[str], command: ModuleType) -> None:
    with pytest.raises(SystemExit) as err:
        command.main(arguments)
    assert err.value.code == 2


def test_options_count_before_the_files_settings(space: Callable[[str], Path]) -> None:
    recipe = load("tiny")
    file = space(
        "cmo.upper: {uniform: [0.4, 0.5]}\nsweep: {search: random, trials: 3, metric: instruct.nll_mean, seed: 5}\n"
    )
    plan = make_plan_of(recipe, Options(space=file))
    assert isinstance(plan.search, Random)
    assert (plan.name, plan.search.num_trials, plan.search.seed) == ("tiny-space-random", 3, 5)
    assert (plan.what["metric"], plan.what["mode"]) == ("instruct.nll_mean", "min")
    plan = make_plan_of(
        recipe, Options(space=file, search="optuna", trials=7, metric="eval.heldout.accuracy", name="n")
    )
    assert isinstance(plan.search, Optuna)
    assert (plan.name, plan.search.num_trials, plan.search.mode) == ("n", 7, "max")


def test_other_searches_and_comparisons_have_other_names(space: Callable[[str], Path]) -> None:
    recipe, file = load("tiny"), space("cmo.upper: [0.4, 0.5]\n")
    options = [
        Options(space=file), Options(space=file, search="optuna", trials=3), Options(compare=("vanilla", "dpa"), seeds=2),
        Options(compare=("vanilla", "cal"), seeds=2), Options(),
    ]  # fmt: skip
    names = [make_plan_of(recipe, each).name for each in options]
    assert names[:2] == ["tiny-space", "tiny-space-optuna"]
    assert len(set(names)) == len(names)


def test_without_a_space_it_is_three_ranks_by_three_bounds() -> None:
    recipe = load("tiny")
    assert default_space(recipe) == {"stages.proxy_llm.lora.rank": [8, 16, 32], "cmo.upper": [0.25, 0.5, 1.0]}
    plan = make_plan_of(recipe, Options())
    assert isinstance(plan.search, Grid)
    assert plan.search.num_trials == 9
    assert make_plan_of(recipe, Options(trials=4)).search.num_trials == 4
    rank, upper = "stages.proxy_llm.lora.rank", "cmo.upper"
    assert default_space(load("tiny", ["method=pmo"])) == {rank: [8, 16, 32]}
    assert default_space(load("tiny", ["method=cal"])) == {upper: [2.5, 5.0, 10.0]}
    equal = load("tiny", ["cmo.lower=0.5", "cmo.upper=0.5", f"{rank}=1"])
    assert default_space(equal) == {rank: [1, 2], upper: [0.5, 1.0]}
    assert make_plan_of(equal, Options()).search.num_trials == 4
    with pytest.raises(RecipeError, match="method vanilla uses neither"):
        make_plan_of(load("tiny", ["method=vanilla"]), Options())
    with pytest.raises(RecipeError):
        make_plan_of(recipe, Options(compare=("dpa",), search="random", trials=3))


@pytest.mark.parametrize(("grows", "num_trials", "expected"), [(True, 3, [12, 0]), (True, 1, []), (False, 3, [])])
def test_an_autoscaler_is_asked_for_all_trials_nodes_while_the_sweep_runs(
    grows: bool, num_trials: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpa_ray.sweep import tuner

    asked: list[int] = []
    monkeypatch.setattr(tuner.launch, "has_autoscaler", lambda: grows)
    monkeypatch.setattr(tuner, "request_resources", lambda bundles, **_: asked.append(len(bundles)))
    with suppress(KeyboardInterrupt), tuner.nodes_asked_for(ClusterSection(workers=4), num_trials):
        assert asked == expected[:1]
        raise KeyboardInterrupt
    assert asked == expected


def test_it_is_asked_again_as_a_trials_own_request_takes_the_place_of_the_sweeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dpa_ray.sweep import tuner

    asked: list[int] = []

    def request(bundles: list[Any], **_: Any) -> None:
        asked.append(len(bundles))
        if len(asked) == 2:
            raise ConnectionError("Ray's head is away")

    monkeypatch.setattr(tuner, "ASK_AGAIN_S", 0.01)
    monkeypatch.setattr(tuner.launch, "has_autoscaler", lambda: True)
    monkeypatch.setattr(tuner, "request_resources", request)
    with tuner.nodes_asked_for(ClusterSection(workers=4), 2):
        until = time.monotonic() + 20
        while len(asked) < 4 and time.monotonic() < until:
            time.sleep(0.01)
    assert asked[:4] == [8] * 4
    num, last = len(asked), asked[-1]
    time.sleep(0.1)
    assert (len(asked), last) == (num, 0), "nothing is asked for after the end"


def test_trials_at_once_are_as_many_as_have_room() -> None:
    """Each a driver (0.1 CPU), its workers and a data task, and each worker whole on a node."""
    from dpa_ray.sweep.tuner import needed_cpus, room

    cpu = ClusterSection(workers=2, gpus_per_worker=0, cpus_per_worker=0.5)
    assert needed_cpus(cpu) == pytest.approx(2.1)
    assert room(cpu, [{"CPU": 8.4}], 9) == 4
    assert room(cpu, [{"CPU": 8.3}], 9) == 3
    assert room(cpu, [{"CPU": 8.4}], 2) == 2
    assert room(cpu, [{"CPU": 1.0}], 9) == 1, "it then waits, or says what is missing"
    gpu = ClusterSection(workers=4, gpus_per_worker=1)
    assert room(gpu, [{"CPU": 64.0, "GPU": 11.0}], 9) == 2
    assert room(gpu, [{"CPU": 5.0, "GPU": 11.0}], 9) == 1
    assert room(gpu, [{"CPU": 16.0, "GPU": 4.0}] * 3, 9) == 3
    labelled = ClusterSection(workers=4, gpus_per_worker=1, label_selector={"market-type": "spot"})
    assert room(labelled, [{"CPU": 16.0, "GPU": 4.0}] * 3, 9) == 3, "these nodes have the label"
    wide = ClusterSection(workers=2, gpus_per_worker=0, cpus_per_worker=3)
    assert room(wide, [{"CPU": 4.0}] * 4, 9) == 2, "one worker a node, though 16 CPUs would hold 2.3 trials"
    assert room(wide, [{"CPU": 5.0}] * 6, 9) == 3, "of 30 CPUs, which would hold 4.2"
