"""What a training step leaves behind, in pieces that belong to no number of ranks and no engine.

For each trained parameter there are the fp32 master and AdamW's two moments. A rank has them whole or in stretches, as
its engine lays them out; a `Fragment` is one stretch of one flattened parameter. A checkpoint is fragments in
safetensors and an index of them: whoever resumes reads the stretches that it needs, whatever wrote them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (MASTER, *MOMENTS)

Index = dict[str, list[tuple[int, int, str]]]
"""By parameter: (start, length, file) of each stretch that was saved."""


@dataclass(frozen=True)
class Fragment:
    """A stretch of one trained parameter, flattened."""

    name: str  # of the parameter in `module.model`
    start: int
    tensors: Mapping[str, Tensor]  # by kind: (n,) float32 views of what the optimizer works with

    @property
    def length(self) -> int:
        return self.tensors[MASTER].numel()

    def part(self, start: int, length: int) -> Fragment:
        """`length` values from `start` (of this fragment) on; views again."""
        return Fragment(self.name, self.start + start, {k: t[start : start + length] for k, t in self.tensors.items()})


def adam_fragment(
    name: str, start: int, optimizer: torch.optim.Optimizer, flat: Tensor, offset: int, length: int
) -> Fragment:
    """The stretch that lies at `offset` of `flat`, a tensor that `optimizer` (AdamW) trains; moments that AdamW has not
    made yet, before its first step, are made."""
    state = optimizer.state[flat]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(flat, memory_format=torch.preserve_format)
    whole = {MASTER: flat.detach(), **{kind: state[kind] for kind in MOMENTS}}
    return Fragment(name, start, {kind: t.view(-1)[offset : offset + length] for kind, t in whole.items()})


def num_updates(optimizer: torch.optim.Optimizer) -> int:
    """How many steps AdamW has made: what its bias correction counts."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def set_num_updates(optimizer: torch.optim.Optimizer, number: int) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(number)


def share(fragments: Sequence[Fragment], rank: int, world_size: int) -> list[Fragment]:
    """An equal share of fragments that every rank has alike."""
    total = sum(fragment.length for fragment in fragments)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    mine, at = [], 0
    for fragment in fragments:
        start, stop = max(first - at, 0), min(last - at, fragment.length)
        if start < stop:
            mine.append(fragment.part(start, stop - start))
        at += fragment.length
    return mine


def snapshot(fragments: Iterable[Fragment]) -> list[Fragment]:
    """Copies on the CPU, which training does not change."""
    return [
        Fragment(f.name, f.start, {k: t.detach().to("cpu", copy=True) for k, t in f.tensors.items()}) for f in fragments
    ]


def save(fragments: Sequence[Fragment], file: Path) -> list[tuple[str, int, int]]:
    """Write `fragments`, on the CPU, to a safetensors file; returns (name, start, length) of each."""
    from safetensors.torch import save_file

    save_file({_key(kind, f.name, f.start): t for f in fragments for kind, t in f.tensors.items()}, file)
    return [(f.name, f.start, f.length) for f in fragments]


def files_for(fragments: Sequence[Fragment], index: Index) -> list[str]:
    """The saved files that `fragments` lie in.

    Raises: ValueError where a stretch of a parameter was not saved.
    """
    return sorted({file for fragment in fragments for _, _, _, file in _sources(fragment, index)})


def load(fragments: Sequence[Fragment], index: Index, folder: Path) -> None:
    """Fill `fragments` in place from the files in `folder`. Raises: as `files_for`."""
    from safetensors import safe_open

    opened: dict[str, Any] = {}
    for fragment in fragments:
        for offset, length, (start, inside), file in _sources(fragment, index):
            if file not in opened:
                opened[file] = safe_open(folder / file, framework="pt")
            for kind, tensor in fragment.tensors.items():
                saved = opened[file].get_slice(_key(kind, fragment.name, start))
                tensor[offset : offset + length].copy_(saved[inside : inside + length])


def _key(kind: str, name: str, start: int) -> str:
    return f"{kind}:{name}:{start}"


def _sources(fragment: Fragment, index: Index) -> Iterator[tuple[int, int, tuple[int, int], str]]:
    """Where `fragment` is found: (offset in it, length, (start of the saved stretch, offset in that), file)."""
    at, end = fragment.start, fragment.start + fragment.length
    for start, length, file in sorted(index.get(fragment.name, ())):
        if start <= at < min(start + length, end):
            size = min(start + length, end) - at
            yield at - fragment.start, size, (start, at - start), file
            at += size
    if at < end:
        raise ValueError(f"expected values {at} to {end} of {fragment.name}, found none")
