"""Which weights does a recipe's model name stand for? Their digest, and a manifest of them in the store."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from transformers.utils.hub import cached_file

from dpa_ray.data import shapes
from dpa_ray.errors import UserError
from dpa_ray.model import tiny
from dpa_ray.model.tower import count_image_tokens
from dpa_ray.model.vlm import ModelRef, quiet_loading
from dpa_ray.stages import hub
from dpa_ray.stages.spec import ArtifactRef, Weights
from dpa_ray.store.artifacts import commit, content_key, digest_folder, find
from dpa_ray.store.fs import Store

Kind = Literal["llm", "vision"]
ARTIFACT: dict[Kind, str] = {"llm": "base-llm", "vision": "base-vision"}
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
OTHER_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
PRETRAINING_TEXTS = 6_500
"""For builtin:tiny-llm: a little more than its steps read (2 or 3 texts a row), since making more only takes time."""
TINY_SEED = 0


def resolve(
    name: str, kind: Kind, store: Store, *, make: bool, report: Callable[[str], None], commit: str | None = None
) -> Weights:
    """The weights that `name` (hub id, as ORG/NAME or ORG/NAME@REVISION, folder or builtin:tiny-*) stands for.

    Args:
        commit: of a hub id: what it stood at before, and stays at; None: what the hub says now.
        make: build a built-in model that is not in the store yet, and write the manifest of any other.
    Raises: UserError where there are none, or what is there is no model.
    """
    if name.startswith("builtin:"):
        return _builtin(name, kind, store, make=make, report=report)
    if "://" in name:
        raise UserError(
            f"model.{kind}: expected a model folder, a hub id or builtin:tiny-*, found a URI, which is not taken: {name}; copy "
            "the folder to the same path on every node, or name a hub id"
        )
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _folder(name, folder.resolve(), kind, store, make=make, report=report)
    if name.startswith(("/", ".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", name):
        raise UserError(
            f"model.{kind}: expected a model folder, a hub id (ORG/NAME or ORG/NAME@REVISION) or builtin:tiny-*, found no such folder: {name}"
        )
    if commit is not None:
        report(f"model.{kind} {name}: at commit {commit}, as before, wherever the hub stands now")
    return _hub(name, kind, store, make=make, before=commit)


def located(weights: Weights, kind: Kind, store: Store, scratch: Path) -> ModelRef:
    """Where config and tokenizer can be read from. A built-in model that nobody has made yet is made in `scratch`, untrained.

    Raises: UserError.
    """
    if weights.artifact is None or find(store, weights.artifact.stage, weights.artifact.key) is not None:
        return weights.located(store)
    target = scratch / weights.name
    with quiet_loading():
        if kind == "llm":
            vocabulary = shapes.vocabulary_texts()
            tiny.make_tiny_llm(target, texts=vocabulary[:1], vocabulary=vocabulary, seed=TINY_SEED, steps=0)
        else:
            tiny.make_tiny_vit(target, seed=TINY_SEED)
    return ModelRef(str(target))


def num_image_tokens(tower: Weights, image_size: int | None, store: Store) -> int:
    """Features per image of `tower`, also of a built-in one that is not made yet."""
    if tower.artifact is not None and find(store, tower.artifact.stage, tower.artifact.key) is None:
        return int((image_size or tiny.IMAGE_SIZE) // tiny.PATCH_SIZE) ** 2
    return count_image_tokens(tower.located(store), image_size)


def _builtin(name: str, kind: Kind, store: Store, *, make: bool, report: Callable[[str], None]) -> Weights:
    known = {"llm": "builtin:tiny-llm", "vision": "builtin:tiny-vit"}[kind]
    if name != known:
        raise UserError(f"model.{kind}: expected {known}, a hub id or a folder, found {name}")
    inputs: dict[str, Any] = {"builtin": name, "version": tiny.VERSION, "seed": TINY_SEED}
    if kind == "llm":
        inputs |= {"texts": shapes.VERSION, "num_texts": PRETRAINING_TEXTS}
    artifact = ArtifactRef(ARTIFACT[kind], content_key(inputs))
    if make and find(store, artifact.stage, artifact.key) is None:
        report(f"making {name}: once, reused from then on")
        with tempfile.TemporaryDirectory() as tmp:
            folder = Path(tmp)
            if kind == "llm":
                texts = shapes.pretraining_texts(TINY_SEED, PRETRAINING_TEXTS)
                tiny.make_tiny_llm(folder, texts=texts, vocabulary=shapes.vocabulary_texts(), seed=TINY_SEED)
            else:
                tiny.make_tiny_vit(folder, seed=TINY_SEED)
            commit(store, artifact.stage, artifact.key, folder, inputs=inputs, meta={"source": name})
    return Weights(name, artifact.key, artifact=artifact)


def _folder(name: str, folder: Path, kind: Kind, store: Store, *, make: bool, report: Callable[[str], None]) -> Weights:
    if not (folder / "config.json").is_file():
        raise UserError(f"model.{kind} {name}: expected a model folder with config.json, found none in it")
    weights = sorted({p.name for pattern in WEIGHT_FILES for p in folder.glob(pattern)})
    if make and not any(w.endswith((".safetensors", ".bin")) for w in weights):
        raise UserError(f"model.{kind} {name}: expected weights (*.safetensors), found none in the folder")
    if any(w.endswith(".safetensors") for w in weights):
        weights = [w for w in weights if not w.startswith("pytorch_model")]
    names = sorted({*weights, *(p.name for pattern in OTHER_FILES for p in folder.glob(pattern) if p.is_file())})
    files = digest_folder(folder, names)
    digest = content_key({name: entry["sha256"] for name, entry in files.items()})
    _record(store, kind, {"folder_files": digest}, {"source": name, "files": files}, make)
    return Weights(name, digest, ref=ModelRef(str(folder)))


def _hub(spec: str, kind: Kind, store: Store, *, make: bool, before: str | None) -> Weights:
    """A hub id at the commit `before`, or at that which it (or its revision: commit, tag or branch) stands at now: the hub is
    asked, or its local cache where there is no network."""
    name, _, revision = spec.partition("@")
    config = hub.asked(
        lambda: cached_file(name, "config.json", revision=before or revision or None), f"model.{kind} {spec}"
    )
    commit_hash = _commit_of(str(config))
    if commit_hash is None:
        raise UserError(f"model.{kind} {name}: the hub's cache names no commit for it: {config}")
    _record(store, kind, {"hub": name, "commit": commit_hash}, {"source": name, "commit": commit_hash}, make)
    return Weights(name, content_key({"hub": name, "commit": commit_hash}), ref=ModelRef(name, commit_hash))


def _commit_of(cached: str) -> str | None:
    found = re.search(r"snapshots/([0-9a-f]{7,64})/", cached)
    return found.group(1) if found else None


def _record(store: Store, kind: Kind, inputs: dict[str, Any], meta: dict[str, Any], make: bool) -> None:
    """A base model that is not ours to copy is a manifest without files: where it came from, and its digests."""
    if not make:
        return
    stage, key = ARTIFACT[kind], content_key(inputs)
    if find(store, stage, key) is None:
        with tempfile.TemporaryDirectory() as tmp:
            commit(store, stage, key, Path(tmp), inputs=inputs, meta=meta)
