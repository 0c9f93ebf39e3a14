"""Does a person see what runs, how it goes and where it went, in 80 columns, and no log drown in it?"""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dpa_ray.recipe import load, parse
from dpa_ray.report import console
from dpa_ray.report.console import AccuracyRow, PlanRow, Progress, StageRow, duration

LONG = (
    "/a/folder/whose/name/is/much/longer/than/eighty/columns/and/must/stay/whole/artifacts/proxy-mllm-0123456789abcdef"
)


class Screen:
    """What is printed to a file, as wide as a terminal."""

    def __init__(self, width: int = 80):
        self.file = io.StringIO()
        self.console = console.terminal(self.file, width)

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.file.getvalue().splitlines()]

    def line_of(self, word: str) -> str:
        (line,) = [line for line in self.lines if word in line]
        return line


@pytest.fixture
def screen() -> Screen:
    return Screen()


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def run(screen: Screen, num_steps: int, step_time_s: float, first_step: int = 1) -> list[str]:
    """The plain lines of one stage's steps."""
    clock = Clock()
    with Progress(screen.console, clock) as progress:
        progress.stage_started("instruct", num_steps, "connector (33,024)", first_step)
        for step in range(first_step, num_steps + 1):
            clock.now_s += step_time_s
            progress.step(
                {"stage": "instruct", "step": step, "loss": 2 / step, "num_samples": 64, "step_time_s": step_time_s}
            )
        progress.stage_finished()
    return [line for line in screen.lines if line.startswith("instruct  step")]


# Header and plan


def test_the_header_names_recipe_method_device_workers_and_store(screen: Screen) -> None:
    console.header(load("tiny", ["cluster.workers=2"]), device="cpu", store=LONG, to=screen.console)
    text = "\n".join(screen.lines)
    assert "tiny" in screen.lines[0]
    for word in ("dpa", "builtin:tiny-llm", "builtin:tiny-vit", "cpu, 2 workers", "deepspeed ZeRO-2", "fp32", LONG):
        assert word in text


def test_the_plan_gives_the_recipe_as_yaml_that_parses_to_the_same(screen: Screen) -> None:
    recipe = load("tiny", ["data.eval_extra.more.source=" + LONG])
    console.plan([], recipe=recipe, to=screen.console)
    text = screen.file.getvalue().split("stage ")[0]
    assert parse(yaml.safe_load(text)) == recipe


def test_the_plan_says_for_each_stage_what_is_made_and_trained(screen: Screen) -> None:
    rows = [
        PlanRow("proxy_llm", "0123456789abcdef", True, 40, {"LoRA": 1234}),
        PlanRow("instruct", "fedcba9876543210", False, 300, {"connector": 33_024, "language_model": 8_030_261_248}),
    ]
    console.plan(rows, ignored=("cmo", "stages.proxy_llm"), to=screen.console)
    assert screen.line_of("0123456789abcdef").split() == [
        "proxy_llm",
        "0123456789abcdef",
        "reused",
        "40",
        "LoRA",
        "1,234",
    ]
    assert screen.line_of("fedcba9876543210").split()[:4] == ["instruct", "fedcba9876543210", "made", "300"]
    assert screen.line_of("language_model").split() == ["language_model", "8,030,261,248"]
    assert screen.lines[-1] == "ignored by this method: cmo, stages.proxy_llm"


def test_steps_that_are_not_known_yet_are_a_question_mark(screen: Screen) -> None:
    console.plan([PlanRow("instruct", "0" * 16, False, None)], to=screen.console)
    assert screen.lines[-1].split() == ["instruct", "0" * 16, "made", "?", "nothing"]


def test_what_is_not_trained_has_no_steps(screen: Screen) -> None:
    console.plan([PlanRow("blind", "0" * 16, True, None, is_trained=False)], to=screen.console)
    assert screen.lines[-1].split() == ["blind", "0" * 16, "reused", "-", "nothing"]


def test_a_job_over_shards_tells_how_many_and_how_fast(screen: Screen) -> None:
    """By hand: 20 shards, 8 of them there, each of 100 samples in half a second; a line at 10 %."""
    clock = Clock()
    with Progress(screen.console, clock) as progress:
        progress.shards_started("blind", 20, 8)
        for _ in range(12):
            clock.now_s += 0.5
            progress.shard(100)
        progress.stage_finished()
    assert screen.lines == [
        "blind: 20 shards, 8 of them are there already",
        *(f"blind: {n}/20 shards, 200 samples/s" for n in range(10, 21, 2)),
        "blind: done in 6.0 s",
    ]


