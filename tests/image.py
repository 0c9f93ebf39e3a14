"""What Ray is told by the image's environment, for tests whose cluster should be as one of that image."""

from __future__ import annotations

import re
from pathlib import Path

DOCKERFILE = (Path(__file__).resolve().parents[1] / "cluster" / "Dockerfile").read_text()


def ray_settings() -> dict[str, str]:
    """Ray's own settings (RAY_ and a name in small letters) of the Dockerfile's ENV."""
    lines = DOCKERFILE.replace("\\\n", " ").splitlines()
    return dict(re.findall(r"(RAY_[a-z_]+)=(\S+)", " ".join(line for line in lines if line.startswith("ENV "))))
