"""The environment that the image sets, for tests whose cluster should be as one of that image."""

from __future__ import annotations

import re
from pathlib import Path

DOCKERFILE = (Path(__file__).resolve().parents[1] / "cluster" / "Dockerfile").read_text()


def environment() -> dict[str, str]:
    """All of the Dockerfile's ENV."""
    lines = DOCKERFILE.replace("\\\n", " ").splitlines()
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(line for line in lines if line.startswith("ENV "))))


def ray_settings() -> dict[str, str]:
    """Ray's own settings among them: RAY_ and a name in small letters."""
    return {name: value for name, value in environment().items() if re.fullmatch(r"RAY_[a-z_]+", name)}