# The closing tables


def stage_row(stage: str = "proxy_mllm", **changes: object) -> StageRow:
    row = {"trained": "connector (33,024)", "num_steps": 60, "loss_first": 3.2114, "loss_last": 1.5, "time_s": 112.3}
    return StageRow(**{"stage": stage, **row, "reused": False, "artifact": LONG, **changes})  # type: ignore[arg-type]


def test_the_closing_table_has_losses_time_and_whether_it_was_reused(screen: Screen) -> None:
    console.closing_table([stage_row(), stage_row("instruct", reused=True)], to=screen.console)
    made, reused = (line.split() for line in screen.lines if line.endswith(("  made", "  reused")))
    assert made == ["proxy_mllm", "connector", "(33,024)", "60", "3.211", "1.500", "1", "min", "52", "s", "made"]
    assert reused[0] == "instruct"
    assert "stages: 1 reused, 1 made" in screen.lines


@pytest.mark.parametrize("width", [20, 80, 200])
def test_paths_are_never_cut_or_broken(width: int) -> None:
    screen = Screen(width)
    console.closing_table(
        [stage_row()], paths={"model": LONG + "/model", "metrics": "s3://b/m.jsonl"}, to=screen.console
    )
    text = screen.file.getvalue()
    assert f"{LONG}\n" in text
    assert f"{LONG}/model\n" in text
    assert "s3://b/m.jsonl\n" in text
    assert "…" not in text


def test_no_table_is_wider_than_the_screen_and_nothing_in_it_is_cut() -> None:
    screen = Screen(80)
    trained = "connector and the language model in full, embeddings and head included (8,030,261,248)"
    row = stage_row("instruct", trained=trained, num_steps=1_234_567, loss_first=123.456, time_s=360_000)
    console.closing_table([row], to=screen.console)
    console.accuracy_table([AccuracyRow("a-split-with-quite-a-long-name", 100_000, 1, 0.5, 0.5)], to=screen.console)
    console.plan([PlanRow("proxy_mllm", "0" * 16, False, 1_234_567, {trained: 8_030_261_248})], to=screen.console)
    lines = [line for line in screen.lines if LONG not in line]
    assert max(map(len, lines)) <= 80
    text = "".join("".join(lines).split())
    for word in ("8,030,261,248", "1234567", "123.456", "100h00min", "0" * 16):
        assert word in text
    assert "…" not in text


