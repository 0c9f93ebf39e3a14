"""Do padding, masks and counts of a micro-batch say what they should, with filler and without images?"""

from __future__ import annotations

import numpy as np
import pytest

from dpa_ray.batch import IGNORE_INDEX, NO_TURN, Encoded
from dpa_ray.data import wire
from dpa_ray.data.collate import collate

IMAGE, PAD = 9, 0


def encoded(ids, targets=(), num_images=0):
    size = len(ids)
    target = np.isin(np.arange(size), targets)
    turn = np.where(target, 0, NO_TURN).astype(np.int32)
    return Encoded(np.array(ids), target, turn, target.copy(), num_images)


def batch(samples, pixels=(), **options):
    options = {"rows": [("d", i) for i in range(len(samples))], "ids": ["x"] * len(samples), **options}
    return collate(samples, list(pixels), pad_token_id=PAD, image_token_id=IMAGE, **options)


def test_right_padding_labels_and_counts():
    out = batch([encoded([1, 9, 9, 5, 6], [3, 4], 1), encoded([1, 7], [1])], [np.ones((3, 2, 2), np.float32)])
    assert out.input_ids.tolist() == [[1, 9, 9, 5, 6], [1, 7, PAD, PAD, PAD]]
    assert out.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    ignore = IGNORE_INDEX
    assert out.labels.tolist() == [[ignore, ignore, ignore, 5, 6], [ignore, 7, ignore, ignore, ignore]]
    assert out.turn.tolist() == [[-1, -1, -1, 0, 0], [-1, 0, -1, -1, -1]]
    assert out.image_mask.tolist() == [[False, True, True, False, False], [False] * 5]
    assert out.grounded.tolist() == [[False, False, False, True, True], [False, True, False, False, False]]
    assert (out.num_samples, out.num_tokens, out.num_targets) == (2, 7, 3)
    assert out.rows == [("d", 0), ("d", 1)]


def test_padding_with_the_image_token_is_no_image():
    out = collate(
        [encoded([9, 9], num_images=1), encoded([1])],
        [np.zeros((3, 1, 1))],
        pad_token_id=IMAGE,
        image_token_id=IMAGE,
        rows=[("d", 0), ("d", 1)],
        ids=[None, None],
    )
    assert out.image_mask.tolist() == [[True, True], [False, False]]


def test_filler_has_its_image_but_no_target_and_no_count():
    out = batch([encoded([1, 9, 5], [2], 1)], [np.ones((3, 2, 2))], rows=[], ids=[], num_filler=1)
    assert out.labels.eq(IGNORE_INDEX).all()
    assert out.turn.eq(NO_TURN).all()
    assert not out.grounded.any()
    assert out.attention_mask.all()
    assert out.pixel_values.shape == (1, 3, 2, 2)
    assert (out.num_samples, out.num_tokens, out.num_targets, out.rows, out.ids) == (0, 0, 0, [], [])


def test_a_text_only_batch_has_an_empty_tensor_of_the_right_shape():
    assert batch([encoded([1, 2], [1])], image_shape=(3, 4, 5)).pixel_values.shape == (0, 3, 4, 5)


@pytest.mark.parametrize("pixels", [0, 2])
def test_images_and_spans_must_agree(pixels):
    with pytest.raises(ValueError, match=f"expected pixels of 1 images.*found {pixels}"):
        batch([encoded([9], num_images=1)], [np.zeros((3, 1, 1))] * pixels)


def test_rows_must_be_those_of_the_real_samples():
    with pytest.raises(ValueError, match="expected rows and ids of the 1 real samples"):
        batch([encoded([1])], rows=[], ids=[])


@pytest.mark.parametrize("samples", [[encoded([1, 9, 5], [2], 1)], [encoded([1, 2], [1])]], ids=["image", "text only"])
def test_a_batch_crosses_the_wire_unchanged(samples):
    pixels = [np.random.default_rng(0).normal(size=(3, 2, 2)).astype(np.float32)] * samples[0].num_images
    out = batch(samples, pixels, ids=[None])
    back = wire.loads(*wire.dumps(out))
    for name, value in vars(out).items():
        found = getattr(back, name)
        assert (found.dtype, found.shape) == (value.dtype, value.shape) if hasattr(value, "dtype") else found == value
        assert not hasattr(value, "dtype") or found.equal(value)
