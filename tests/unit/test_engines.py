"""Do all engines take the same steps as plain autograd, clip_grad_norm_ and AdamW? One process and two, fp32 and bf16.

`tests/engine_worker.py` runs every engine over the same few steps in three processes (a world of one, and a world of
two); the tests compare what came out. No Ray.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpa_ray.batch import IGNORE_INDEX
from dpa_ray.engine.plain import PlainEngine
from dpa_ray.engine.protocol import OptimizerSettings
from dpa_ray.eval.held_out import VISUAL_GAIN
from dpa_ray.model.held_out import nll_sums
from tests.engine_worker import (
    BROKEN,
    GUILTY,
    HELD_OUT,
    LEARNING_RATES,
    SETTINGS,
    STEPS,
    STOPPED,
    Case,
    Outcome,
    cases,
    make_module,
    share,
)  # fmt: skip
from tests.random_models import CHUNK_ROWS, batch_of, make_step, make_vlm

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 400
"""Some 30 s on two free cores."""


RANKS = ((1, 0), (2, 0), (2, 1))
"""(world size, rank)."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what all ranks wrote."""
    folder = tmp_path_factory.mktemp("engines")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.engine_worker", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folder


@pytest.fixture(scope="module")
def outcomes(made: Path) -> dict[tuple[int, int], dict[str, Outcome]]:
    """{(world size, rank): {case name: outcome}}"""
    return {
        (size, rank): {n: Outcome(**values) for n, values in torch.load(made / f"{size}-{rank}.pt").items()}
        for size, rank in RANKS
    }


def all_cases() -> list[tuple[int, Case]]:
    return [(world_size, case) for world_size in (1, 2) for case in cases(world_size)]


def name_of(value: Any) -> str:
    if not isinstance(value, Case):
        return str(value)
    changed = [f"{k}={v}" for k, v in vars(value).items() if k != "zero_stage" and v != vars(Case(None))[k]]
    return ",".join(["plain" if value.zero_stage is None else f"zero{value.zero_stage}", *changed])


@cache
def reference(bf16: bool, trained: str, tied: bool, broken: bool) -> Outcome:
    """The steps by hand: the whole step as one batch, divided by its weights, torch's clipping and AdamW on fp32 masters.

    With `broken` the broken step is left out.
    """
    module = make_module(Case(None, bf16, trained=trained, tied=tied))
    parameters = [p for p in module.parameters() if p.requires_grad]
    masters = [p.detach().float().clone().requires_grad_() for p in parameters]
    optimizer = torch.optim.AdamW(
        masters, lr=1.0, betas=SETTINGS.betas, weight_decay=SETTINGS.weight_decay, eps=SETTINGS.eps
    )
    outcome = Outcome()
    for step, notations in enumerate(STEPS):
        if broken and step == BROKEN:
            continue
        sums = module(batch_of(notations))
        loss = sums.loss / sums.weight.float()
        for master, gradient in zip(masters, torch.autograd.grad(loss, parameters), strict=True):
            master.grad = gradient.float()
        outcome.norms.append(float(torch.nn.utils.clip_grad_norm_(masters, SETTINGS.grad_clip)))
        optimizer.param_groups[0]["lr"] = LEARNING_RATES[step]
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.copy_(master)
        outcome.losses.append(loss.item())
        outcome.weights.append(sums.weight.item())
    named = module.model.named_parameters(remove_duplicate=False)
    outcome.final = {name: p.detach().clone() for name, p in named}
    return outcome


