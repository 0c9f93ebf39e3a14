"""Does the tree keep to its own layers, and load without what only a cluster needs?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("ray", "deepspeed", "boto3", "torch", "transformers")

LOADED_WITHOUT = {
    "dpa_ray.recipe": HEAVY,
    "dpa_ray.report.console": HEAVY,
    "dpa_ray.report.metrics": HEAVY,
    "dpa_ray.report.trackers": HEAVY,
    "dpa_ray.report.runs_page, dpa_ray.report.sweep_page": HEAVY,
    "dpa_ray.batch": ("ray", "deepspeed", "boto3"),
    "dpa_ray.model.vlm, dpa_ray.model.step": ("ray", "deepspeed"),  # (peft itself loads boto3 where it finds it)
}
"""Modules that must be usable (and quick to load) without these packages."""


def test_the_layers_are_kept() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-logo"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("module", LOADED_WITHOUT)
def test_a_module_loads_without_what_it_does_not_need(module: str) -> None:
    code = f"import sys, {module}; print(*[p for p in {LOADED_WITHOUT[module]!r} if p in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
