"""Does a run learn the same from tars and Parquet as from LLaVA JSON with the same samples?

The samples, their order and their row groups are the same, so the logged losses are, bit for bit.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.integration.runs import STAGES, Run, changed, losses, run_dpa
from tests.tiny_models import LlavaData


def records(data: LlavaData) -> list[tuple[dict[str, Any], list[Path]]]:
    """LLaVA records and the files of their images."""
    found = []
    for record in json.loads(data.file.read_text()):
        names = record.get("image", [])
        found.append((record, [data.images / name for name in ([names] if isinstance(names, str) else names)]))
    return found


def write_tar(data: LlavaData, path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for number, (record, images) in enumerate(records(data)):
            text = json.dumps({"id": record["id"], "conversations": record["conversations"]}).encode()
            info = tarfile.TarInfo(f"{number:04}.json")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
            for place, image in enumerate(images):
                tar.add(image, f"{number:04}.{place}{image.suffix}")


def write_parquet(data: LlavaData, path: Path) -> None:
    rows = [
        {
            "id": record["id"],
            "images": [{"bytes": image.read_bytes(), "path": image.name} for image in images],
            "conversations": record["conversations"],
        }
        for record, images in records(data)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.ci
def test_tars_and_parquet_train_as_llava_json_does(
    measured: Run, captions: LlavaData, conversations: LlavaData, tmp_path: Path
) -> None:
    write_tar(captions, tmp_path / "captions.tar")
    write_parquet(conversations, tmp_path / "conversations.parquet")
    recipe = changed(
        measured.recipe,
        data__pretrain={"source": str(tmp_path / "captions.tar")},
        data__instruct={"source": [{"source": str(tmp_path / "conversations.parquet"), "take": "first:100%"}]},
    )
    run = run_dpa(recipe, tmp_path / "store", "other")
    assert run.returncode == 0, run.output
    for stage in STAGES:
        assert run.samples(stage) == measured.samples(stage)
        assert losses(run, stage) == losses(measured, stage)
