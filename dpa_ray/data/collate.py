"""How do encoded samples become one micro-batch?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpa_ray.batch import IGNORE_INDEX, NO_SAMPLE, NO_TURN, Arrays, Encoded


def collate(
    encoded: Sequence[Encoded],
    pixels: Sequence[np.ndarray],
    *,
    pad_token_id: int,
    image_token_id: int,
    rows: Sequence[tuple[str, int]],
    ids: Sequence[str | None],
    num_filler: int = 0,
    image_shape: tuple[int, int, int] = (3, 0, 0),
    layout: Sequence[Sequence[int]] | None = None,
    pixel_scale: np.ndarray | None = None,
) -> Arrays:
    """A Batch's fields, right-padded, of `encoded`; the last `num_filler` of them are filler: no targets, in no count.

    `layout` packs: the numbers of the samples in each row, each in one place.

    `pixels`: one (C, H, W) array for each image span, in the order of the spans, fillers' included: uint8 levels where
    `pixel_scale` says what they stand for, else float32; where there is none, `pixel_values` has the shape
    (0, *image_shape). `rows` and `ids` are those of the real samples.
    Raises: ValueError where counts disagree.
    """
    num_real = len(encoded) - num_filler
    if num_real < 0 or not encoded or len(rows) != num_real or len(ids) != num_real:
        raise ValueError(
            f"expected rows and ids of the {num_real} real samples among {len(encoded)}, found {len(rows)} rows and "
            f"{len(ids)} ids"
        )
    num_images = sum(e.num_images for e in encoded)
    if num_images != len(pixels):
        raise ValueError(f"expected pixels of {num_images} images, as many as spans, found {len(pixels)}")
    places = layout if layout is not None else [[b] for b in range(len(encoded))]
    if sorted(i for row in places for i in row) != list(range(len(encoded))):
        raise ValueError(f"expected each of {len(encoded)} samples in one place of the layout, found {places}")
    size, length = len(places), max(sum(len(encoded[i].input_ids) for i in row) for row in places)
    input_ids = np.full((size, length), pad_token_id, np.int64)
    attention_mask = np.zeros((size, length), np.int64)
    target = np.zeros((size, length), bool)
    turn = np.full((size, length), NO_TURN, np.int32)
    grounded = np.zeros((size, length), bool)
    sample_number = np.full((size, length), NO_SAMPLE, np.int32)
    blind = None if encoded[0].blind is None else np.zeros((2, size, length), np.float32)
    num_tokens = 0
    for b, row in enumerate(places):
        start = 0
        for number in row:
            sample = encoded[number]
            place = slice(start, start + len(sample.input_ids))
            start = place.stop
            input_ids[b, place] = sample.input_ids
            attention_mask[b, place] = 1
            sample_number[b, place] = number
            if number < num_real:
                target[b, place] = sample.target
                turn[b, place] = sample.turn
                grounded[b, place] = sample.grounded
                if blind is not None:
                    assert sample.blind is not None, "of all samples or of none"
                    blind[:, b, place] = sample.blind
                num_tokens += len(sample.input_ids)
    if layout is not None:
        spans = np.split(np.arange(num_images), np.cumsum([e.num_images for e in encoded])[:-1])
        pixels = [pixels[i] for row in places for number in row for i in spans[number]]
    dtype = np.float32 if pixel_scale is None else np.uint8
    images = np.stack(pixels).astype(dtype, copy=False) if pixels else np.zeros((0, *image_shape), dtype)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": np.where(target, input_ids, IGNORE_INDEX),
        "turn": turn,
        "grounded": grounded,
        # the padding may be the image token's own id in no tokenizer we make, but a mask that asks both cannot be wrong
        "image_mask": (input_ids == image_token_id) & (attention_mask == 1),
        "pixel_values": images,
        "num_samples": num_real,
        "num_tokens": num_tokens,
        "num_targets": int(target.sum()),
        "rows": list(rows),
        "ids": list(ids),
        "sample": None if layout is None else sample_number,
        "log_q": None if blind is None else blind[0],
        "blind_logit": None if blind is None else blind[1],
        "pixel_scale": pixel_scale,
    }
