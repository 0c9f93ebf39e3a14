"""Do the logged loss, nll_mean and weight_mean of a whole run equal the method's formulas, computed by the reference?

With lr 0 a stage's weights stay what they were, so that the reference can compute every step from the artifacts:
stage 2's connector is the one it began with, stage 3's model is the base LLM and that connector. Stage 1 trains (so
that the proxy differs from the base LLM); its first step is still the base LLM's, the adapter being zero.

Tolerance: 1e-4 relative, the issue's. Both sides compute in fp32 with sums in a different order (padding, dropped
image tokens, chunks); the tiny models' losses differ by about 1e-6 for that.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.integration.runs import Run, changed, make_recipe, run_dpa
from tests.parity.reference import Reference, Setup, Step
from tests.tiny_models import LlavaData

RTOL = 1e-4
WEIGHTS = {"vanilla": "uniform", "pmo": "uniform", "cmo": "prob", "cal": "logit", "dpa": "prob"}
BOUNDS = {"uniform": (1.0, 1.0), "prob": (0.05, 0.5), "logit": (1.0, 5.0)}
HAS_PROXY = {"pmo", "dpa"}


def setup_of(run: Run, stage: str) -> Setup:
    """What `stage` of a run computes, from the recipe as the test wrote it and the artifacts' files."""
    recipe = run.recipe
    section, data = recipe["stages"][stage], recipe["data"]["instruct" if stage == "instruct" else "pretrain"]
    weights = "uniform" if stage == "proxy_llm" else section.get("weights", WEIGHTS[recipe["method"]])
    cmo = recipe.get("cmo", {})
    proxy = stage == "proxy_mllm" and recipe["method"] in HAS_PROXY
    return Setup(
        stage,
        Path(recipe["model"]["llm"]),
        Path(data["images"]),
        section["max_length"],
        adapter=run.artifact("proxy_llm") if proxy else None,
        tower=Path(recipe["model"]["vision"]),
        vision_layer=recipe["model"]["vision_layer"],
        connector=None if stage == "proxy_llm" else run.artifact("proxy_mllm") / "connector.safetensors",
        weights=weights,
        bounds=(cmo.get("lower", BOUNDS[weights][0]), cmo.get("upper", BOUNDS[weights][1])),
        window=cmo.get("window", 3),
        aspect=data.get("image_aspect", "pad" if stage == "instruct" else "crop"),
        image_size=recipe["model"].get("image_size"),
    )


def check_stage(run: Run, stage: str, data: LlavaData, *, only_first_step: bool = False) -> list[Step]:
    """Compare every step of a stage that ran at lr 0; gives the reference's steps."""
    reference, expected = Reference(setup_of(run, stage)), []
    lines, samples = run.metrics(stage), run.samples(stage)
    assert [line["step"] for line in lines] == sorted(samples) == list(range(1, len(lines) + 1))
    for line in lines[:1] if only_first_step else lines:
        ids = samples[line["step"]]
        step = reference.step([data.samples[i] for i in ids])
        expected.append(step)
        where = f"{stage} step {line['step']}"
        assert line["num_samples"] == len(ids), where
        assert (line["num_targets"], line["num_tokens"]) == (step.num_targets, step.num_tokens), where
        for key in ("loss", "nll_mean", "weight_mean"):
            assert line[key] == pytest.approx(getattr(step, key), rel=RTOL, abs=1e-7), f"{where}: {key}"
    return expected


def check_run(run: Run, pretrain: LlavaData, instruct: LlavaData) -> None:
    """Every stage of a run whose stages 2 and 3 have lr 0, and that each takes every sample once."""
    if run.recipe["method"] in HAS_PROXY:
        check_stage(run, "proxy_llm", pretrain, only_first_step=True)
    for stage, data in (("proxy_mllm", pretrain), ("instruct", instruct)):
        steps = check_stage(run, stage, data)
        taken = [i for ids in run.samples(stage).values() for i in ids]
        assert sorted(taken) == sorted(data.samples), "one epoch takes every sample once"
        if setup_of(run, stage).weights != "uniform":
            # the comparison says something: differences below the lower bound, and well above it
            lower, upper = setup_of(run, stage).bounds
            differences = np.concatenate([s.unclamped for s in steps])
            assert differences.min() < lower
            assert differences.max() > lower + 0.3 * (upper - lower)
            assert any(abs(s.loss / s.nll_mean - 1) > 100 * RTOL for s in steps)


def test_llama_with_bos(measured: Run, captions: LlavaData, conversations: LlavaData) -> None:
    check_run(measured, captions, conversations)


def test_proxy_adapter_is_what_the_method_says(measured: Run) -> None:
    """LoRA on every linear layer of the decoder, on nothing else, and not zero after training."""
    adapter = load_file(measured.artifact("proxy_llm") / "adapter_model.safetensors")
    modules = {name.split(".lora_")[0].split(".", 4)[-1] for name in adapter}
    layers = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    layers += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert modules == {f"{i}.{layer}" for i in range(2) for layer in layers}
    assert all(tensor.abs().max() > 0 for tensor in adapter.values())


