"""What does a finished stage look at? A few of its samples with the weight of each token, for the report."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from dpa_ray.batch import Batch, Encoded
from dpa_ray.data.images import decode
from dpa_ray.data.ingest import Loader
from dpa_ray.data.sample import Sample
from dpa_ray.data.words import pieces
from dpa_ray.engine.protocol import gathered
from dpa_ray.errors import UserError
from dpa_ray.model.examples import token_weights
from dpa_ray.model.step import StepModule

FILE = "examples.jsonl"
"""In a stage's artifact: one object per sample, {id, place, images, tokens}. `images` are data URIs of thumbnails; a token
is [text, weight, p - q, visual], the first two numbers null where it is no target."""

NUM_EXAMPLES = 8
MAX_TOKENS = 400
"""Text tokens of a sample that are kept; a page is not made for reading more."""

THUMBNAIL_SIDE = 192


def collect(module: StepModule, loader: Loader, device: torch.device) -> list[str]:
    """The lines of FILE: samples evenly from the stage's data, weighted by its trained model.

    Every rank has to call it (under ZeRO-3 a forward needs them all), and gets the same.
    Raises: UserError, on all ranks alike, where one of them cannot read a sample.
    """
    loader = replace(loader, blind=None, packing=False)  # q is live: a cache has that of the samples taken alone
    rows = np.unique(np.linspace(0, loader.prepared.num_rows - 1, NUM_EXAMPLES).astype(int)).tolist()
    read: list[tuple[Sample, Encoded, Batch]] = []
    problem = None
    try:
        for row in rows:
            if row not in loader.skipped:
                (sample,) = loader.samples([row])
                read.append((sample, loader.encoder(sample), loader.load(np.array([row]), row)))
    except UserError as err:
        problem = str(err)
    problems = [told for told in gathered(problem) if told is not None]
    if problems:  # before any forward: no rank may be in one alone
        raise UserError(problems[0])
    shown = [_example(module, loader, *each, device) for each in read]
    return [json.dumps(example, ensure_ascii=False) + "\n" for example in shown]


def _example(
    module: StepModule, loader: Loader, sample: Sample, encoded: Encoded, batch: Batch, device: torch.device
) -> dict[str, Any]:
    found = token_weights(module, batch.to(device))
    numbers = {
        position: (round(weight, 4), round(gain, 4))
        for position, weight, gain in zip(
            found.position.tolist(), found.weight.tolist(), found.gain.tolist(), strict=True
        )
    }
    shown = np.flatnonzero(encoded.input_ids != loader.encoder.image_token_id)[:MAX_TOKENS]
    texts = pieces(loader.encoder.tokenizer, encoded.input_ids[shown].tolist())
    return {
        "id": sample.id,
        "place": sample.place,
        "images": [thumbnail(image.data) for image in sample.images[: encoded.num_images]],
        "tokens": [
            [text, *numbers.get(int(position), (None, None)), bool(encoded.grounded[position])]
            for text, position in zip(texts, shown, strict=True)
        ],
    }


def thumbnail(data: bytes, side: int = THUMBNAIL_SIDE) -> str:
    """A JPEG of at most `side` pixels a side, as a data URI. Raises: ImageError."""
    image = decode(data)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
