"""Does stage 3 start from the base LLM, whatever became of the proxy? Weights compared bit for bit over the base vocabulary."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.integration.runs import Run, changed, losses, make_recipe, run_dpa, tree
from tests.tiny_models import LlavaData


def llm_weights(folder: Path, *, num_rows: int | None = None) -> dict[str, torch.Tensor]:
    """The decoder's weights of an LLM folder, or of a LLaVA folder cut to the base's `num_rows` of the vocabulary."""
    if num_rows is None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        decoder = model.model
    else:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
        decoder = model.model.language_model
    state = {**decoder.state_dict(), "lm_head.weight": model.lm_head.weight.detach()}
    for name in ("embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:num_rows]
    return state


def check_llm_is_base(run: Run) -> None:
    base = llm_weights(Path(run.recipe["model"]["llm"]))
    result = llm_weights(run.model, num_rows=len(base["lm_head.weight"]))
    assert base.keys() == result.keys()
    for name, weight in base.items():
        assert weight.dtype == result[name].dtype, name
        assert torch.equal(weight, result[name]), name


def check_adapter_is_not_zero(store: Path) -> None:
    (file,) = store.glob("artifacts/proxy-llm-*/adapter_model.safetensors")
    assert max(t.abs().max().item() for name, t in load_file(file).items() if "lora_B" in name) > 1e-3


def copy_store(run: Run, target: Path) -> Path:
    """The store of `run` without its instruct artifact, run folder, and anything that points at either."""
    shutil.copytree(run.store, target)
    for folder in [*target.glob("artifacts/instruct-*"), *target.glob("checkpoints/*"), *target.glob("runs/*")]:
        shutil.rmtree(folder)
    return target


def poison(store: Path, *, sealed: bool) -> None:
    """NaN in every weight of the proxy: adapter and merged LLM. `sealed`: manifests that vouch for it."""
    files = [*store.glob("artifacts/proxy-llm-*/*.safetensors"), *store.glob("artifacts/proxy-merged-*/*.safetensors")]
    assert files
    for file in files:
        nan = {name: torch.full_like(t, torch.nan) for name, t in load_file(file).items()}
        file.unlink()  # a hard link or a cache must not carry it elsewhere
        save_file(nan, file, {"format": "pt"})
        if sealed:
            manifest = json.loads((file.parent / "manifest.json").read_text())
            data = file.read_bytes()
            manifest["files"][file.name] |= {"size_bytes": len(data), "sha256": sha256(data).hexdigest()}
            del manifest["digest"]  # as manifests once were
            (file.parent / "manifest.json").write_text(json.dumps(manifest))


def test_full_training_with_zero_rate_gives_the_base_llm(measured: Run) -> None:
    check_adapter_is_not_zero(measured.store)
    check_llm_is_base(measured)


@pytest.mark.ci
def test_frozen_llm_is_the_base_llm_and_a_poisoned_proxy_changes_nothing(measured: Run, tmp_path: Path) -> None:
    """The connector trains, the LLM does not; and what a proxy of NaN would do to stage 3 is nothing at all."""
    store = copy_store(measured, tmp_path / "store")
    check_adapter_is_not_zero(store)
    poison(store, sealed=False)
    recipe = changed(measured.recipe, stages__instruct__llm="frozen", stages__instruct__lr=1.0e-3)
    run = run_dpa(recipe, store, "frozen")
    assert run.returncode == 0, run.output
    assert all(line.get("reused") for stage in ("proxy_llm", "proxy_mllm") for line in run.metrics(stage))
    check_llm_is_base(run)
    # step 1 is before the first update: the same as in the clean run that measured
    assert losses(run, "instruct")[0] == pytest.approx(losses(measured, "instruct")[0], rel=1e-6)
    before = load_file(measured.artifact("proxy_mllm") / "connector.safetensors")
    after = AutoModelForImageTextToText.from_pretrained(run.model).model.multi_modal_projector.state_dict()
    assert all(torch.isfinite(after[name]).all() and not torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("llm", "sealed"),
    [
        pytest.param("full", True, marks=pytest.mark.full, id="full-vouched-for"),
        pytest.param("full", False, marks=pytest.mark.full, id="full-corrupt"),
        pytest.param("lora", True, marks=pytest.mark.full, id="lora-vouched-for"),
        pytest.param("lora", False, marks=pytest.mark.full, id="lora-corrupt"),
    ],
)
def test_poisoned_proxy_changes_nothing(llm: str, sealed: bool, measured: Run, tmp_path: Path) -> None:
    """Trained in full or by LoRA from clean and from poisoned stores: the same steps and the same model, bit for bit."""
    changes = {"stages__instruct__llm": llm, "stages__instruct__lr": 1.0e-3}
    recipe = changed(measured.recipe, **changes)
    runs = []
    for kind in ("clean", "poisoned"):
        store = copy_store(measured, tmp_path / kind / "store")
        if kind == "poisoned":
            poison(store, sealed=sealed)
        runs.append(run_dpa(recipe, store, "run"))
        assert runs[-1].returncode == 0, runs[-1].output
    clean, poisoned = runs
    assert losses(clean, "instruct") == losses(poisoned, "instruct")
    ours, theirs = (load_file(run.model / "model.safetensors") for run in runs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.full
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_llm_is_the_base_llm_under_zero3_and_bf16(
    family: str, dtype: str, tmp_path: Path, tiny_llm: Callable, tiny_tower: Callable,
    captions: LlavaData, conversations: LlavaData,
) -> None:  # fmt: skip
    """Partitioned parameters, a tied head, a row appended or taken beyond the tokenizer; weights stored in bf16."""
    options = {"reserved": "row"} if family == "qwen2" else {}
    llm = tiny_llm(family, bos=True, dtype=getattr(torch, dtype), **options)
    recipe = make_recipe(
        llm, tiny_tower("siglip"), captions, conversations, deepspeed__zero_stage=3, cluster__workers=2,
        precision="bf16" if dtype == "bfloat16" else "fp32", stages__instruct__llm="frozen",
        stages__instruct__lr=1.0e-3,
    )  # fmt: skip
    run = run_dpa(recipe, tmp_path / "store", "frozen")
    assert run.returncode == 0, run.output
    check_adapter_is_not_zero(run.store)
    check_llm_is_base(run)


@pytest.mark.full
def test_a_proxy_cannot_be_handed_to_stage_3(measured: Run, tmp_path: Path) -> None:
    """`from` of the connector's stage takes connectors: an adapter folder is refused by type, and nothing is written."""
    store = copy_store(measured, tmp_path / "store")
    adapter = next(store.glob("artifacts/proxy-llm-*"))
    before = tree(store)
    recipe = changed(measured.recipe, stages__proxy_mllm={"from": str(adapter)})
    run = run_dpa(recipe, store, "wrong")
    assert run.returncode in (1, 2), run.output
    assert "Traceback" not in run.stdout + run.stderr, run.output
    assert "connector" in run.stdout + run.stderr, run.output
    assert [f for f in tree(store) if f.startswith("artifacts")] == [f for f in before if f.startswith("artifacts")]
