"""Is held-out nll that of the whole logits, with the image and without, and does it come when it is time?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from dpa_ray.batch import IGNORE_INDEX, Batch
from dpa_ray.data.prepared import Prepared
from dpa_ray.engine.held_out import HeldOut, held_out_loader, while_running
from dpa_ray.errors import UserError
from dpa_ray.eval.held_out import VISUAL_GAIN, HeldOutNll, held_out_nll
from dpa_ray.model.held_out import nll_sums
from dpa_ray.recipe import HELD_OUT, HELD_OUT_CAPTIONS, Recipe, RecipeError
from dpa_ray.stages.pipeline import make_plan
from dpa_ray.stages.spec import BaseLlm, Connector, InstructTask
from dpa_ray.store import Store
from tests.random_models import VOCABULARY, batch_of, make_llm, make_step, make_vlm
from tests.small_recipes import common, weights_of
from tests.unit.test_blind import masked_q

SAMPLES = ["s1 I t5 g2", "s5 t4 u3", "I t6", "s3 I s4 t3 g2 s2 I u9"]


def nll_of(model: Any, batch: Batch) -> torch.Tensor:
    """(N,) float64 nll of every target from transformers' own logits, one sample after the other."""
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=batch.pixel_values, use_cache=False
    ).logits
    row, column = (batch.labels != IGNORE_INDEX).nonzero(as_tuple=True)
    scores = logits[row, column - 1, :VOCABULARY].double().log_softmax(-1)  # <image> has the row behind
    return -scores.gather(1, batch.labels[row, column].unsqueeze(1)).squeeze(1)


@torch.no_grad()
def test_sums_are_those_of_transformers_logits() -> None:
    """Of all targets, of visual ones, and of those that the image helps; without the image from the masked form of the
    blind pass. 1e-5: fp32 sums in another order."""
    model, batch = make_vlm(), batch_of(SAMPLES)
    found = nll_sums(make_step(model, "uniform"), batch, VISUAL_GAIN)
    row, column = (batch.labels != IGNORE_INDEX).nonzero(as_tuple=True)
    seen, pictured = nll_of(model, batch), batch.image_mask.any(1)[row]
    q, known = masked_q(LanguageModel(model), batch)
    blind = torch.where(pictured, -q.double().log(), seen)
    known |= ~pictured
    grounded = batch.grounded[row, column]
    helped = pictured & ((-seen).exp() - q > VISUAL_GAIN)
    assert 0 < int(helped.sum()) < len(seen)
    assert 0 < int(grounded.sum()) < len(seen)
    assert not known.all(), "nothing comes before the first target of the third sample"
    for sums, group in zip(found, (torch.ones_like(helped), grounded, helped), strict=True):
        expected = [group.sum(), seen[group].sum(), (group & known).sum(), blind[group & known].sum()]
        assert sums.tolist() == pytest.approx([float(x) for x in expected], rel=1e-5)


class LanguageModel:
    """The LLM of a LLaVA model, as a causal LLM looks."""

    def __init__(self, vlm: Any):
        self.model, self.config = vlm.model.language_model, vlm.config.text_config
        self.get_input_embeddings = vlm.get_input_embeddings
        self.lm_head = lambda hidden: vlm.lm_head(hidden)[..., :VOCABULARY]


def test_sums_add_over_batches_and_leave_the_module_as_it_was() -> None:
    module = make_step(make_vlm(), "prob").train()
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    whole = nll_sums(module, batch_of(SAMPLES), VISUAL_GAIN)
    parts = sum(nll_sums(module, batch_of([sample]), VISUAL_GAIN) for sample in SAMPLES)
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-6)
    assert torch.equal(nll_sums(module, batch_of(SAMPLES[:1], num_filler=1), VISUAL_GAIN), torch.zeros(3, 4).double())
    assert all(part.training for part in module.modules())
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_nothing_is_dropped_while_it_is_measured() -> None:
    """Though the module is in train mode."""
    module, batch = make_step(make_vlm(attention_dropout=0.3), "uniform").train(), batch_of(SAMPLES)
    assert torch.equal(nll_sums(module, batch, VISUAL_GAIN), nll_sums(module, batch, VISUAL_GAIN))
    assert not torch.equal(module(batch).loss, module(batch).loss), "there is something to drop"


def test_a_model_that_cannot_see_has_no_blind_nll() -> None:
    sums = nll_sums(make_step(make_llm("llama"), "uniform"), batch_of(["s2 t4 g1", "t5"]), VISUAL_GAIN)
    found = held_out_nll(sums.tolist())
    assert (found.num_targets, found.num_visual) == (10, 1)
    assert found.nll is not None
    assert found.visual_nll is not None
    assert found.nll_blind is found.visual_nll_blind is None


def test_means_by_hand() -> None:
    """Known visual words come before those that the image helps; nothing has no mean."""
    every, known, helped = [4, 6.0, 2, 5.0], [1, 3.0, 1, 4.0], [2, 1.0, 2, 2.0]
    assert held_out_nll([every, known, helped]) == HeldOutNll(4, 1.5, 2.5, 1, 3.0, 4.0, 1)
    assert held_out_nll([every, [0] * 4, helped]) == HeldOutNll(4, 1.5, 2.5, 2, 0.5, 1.0, 0)
    assert held_out_nll([[4, math.inf, 2, math.nan], known, helped]).nll is None
    assert held_out_nll([[0] * 4] * 3) == HeldOutNll(0, None, None, 0, None, None, 0)


# While a stage runs


