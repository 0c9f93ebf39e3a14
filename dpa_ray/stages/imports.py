"""`stages.X.from`: an adapter or a connector that the user has, taken as an artifact."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from dpa_ray.data.retry import retried
from dpa_ray.errors import UserError
from dpa_ray.model import lora, vlm
from dpa_ray.stages.keys import imported_inputs
from dpa_ray.stages.spec import ArtifactRef
from dpa_ray.store.artifacts import commit, content_key, digest_folder, find
from dpa_ray.store.fs import Store


def import_adapter(source: str, store: Store) -> ArtifactRef:
    """A PEFT adapter folder as a proxy-llm artifact. Raises: UserError where it is none."""
    with tempfile.TemporaryDirectory() as tmp:
        folder = _brought(source, Path(tmp), "stages.proxy_llm.from")
        lora.check_adapter(folder)
        chosen = Path(tmp) / "adapter"
        chosen.mkdir()
        for name in lora.ADAPTER_FILES:
            shutil.copy(folder / name, chosen / name)
        return _committed(store, "proxy-llm", chosen, source)


def import_connector(source: str, store: Store) -> ArtifactRef:
    """A connector (safetensors or LLaVA's mm_projector.bin) as a proxy-mllm artifact. Raises: UserError."""
    with tempfile.TemporaryDirectory() as tmp:
        tensors = vlm.import_connector(_brought(source, Path(tmp), "stages.proxy_mllm.from"))
        chosen = Path(tmp) / "connector"
        chosen.mkdir()
        save_file(tensors, chosen / vlm.CONNECTOR_FILE, {"format": "pt"})
        return _committed(store, "proxy-mllm", chosen, source)


def check(stage: str, source: str) -> None:
    """Raises: UserError where a local `source` of `stages.STAGE.from` is no adapter, or no connector."""
    found = Path(source).expanduser()
    if not found.exists():
        raise UserError(f"stages.{stage}.from: expected a file or folder, found none at {source}")
    if stage == "proxy_llm":
        lora.check_adapter(found)
    else:
        vlm.import_connector(found)


def _brought(source: str, tmp: Path, key: str) -> Path:
    """`source` as a local path; what lies on S3 is downloaded."""
    if source.startswith(("s3://", "gs://")):
        parent, _, name = source.rstrip("/").rpartition("/")
        remote, target = Store(parent, through=retried), tmp / "download"
        target.mkdir()
        if remote.exists(name):
            remote.download("", target, [name])
            return target / name
        remote.download(name, target)
        found = target
    else:
        found = Path(source).expanduser()
    if not found.exists() or (found.is_dir() and not any(found.iterdir())):
        raise UserError(f"{key}: expected a file or folder, found none at {source}")
    return found


def _committed(store: Store, stage: str, folder: Path, source: str) -> ArtifactRef:
    inputs = imported_inputs(stage, digest_folder(folder))
    artifact = ArtifactRef(stage, content_key(inputs))
    if find(store, stage, artifact.key) is None:
        commit(store, stage, artifact.key, folder, inputs=inputs, meta={"source": source})
    return artifact
