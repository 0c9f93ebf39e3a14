"""What store tests share: files of random bytes, scripts in processes of their own, which may be killed, and a lease that is
lost in time."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from dpa_ray.errors import LeaseTaken


def fill(folder: Path, **sizes: int) -> dict[str, bytes]:
    """Files of random bytes, by name (`__` for `/`) and size."""
    files = {name.replace("__", "/"): os.urandom(size) for name, size in sizes.items()}
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return files


def python(script: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `script` in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env={**os.environ, **(env or {})})


class Asked:
    """A `confirm`: raises when it is asked for the `taken_at`-th time, from 1."""

    def __init__(self, taken_at: int):
        self.taken_at, self.num = taken_at, 0

    def __call__(self) -> None:
        self.num += 1
        if self.num == self.taken_at:
            raise LeaseTaken("another process has taken over")