@pytest.mark.parametrize("zero_stage", [None, 0, 2, 3])
def test_an_evaluation_before_or_between_steps_changes_nothing_of_them(outcomes: Any, zero_stage: int | None) -> None:
    """Bit for bit, on two ranks; and what both of them read is what one process reads of the last parameters."""
    case, ranks = Case(zero_stage, evaluated=True), [outcomes[2, rank] for rank in (0, 1)]
    for rank in ranks:
        evaluated, plain = rank[case.name], rank[Case(zero_stage).name]
        assert evaluated.losses == plain.losses
        assert evaluated.norms == plain.norms
        assert all(torch.equal(tensor, plain.final[name]) for name, tensor in evaluated.final.items())
    first, second = (rank[case.name].evaluations for rank in ranks)
    assert len(first) == len(STEPS)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "the same on both"
    module = make_module(case)
    module.model.load_state_dict(ranks[0][case.name].final, strict=False)
    expected = nll_sums(module, batch_of(HELD_OUT), VISUAL_GAIN)
    torch.testing.assert_close(first[-1], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(first[0], expected), "the model has moved"


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_many_micro_batches_in_bf16_are_summed_in_fp32(outcomes: Any, zero_stage: int) -> None:
    """The first step's norm; a sum in bf16 is another by 1e-4 after five of them, by half a percent after 32."""
    plain, ours = (outcomes[1, 0][Case(stage, bf16=True, passes=5).name] for stage in (None, zero_stage))
    assert ours.norms[0] == pytest.approx(plain.norms[0], rel=1e-5)


@pytest.mark.parametrize(("world_size", "case"), all_cases(), ids=name_of)
def test_every_engine_takes_the_same_steps(outcomes: Any, world_size: int, case: Case) -> None:
    """Losses, weight sums, norms before clipping, and the parameters after all steps, against the steps by hand: the sum
    over ranks and passes, one division, clipping, and the learning rate of each step.

    fp32: 1e-4 relative on norms and 1e-5 on parameters, which move by some 5e-3; gradients are summed in another order.
    bf16: gradients are rounded to 8 bits before they are summed over ranks, and DeepSpeed has its own linear layer, which
    moves losses and norms by some tenths of a percent. Parameters keep fp32 masters: they end on the same bf16 number
    or the next one to it, and most of them on the same.
    """
    found = outcomes[world_size, 0][case.name]
    expected = reference(case.bf16, case.trained, case.tied, case.broken or case.skipped)
    loose = 0.015 if case.bf16 else 1e-4
    assert found.losses == pytest.approx(expected.losses, rel=loose)
    assert found.weights == pytest.approx(expected.weights, rel=loose)
    assert found.norms == pytest.approx(expected.norms, rel=loose)
    assert found.final.keys() == expected.final.keys()
    start = dict(make_module(case).model.named_parameters(remove_duplicate=False))
    for name, wanted in expected.final.items():
        tensor = found.final[name]
        assert (tensor.shape, tensor.dtype, tensor.device.type) == (wanted.shape, wanted.dtype, "cpu"), name
        if torch.equal(wanted, start[name]):
            assert torch.equal(tensor, wanted), f"{name} is frozen"
        elif case.bf16:
            torch.testing.assert_close(tensor, wanted, rtol=2**-7, atol=2**-8, msg=lambda m, name=name: f"{name}: {m}")
        else:
            torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    if case.bf16:
        same = [(found.final[name] == wanted).flatten() for name, wanted in expected.final.items()]
        assert torch.cat(same).float().mean() > 0.9


def test_ranks_differ_in_their_number_of_chunks() -> None:
    """What is compared above says something of gathering a sharded head: one rank's targets take more chunks than the
    other's, and once the other has none."""
    counts = []
    for notations in STEPS:
        batches = [share(notations, rank, 2, 1)[0] for rank in (0, 1)]
        counts.append([-(-int((batch.labels != IGNORE_INDEX).sum()) // CHUNK_ROWS) for batch in batches])
    assert sum(first != second for first, second in counts) >= 3, counts
    assert any(first > 1 and second == 0 for first, second in counts), counts


def test_the_steps_are_clipped_and_not_clipped() -> None:
    """What is compared above says something of clipping: some norms are above, some below."""
    norms = reference(False, "full", False, False).norms
    assert min(norms) < 0.95 * SETTINGS.grad_clip
    assert max(norms) > 1.05 * SETTINGS.grad_clip


@pytest.mark.parametrize(("world_size", "case"), [(w, c) for w, c in all_cases() if c.broken], ids=name_of)
def test_an_update_with_gradients_that_are_not_finite_changes_nothing(
    outcomes: Any, world_size: int, case: Case
) -> None:
    """It says inf, and no parameter moves."""
    found = outcomes[world_size, 0][case.name]
    assert found.broken_norm == np.inf
    assert len(found.before_broken) > 10
    for name, tensor in found.before_broken.items():
        assert torch.equal(found.after_broken[name], tensor), name


@pytest.mark.parametrize("case", [case for case in cases(2) if case.broken], ids=name_of)
def test_after_such_an_update_all_goes_on_as_if_it_had_never_been(outcomes: Any, case: Case) -> None:
    """To the bit: neither moments nor step count nor left-over gradients remember it."""
    found = outcomes[2, 0][case.name]
    never = outcomes[2, 0][Case(case.zero_stage, case.bf16, skipped=True).name]
    assert found.losses == never.losses
    assert found.norms == never.norms
    for name, tensor in never.final.items():
        assert torch.equal(found.final[name], tensor), name


@pytest.mark.parametrize("zero_stage", STOPPED)
def test_a_step_that_is_stopped_names_the_one_sample_that_it_comes_from(made: Path, zero_stage: int | None) -> None:
    """On all ranks alike, whichever of them has it; where ZeRO-3 shares out the parameters, of a loss only."""
    for world_size in (1, 2):
        told = [
            json.loads((made / f"stopped-{size}-{rank}.json").read_text()) for size, rank in RANKS if size == world_size
        ]
        assert told[0] == told[-1]
        for what in ("loss", "gradient"):
            text = told[0][f"{zero_stage} {what}"]
            assert text.startswith(f"stage instruct, step 1: the {what} is not finite; this step changed nothing."), (
                text
            )
            if zero_stage == 3 and what == "gradient":
                assert "cannot be told where ZeRO-3" in text
                assert all(f"id{row} (row {row}, set.json#{row})" in text for row in range(8)), "those of all ranks"
                assert "skip_ids" not in text
                continue
            assert f"Of its 8 samples, these give that alone: id{GUILTY} (row {GUILTY}, set.json#{GUILTY})." in text
            assert f"'data.skip_ids=[\"01234567:{GUILTY}\"]'" in text


@pytest.mark.parametrize("zero_stage", STOPPED)
def test_what_every_sample_gives_is_not_said_to_come_from_samples(made: Path, zero_stage: int | None) -> None:
    for size, rank in RANKS:
        text = json.loads((made / f"stopped-{size}-{rank}.json").read_text())[f"{zero_stage} parameters"]
        assert "Each of its 8 samples gives that alone: it comes from the parameters" in text
        assert "Lower stages.instruct.lr (at this step: 0.01)" in text
        assert "skip_ids" not in text


def test_passes_do_not_change_a_step(outcomes: Any) -> None:
    """Twice as many micro-batches, the same numbers; one of them holds nothing but filler."""
    for stage in (None, 0, 2, 3):
        once, twice = (outcomes[2, 0][Case(stage, passes=passes).name] for passes in (1, 2))
        assert twice.num_batches == 2 * once.num_batches
        assert twice.losses == pytest.approx(once.losses, rel=1e-5)
        assert twice.norms == pytest.approx(once.norms, rel=1e-5)
        for name, tensor in once.final.items():
            torch.testing.assert_close(twice.final[name], tensor, rtol=0, atol=5e-6)


def test_all_ranks_agree_and_the_first_one_alone_gathers(outcomes: Any) -> None:
    for case in cases(2):
        first, second = outcomes[2, 0][case.name], outcomes[2, 1][case.name]
        assert (first.losses, first.norms) == (second.losses, second.norms), case
        assert first.final, case
        assert not second.final, case


def test_tied_weights_stay_one(outcomes: Any) -> None:
    final = outcomes[2, 0][Case(3, tied=True).name].final
    assert torch.equal(final["lm_head.weight"], final["model.language_model.embed_tokens.weight"])


# The plain engine alone, in this process


def plain(settings: OptimizerSettings = SETTINGS, *, dtype: torch.dtype = torch.float32, **module: Any) -> PlainEngine:
    step = make_step(make_vlm(dtype=dtype), "prob", **module).train()
    for name, parameter in step.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    return PlainEngine(step, settings, torch.device("cpu"))


def copies(engine: PlainEngine) -> list[Tensor]:
    return [p.detach().clone() for p in engine.parameters]


def test_steps_too_small_for_bf16_add_up() -> None:
    """Each moves a weight by less than half a unit in its last place; without an fp32 master none would ever count."""
    engine = plain(OptimizerSettings((0.0, 0.0), 0.0, 0.0, eps=1e-4), dtype=torch.bfloat16)
    start = copies(engine)
    batch = batch_of(["s1 I t6", "s3 I t5"])
    for _ in range(20):
        sums = engine.forward(batch)
        engine.backward(sums.loss, last=True)
        engine.update(sums.weight.item(), 1e-4)
    weight, before = (
        engine.module.model.lm_head.weight,
        start[[p is engine.module.model.lm_head.weight for p in engine.parameters].index(True)],
    )
    large = before.abs() > 0.25  # half a unit there is 2^-11 = 4.9e-4 and more
    moved = (weight != before)[large]
    assert moved.float().mean() > 0.5


def test_without_clipping_the_norm_is_still_told() -> None:
    engines = [plain(OptimizerSettings((0.9, 0.95), 0.0, clip, eps=1e-4)) for clip in (0.0, 1e9, 1e-3)]
    norms = []
    for engine in engines:
        sums = engine.forward(batch_of(["s1 I t6"]))
        engine.backward(sums.loss, last=True)
        norms.append(engine.update(sums.weight.item(), 1e-2))
    assert norms[0] == norms[1] == norms[2] > 1
    states = [copies(engine) for engine in engines]
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True))
