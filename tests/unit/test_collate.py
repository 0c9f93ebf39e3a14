"""Do padding, masks and counts of a micro-batch say what they should, with filler and without images?"""

from __future__ import annotations

import numpy as np
import pytest

from dpa_ray.batch import IGNORE_INDEX, NO_SAMPLE, NO_TURN, Batch, Encoded
from dpa_ray.data import wire
from dpa_ray.data.collate import collate

IMAGE, PAD = 9, 0


def encoded(ids, targets=(), num_images=0):
    size = len(ids)
    target = np.isin(np.arange(size), targets)
    turn = np.where(target, 0, NO_TURN).astype(np.int32)
    return Encoded(np.array(ids), target, turn, target.copy(), num_images)


def arrays(samples, pixels=(), **options):
    options = {"rows": [("d", i) for i in range(len(samples))], "ids": ["x"] * len(samples), **options}
    return collate(samples, list(pixels), pad_token_id=PAD, image_token_id=IMAGE, **options)


def batch(samples, pixels=(), **options):
    return Batch.of(arrays(samples, pixels, **options))


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
    out = Batch.of(
        collate(
            [encoded([9, 9], num_images=1), encoded([1])],
            [np.zeros((3, 1, 1))],
            pad_token_id=IMAGE,
            image_token_id=IMAGE,
            rows=[("d", 0), ("d", 1)],
            ids=[None, None],
        )
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
    made = arrays(samples, pixels, ids=[None])
    back = wire.loads(wire.dumps(made))
    for name, value in vars(Batch.of(made)).items():
        found = getattr(back, name)
        assert (found.dtype, found.shape) == (value.dtype, value.shape) if hasattr(value, "dtype") else found == value
        assert not hasattr(value, "dtype") or found.equal(value)


def test_a_layout_packs_samples_and_their_images_into_rows():
    """Numbers, rows, ids and the order of images: a row's images come in the order of its spans."""
    samples = [encoded([1, 9, 5], [2], 1), encoded([1, 7, 8, 6], [1, 3]), encoded([9, 4], [1], 1)]
    images = [np.full((3, 2, 2), i, np.float32) for i in (10, 20)]
    out = batch(samples, images, layout=[[2, 0], [1]])
    assert out.input_ids.tolist() == [[9, 4, 1, 9, 5], [1, 7, 8, 6, PAD]]
    assert out.sample.tolist() == [[2, 2, 0, 0, 0], [1, 1, 1, 1, NO_SAMPLE]]
    assert (out.labels != IGNORE_INDEX).tolist() == [
        [False, True, False, False, True],
        [False, True, False, True, False],
    ]
    assert out.attention_mask.tolist() == [[1] * 5, [1, 1, 1, 1, 0]]
    assert out.pixel_values[:, 0, 0, 0].tolist() == [20, 10]
    assert (out.num_samples, out.num_tokens, out.num_targets) == (3, 9, 4)
    assert out.rows == [("d", 0), ("d", 1), ("d", 2)]
    back = wire.loads(wire.dumps(arrays(samples, images, layout=[[2, 0], [1]])))
    assert back.sample.tolist() == out.sample.tolist()


def test_packed_filler_has_no_targets_and_no_count():
    filler = batch([encoded([1, 7], [1])], rows=[], ids=[], num_filler=1, layout=[[0]])
    assert (filler.num_samples, filler.num_tokens, filler.num_targets) == (0, 0, 0)
    assert filler.sample.tolist() == [[0, 0]]


def test_a_layout_that_loses_or_repeats_a_sample_is_refused():
    for layout in ([[0]], [[0, 1], [1]]):
        with pytest.raises(ValueError, match="each of 2 samples in one place"):
            batch([encoded([1]), encoded([2])], layout=layout)
