"""Does the benchmark of a step compare the same work, and write the file that others read?"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tests.benchmarks import cmo_step

KEYS = {
    "stage", "model", "variant", "step_time_s", "loss_peak_bytes", "peak_bytes", "tokens_per_s", "floor_ratio",
}  # fmt: skip
ROUNDS = 2


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setattr(cmo_step, "llm_config", lambda _: LlamaConfig(vocab_size=4096, num_key_value_heads=1, **config))
    monkeypatch.setattr(cmo_step, "NUM_PATCHES", 24)
    monkeypatch.setattr(cmo_step, "TEXT", {2: (0, 0, 6), 3: (3, 8, 5)})


@pytest.mark.usefixtures("small")
def test_file_of_all_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rounds.json"
    monkeypatch.setattr(sys, "argv", ["cmo_step", "--rounds", str(ROUNDS), "--out", str(file)])
    cmo_step.main()
    values = json.loads(file.read_text())
    assert values["device"].startswith("cpu")
    variants = [(row["stage"], row["variant"]) for row in values["rows"]]
    assert variants == [(2, v) for v in ("vanilla", "released", "live", "cached")] + [
        (3, v) for v in ("vanilla", "released", "live")
    ]
    for row in values["rows"]:
        assert set(row) == KEYS
        assert len(row["step_time_s"]) == ROUNDS
    floors = {(row["stage"], row["variant"]): row["floor_ratio"] for row in values["rows"]}
    assert floors[2, "cached"] == floors[2, "vanilla"] == 1 < floors[2, "live"] < floors[2, "released"]
    peaks = {(row["stage"], row["variant"]): row["loss_peak_bytes"] for row in values["rows"]}
    assert peaks[2, "cached"] < peaks[2, "released"] / 10
    assert "whole" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("stage", [2, 3])
def test_variants_take_the_same_step(stage: int) -> None:
    """Random weights make p - q small, so that all weights are the lower bound: every loss is the mean nll."""
    setting, batch_of = cmo_step.make_setting(stage, "small", "cpu")
    setting.batches.update({v: batch_of(v, 2) for v in cmo_step.VARIANTS[stage]})
    losses = {v: setting.step(v) for v in cmo_step.VARIANTS[stage]}
    assert losses == pytest.approx(dict.fromkeys(losses, losses["whole"]), rel=1e-5)


@pytest.mark.usefixtures("small")
def test_whole_computes_the_last_layer_at_every_position() -> None:
    setting, batch_of = cmo_step.make_setting(3, "small", "cpu")
    setting.batches.update({v: batch_of(v, 2) for v in ("vanilla", "whole")})
    rows: list[int] = []
    last = setting.modules["whole"].decoder.layers[-1].mlp.up_proj
    last.register_forward_hook(lambda _, args, __: rows.append(args[0].flatten(0, 1).shape[0]))
    for variant in ("vanilla", "whole"):
        setting.step(variant)
    assert rows == [2 * 5 + 1, 2 * 40], "the first position is always among those that are read"