@pytest.mark.ci
def test_gemma2_without_bos_two_workers(
    tmp_path: Path, tiny_llm: Callable, tiny_tower: Callable, captions: LlavaData, conversations: LlavaData
) -> None:
    """Soft-capping, a tied head, EOS that is not the end of a turn, a sliding window that cuts inside a sample, q = 0
    for a caption's first token, a tower without CLS, bounds of the user's, and sums over two ranks and two passes."""
    recipe = make_recipe(
        tiny_llm("gemma2", bos=False, sliding_window=20), tiny_tower("siglip"), captions, conversations, method="dpa",
        cluster__workers=2, cmo={"lower": 0.01, "upper": 0.1},
        stages__proxy_mllm__micro_batch_size=1, stages__instruct__micro_batch_size=1,
    )  # fmt: skip
    run = run_dpa(recipe, tmp_path / "store", "gemma2")
    assert run.returncode == 0, run.output
    check_run(run, captions, conversations)


# (family, LLM options, tower, recipe changes) beside BOS and method: between them every tower, every way to find a
# row for the placeholder, tied and untied heads, windows, aspects, checkpointing, all five methods.
MATRIX: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "llama": ("llama", {"reserved": "none"}, "dinov2", {"stages__instruct__gradient_checkpointing": True}),
    "qwen2": ("qwen2", {"reserved": "row", "tied": True}, "clip", {"data__instruct__image_aspect": "stretch"}),
    "gemma2": ("gemma2", {"reserved": "none"}, "siglip", {"cmo": {"lower": 0.01, "upper": 0.1, "window": 5}}),
    "mistral": ("mistral", {"sliding_window": 16}, "clip", {"data__pretrain__image_aspect": "pad"}),
}


IN_CI = {("llama", "dpa", False)}


def _matrix() -> list[Any]:
    """Every family, dpa and vanilla, with and without BOS; .ci/run takes one of them."""
    cases = [(case, method, bos) for case in MATRIX for method in ("dpa", "vanilla") for bos in (True, False)]
    return [
        pytest.param(
            *case,
            marks=pytest.mark.ci if case in IN_CI else pytest.mark.full,
            id=f"{case[0]}-{case[1]}-{'bos' if case[2] else 'no-bos'}",
        )
        for case in cases
    ]


@pytest.mark.parametrize(("case", "method", "bos"), _matrix())
def test_matrix(
    case: str, method: str, bos: bool, tmp_path: Path, tiny_llm: Callable, tiny_tower: Callable,
    captions: LlavaData, conversations: LlavaData,
) -> None:  # fmt: skip
    family, options, tower, changes = MATRIX[case]
    if method == "vanilla":
        changes = {k: v for k, v in changes.items() if k != "cmo"}
    recipe = make_recipe(
        tiny_llm(family, bos=bos, **options), tiny_tower(tower), captions, conversations, method=method, **changes
    )
    run = run_dpa(recipe, tmp_path / "store", case)
    assert run.returncode == 0, run.output
    check_run(run, captions, conversations)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("pmo", marks=pytest.mark.full),
        pytest.param("cmo", marks=pytest.mark.full),
        pytest.param("cal", marks=pytest.mark.full),
    ],
)
def test_other_methods(
    method: str, tmp_path: Path, tiny_llm: Callable, tiny_tower: Callable, captions: LlavaData, conversations: LlavaData
) -> None:
    """Without BOS: a caption's first token has no blind logit, and with cal weighs the lower bound.

    cal gets an LLM with random weights: an untrained connector's image only lowers a fitted one's target logits, and
    every weight would be the lower bound."""
    changes: dict[str, Any] = {"cmo": {"lower": 0.1, "upper": 3.0}} if method == "cal" else {}
    llm = tiny_llm("qwen2", bos=False, **({"num_steps": 0} if method == "cal" else {}))
    recipe = make_recipe(llm, tiny_tower("clip"), captions, conversations, method=method, **changes)
    run = run_dpa(recipe, tmp_path / "store", method)
    assert run.returncode == 0, run.output
    check_run(run, captions, conversations)


@pytest.mark.full
def test_weights_per_stage_live_blind_and_image_size(
    tmp_path: Path, tiny_llm: Callable, tiny_tower: Callable, captions: LlavaData, conversations: LlavaData
) -> None:
    """The paper's ablation (weights in one stage only), the blind pass run live, another size than the processor's,
    the torch engine, and fractions of the samples."""
    recipe = make_recipe(
        tiny_llm("llama", bos=False), tiny_tower("dinov2"), captions, conversations, method="pmo", engine="torch",
        stages__proxy_mllm__weights="prob", cmo={"blind": "live"}, model__image_size=42, model__vision_layer=-3,
    )  # fmt: skip
    run = run_dpa(recipe, tmp_path / "store", "ablation")
    assert run.returncode == 0, run.output
    check_run(run, captions, conversations)


@pytest.mark.full
def test_zero_rate_proxy_is_the_base(
    tmp_path: Path, tiny_llm: Callable, tiny_tower: Callable, captions: LlavaData, conversations: LlavaData
) -> None:
    """Stage 1 at lr 0 logs the base LLM's own loss in every step, and stage 2 then runs on the base LLM."""
    recipe = make_recipe(
        tiny_llm("llama", bos=True, reserved="token"), tiny_tower("clip"), captions, conversations,
        stages__proxy_llm__lr=0.0,
    )  # fmt: skip
    run = run_dpa(recipe, tmp_path / "store", "zero")
    assert run.returncode == 0, run.output
    check_stage(run, "proxy_llm", captions)
    check_stage(Run(**{**vars(run), "recipe": changed(recipe, method="cmo")}), "proxy_mllm", captions)