@dataclass
class Batches:
    """A loader of one sample a row, which notes how it reads what."""

    prepared: Any
    samples: Sequence[str] = tuple(SAMPLES)
    packing: bool = False
    blind: Any = None
    skipped: frozenset[int] = frozenset()
    can_skip: bool = True
    read: list[list[int]] = field(default_factory=list)
    ways: set[tuple[Any, ...]] = field(default_factory=set)

    def load(self, rows: np.ndarray, filler_row: int) -> Batch:
        self.read.append([int(row) for row in rows])
        self.ways.add((self.prepared.digest, self.packing, self.blind, self.skipped, self.can_skip))
        return batch_of([self.samples[row % len(self.samples)] for row in rows])


def set_of(num_rows: int, digest: str = "held out") -> Prepared:
    return Prepared(digest, num_rows, (), 0)


def test_the_first_samples_are_read_once_where_they_are_kept() -> None:
    module, cpu = make_step(make_vlm(), "uniform"), torch.device("cpu")
    loader = Batches(set_of(9))
    kept = HeldOut(module, loader, 5, 2, cpu, keep=True)  # type: ignore[arg-type]
    assert kept.nll() == kept.nll()
    assert loader.read == [[0, 1], [2, 3], [4]]
    assert kept.nll().num_targets == batch_of([*SAMPLES, SAMPLES[0]]).num_targets
    other = HeldOut(module, loader, 500, 4, cpu, keep=False)  # type: ignore[arg-type]
    assert other.nll() == other.nll()
    assert loader.read[3:] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]] * 2


def test_it_is_time_every_few_steps_and_after_the_last(recipe: Callable[..., Recipe]) -> None:
    """By the step's number alone, on the first samples of the held-out set, which are read once: neither packed nor with
    what the stage's own samples have. The keys are those of the metrics."""
    task = held_out_task(recipe("eval.every_steps=3", "eval.running_samples=5", "stages.instruct.micro_batch_size=2"))
    module, cpu = make_step(make_vlm(), "uniform"), torch.device("cpu")
    loader = Batches(set_of(1, "its own"), packing=True, blind=object(), skipped=frozenset({1}))
    evaluate = while_running(task, module, loader, cpu)  # type: ignore[arg-type]
    found = {step: evaluate(step) for step in range(1, 9)}
    assert [step for step, values in found.items() if values] == [3, 6, 8]
    assert loader.read == [[0, 1], [2, 3], [4]]
    assert loader.ways == {("held out", False, None, frozenset(), False)}
    expected = HeldOut(module, Batches(set_of(9)), 5, 2, cpu, keep=False).nll()  # type: ignore[arg-type]
    for step in (3, 6, 8):
        assert found[step].pop("eval_time_s") >= 0
        assert found[step] == {f"eval_{name}": value for name, value in asdict(expected).items()}
    never = while_running(replace(task, held_out=None), module, loader, cpu)  # type: ignore[arg-type]
    assert [never(step) for step in (3, 8)] == [{}, {}]


def test_what_has_no_number_has_no_key(recipe: Callable[..., Recipe]) -> None:
    """A set without visual words, read by a model that cannot see."""
    task = held_out_task(recipe("eval.every_steps=3"))
    module, loader = make_step(make_llm("llama"), "uniform"), Batches(set_of(1, "its own"), ("s2 t4",))
    found = while_running(task, module, loader, torch.device("cpu"))(3)  # type: ignore[arg-type]
    assert found.keys() == {
        "eval_num_targets", "eval_nll", "eval_num_visual", "eval_num_visual_known", "eval_time_s",
    }  # fmt: skip


def held_out_task(made: Recipe) -> InstructTask:
    """Stage 3 in eight steps, with nine held-out samples."""
    own = common(made) | {"num_steps": 8}
    return InstructTask(**own, base=BaseLlm(weights_of()), connector=Connector(own["result"]), held_out=set_of(9))


def make_loader(prepared: Any) -> Any:
    from dpa_ray.data.ingest import Loader

    return Loader(None, prepared, None, None, 0, packing=True, blind=object(), skipped=frozenset({1}))  # type: ignore[arg-type]


def test_who_meets_a_broken_held_out_sample_is_not_sent_to_skip_ids(recipe: Callable[..., Recipe]) -> None:
    """They mean samples that are trained on: the run would be refused."""

    def broken() -> None:
        raise UserError("set.json#0: broken")

    loader = make_loader(common(recipe())["data"])
    with pytest.raises(UserError, match="add 'd:0' to data.skip_ids"):
        loader._or_skip(0, broken)
    with pytest.raises(UserError, match=r"^set.json#0: broken; this sample is held out"):
        held_out_loader(loader, loader.prepared)._or_skip(0, broken)


CAPTIONS = "data.eval_captions={source: 'builtin:shapes', options: {style: ornate, split: heldout, size: 3}}"


def test_stages_are_evaluated_on_what_is_like_their_own_data(recipe: Callable[..., Recipe], models: Any) -> None:
    """Captions in stages 1 and 2, `data.eval` in 3, which no stage's key knows of; without a cadence on nothing."""
    every = recipe(CAPTIONS, "eval.every_steps=2")
    assert [every.held_out(stage) for stage in ("proxy_llm", "proxy_mllm", "instruct")] == [
        every.data.eval_captions, every.data.eval_captions, every.data.eval,
    ]  # fmt: skip
    plain, plans = recipe(), []
    for made in (every, recipe(CAPTIONS), plain):
        plans.append(make_plan(made, Store(made.store), make=False, report=lambda _: None))
        assert plans[-1].refs == plans[0].refs
        assert [*plans[-1].held_out] == [HELD_OUT]
    assert [HELD_OUT_CAPTIONS in plan.data for plan in plans] == [True, False, False]
    with pytest.raises(RecipeError, match="eval.every_steps: expected data.eval .*found neither"):
        recipe("data.eval=null", "eval.every_steps=2")