@pytest.mark.parametrize("loss", [None, float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_a_dash(screen: Screen, loss: float | None) -> None:
    console.closing_table([stage_row(loss_first=loss, loss_last=loss)], to=screen.console)
    assert screen.line_of("proxy_mllm  conn").split()[4:6] == ["-", "-"]


def test_accuracy_stands_beside_both_baselines_and_the_gain_is_over_the_better(screen: Screen) -> None:
    rows = [AccuracyRow("eval", 500, 0.973, 0.25, 0.181), AccuracyRow("pairs", 500, 0.2, 0.1, 0.25)]
    console.accuracy_table(rows, to=screen.console)
    assert screen.line_of("eval").split() == ["eval", "500", "97.3", "%", "25.0", "%", "18.1", "%", "+72.3"]
    assert screen.line_of("pairs").split()[-1] == "-5.0"


def test_held_out_nll_stands_beside_that_without_the_image(screen: Screen) -> None:
    """A set without visual words has a dash for them, as has an evaluation that knew no nll; 80 columns hold it all."""
    whole = {"num_targets": 123_456, "nll": 1.23456, "nll_blind": 12.5, "num_visual": 61_234, "visual_nll": 0.5, "visual_nll_blind": 3.0}  # fmt: skip
    none = {**whole, "num_visual": 0, "visual_nll": None, "visual_nll_blind": None}
    scores = {"a-split-with-quite-a-long-name": whole, "eval": none, "older": {"accuracy": 0.5}}
    console.nll_table(scores, to=screen.console)
    assert screen.line_of("a-split").split()[1:] == ["123,456", "1.235", "12.500", "61,234", "0.500", "3.000"]
    assert screen.line_of("eval").split() == ["eval", "123,456", "1.235", "12.500", "0", "-", "-"]
    assert screen.line_of("older").split() == ["older", *"------"]
    assert max(map(len, screen.lines)) <= 80


def test_an_evaluation_is_a_line_of_what_was_read() -> None:
    record = {"stage": "instruct", "step": 8, "eval_nll": 1.25, "eval_nll_blind": 2.5, "eval_visual_nll": None}
    assert console.held_out_line(record) == "instruct step 8, held out: nll 1.250 (without the image 2.500)"
    blind = {"stage": "proxy_llm", "step": 8, "eval_nll": 1.25, "eval_visual_nll": 3.0}
    assert console.held_out_line(blind) == "proxy_llm step 8, held out: nll 1.250, visual words 3.000"
    assert console.held_out_line({"stage": "instruct", "step": 9}) is None


def test_words_in_brackets_are_printed_as_they_are(screen: Screen) -> None:
    console.closing_table([stage_row(trained="[red]x[/red] :smile:", artifact="/a/[b]")], to=screen.console)
    text = screen.file.getvalue()
    assert "[red]x[/red]" in text
    assert "/a/[b]" in text


# Progress


def test_a_stage_says_what_it_trains_and_that_it_is_done(screen: Screen) -> None:
    run(screen, 4, 1.0)
    assert screen.lines[0] == "instruct: trains connector (33,024); 4 steps"
    assert screen.lines[-1] == "instruct: done in 4.0 s"


def test_a_line_has_step_loss_speed_and_time_left(screen: Screen) -> None:
    first = run(screen, 10, 2.0)[0]
    assert first == "instruct  step 1/10  loss 2.000  32 samples/s  18 s left"


def test_a_short_stage_prints_a_line_per_tenth(screen: Screen) -> None:
    assert len(run(screen, 1000, 0.001)) in range(10, 13)


def test_a_slow_stage_prints_every_ten_seconds_at_most(screen: Screen) -> None:
    lines = run(screen, 1000, 0.5)  # 500 s
    assert len(lines) in range(40, 53)


def test_a_long_stage_does_not_flood_a_log_and_does_not_fall_silent(screen: Screen) -> None:
    lines = run(screen, 36_000, 1.0)  # ten hours
    assert len(lines) < 600
    steps = [int(re.findall(r"step (\d+)/", line)[0]) for line in lines]
    assert max(b - a for a, b in zip(steps, steps[1:], strict=False)) <= 400


def test_first_and_last_step_are_shown(screen: Screen) -> None:
    lines = run(screen, 37, 0.01)
    assert "step 1/37" in lines[0]
    assert "step 37/37" in lines[-1]


def test_a_resumed_stage_says_where_it_goes_on(screen: Screen) -> None:
    lines = run(screen, 100, 0.01, first_step=51)
    assert screen.lines[0].endswith("100 steps, goes on at step 51")
    assert len(lines) in range(5, 8)


def test_a_step_without_times_or_a_finite_loss_is_shown_all_the_same(screen: Screen) -> None:
    with Progress(screen.console) as progress:
        progress.stage_started("instruct", 1, "nothing")
        progress.step({"step": 1, "loss": None})
    assert screen.lines[-1] == "instruct  step 1/1  loss -"


def test_notes_are_whole_lines(screen: Screen) -> None:
    with Progress(screen.console) as progress:
        progress.note(LONG)
    assert screen.lines == [LONG]


def test_at_a_terminal_the_line_is_live_and_fits(tmp_path: Path) -> None:
    script = tmp_path / "live.py"
    script.write_text(
        "import time\n"
        "from dpa_ray.report.console import Progress\n"
        "with Progress() as progress:\n"
        "    progress.stage_started('proxy_mllm', 31250, 'connector')\n"
        "    for step in (1, 2, 3):\n"
        "        time.sleep(0.15)\n"  # it is drawn ten times a second
        "        progress.step({'step': step, 'loss': 12.345, 'num_samples': 256, 'step_time_s': 3.4})\n"
        "    print('a word of a worker')\n"
        "    progress.stage_finished()\n"
    )
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, str(script)], stdout=theirs, stderr=theirs, stdin=theirs, env=env) as child:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 65536):
                shown += chunk
        except OSError:  # Linux's way of saying that the other end is closed
            pass
    os.close(ours)
    assert child.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", text)]
    assert "a word of a worker" in lines
    assert any(re.search(r"loss 12\.345  75 samples/s  29 h \d\d min left$", line) for line in lines)
    assert any(re.search(r"loss 12\.345  done in ", line) for line in lines)
    assert "…" not in text
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("time_s", "said"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3599.6, "1 h 00 min")],
)
def test_durations_are_said_as_people_do(time_s: float, said: str) -> None:
    assert duration(time_s) == said
