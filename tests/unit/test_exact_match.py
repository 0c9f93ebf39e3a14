"""Are held-out answers counted right, the baselines blind, and answers the same however they are batched?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpa_ray.eval.exact_match import (
    Answering,
    ExactMatch,
    Question,
    majority_accuracy,
    matches,
    score,
    with_shuffled_images,
)
from tests.random_models import IMAGE_SIZE, NUM_IMAGE_TOKENS, VOCABULARY, make_vlm


def question(
    sample: int, text: str = "What?", answer: str = "red", *, images: tuple[bytes, ...] | None = None
) -> Question:
    return Question(sample, text, answer, np.array([1]), (f"image {sample}".encode(),) if images is None else images)


# Counting


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        ("red", "red", True), (" red\n", "red", True), ("red", " red ", True), ("Red", "red", False),
        ("red.", "red", False), ("a red", "red", False), ("", "", True), ("light  red", "light red", False),
    ],
)  # fmt: skip
def test_a_match_is_exact_but_for_surrounding_blanks(given: str, expected: str, same: bool) -> None:
    assert matches(given, expected) == same


def test_majority_is_found_in_the_other_half_of_the_set() -> None:
    """Blanks around an answer do not count."""
    often = [question(i, "Colour?", ("red", " red", "red\n", "blue")[i % 4]) for i in range(400)]
    assert majority_accuracy(often) == 0.75
    balanced = [question(i, f"Is it {i % 4}?", ("yes", "no")[i // 4 % 2]) for i in range(400)]
    assert 0.35 < majority_accuracy(balanced) < 0.55


def test_a_question_that_comes_once_is_not_its_own_majority() -> None:
    different = [question(i, f"What is {i}?", f"it is {i}") for i in range(40)]
    assert majority_accuracy(different) == 0
    of_one_picture = [question(0, f"What is {i}?", "red") for i in range(40)]
    assert majority_accuracy(of_one_picture) == 0, "they are all in the same half"
    unseen = [question(i, f"What is {i}?", "no" if i % 10 == 0 else "yes") for i in range(400)]
    assert majority_accuracy(unseen) == 0.9, "what is most frequent of all"


def test_majority_of_nothing_and_of_one() -> None:
    assert majority_accuracy([]) == 0
    assert majority_accuracy([question(0)]) == 0


def test_score_by_hand() -> None:
    """Eight questions: six answered right, four with another's image; all are red, which each half knows of the other."""
    questions = [question(i, "Colour?", "red") for i in range(8)]
    found = score(questions, ["red", " red", "blue"] * 2 + ["red", "red "], ["red", "blue"] * 4)
    assert found == ExactMatch(num_questions=8, accuracy=0.75, shuffled=0.5, majority=1.0)
    assert found.lead == pytest.approx(-0.25)
    found = ExactMatch(4, accuracy=0.75, shuffled=0.5, majority=0.5)
    assert found.lead == pytest.approx(0.25)
    assert ExactMatch(4, accuracy=0.5, shuffled=0.75, majority=0.5).lead == pytest.approx(-0.25)


def test_score_of_nothing_is_zero() -> None:
    assert score([], [], []) == ExactMatch(0, 0.0, 0.0, 0.0)


def test_answers_must_be_as_many_as_questions() -> None:
    with pytest.raises(ValueError, match="argument 2 is (shorter|longer)"):
        score([question(0), question(1)], ["red"], ["red", "red"])


# Shuffled images


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 30), st.integers(0, 50))
def test_no_sample_keeps_its_own_image(num_samples: int, seed: int) -> None:
    """All questions of a sample get the images of one other sample, and every image is given once."""
    questions = [question(i, f"{turn}?") for i in range(num_samples) for turn in range(2)]
    shuffled = with_shuffled_images(questions, seed)
    for before, after in zip(questions, shuffled, strict=True):
        assert after.images != before.images
        assert (after.sample, after.text, after.answer) == (before.sample, before.text, before.answer)
        assert after.input_ids is before.input_ids
    assert sorted(q.images for q in shuffled) == sorted(q.images for q in questions)
    assert [q.images for q in shuffled[::2]] == [q.images for q in shuffled[1::2]]


def test_a_question_keeps_its_number_of_images() -> None:
    """Partners have as many; a sample without any stays without; and one that is alone in its number keeps its own."""
    images = {0: 1, 1: 1, 2: 2, 3: 2, 4: 0, 5: 0, 6: 3}
    questions = [question(s, images=tuple(f"{s}.{i}".encode() for i in range(n))) for s, n in images.items()]
    shuffled = with_shuffled_images(questions)
    assert [len(q.images) for q in shuffled] == list(images.values())
    assert [a.images != b.images for a, b in zip(shuffled, questions, strict=True)] == [True] * 4 + [False] * 3


def test_a_conversation_that_shows_a_second_image_later_keeps_its_numbers() -> None:
    """Its first question has one image, its second two: what fits the one does not fit the other."""
    questions = []
    for sample in range(3):
        both = (f"{sample}.0".encode(), f"{sample}.1".encode())
        questions += [question(sample, "first?", images=both[:1]), question(sample, "second?", images=both)]
    shuffled = with_shuffled_images(questions)
    assert [len(q.images) for q in shuffled] == [1, 2] * 3
    assert all(after.images != before.images for after, before in zip(shuffled, questions, strict=True))


def test_shuffling_hangs_on_its_seed_alone() -> None:
    questions = [question(i) for i in range(20)]
    first, again, other = (with_shuffled_images(questions, seed) for seed in (1, 1, 2))
    assert [q.images for q in first] == [q.images for q in again] != [q.images for q in other]


# Answering


class Words:
    """A tokenizer of which only decoding is used: ids as words; 2 is special, the end and the padding."""

    pad_token_id: int | None = 2

    def batch_decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [" ".join(str(i) for i in row if i != 2) for row in ids.tolist()]


def pixels(data: bytes) -> np.ndarray:
    return np.random.default_rng(int.from_bytes(data[:8], "big")).standard_normal(
        (3, IMAGE_SIZE, IMAGE_SIZE), np.float32
    )


@pytest.fixture(scope="module")
def model() -> Any:
    """A random one. By its own config it ends at token 2, which it never says here."""
    return make_vlm()


def answering(model: Any, batch_size: int) -> Answering:
    return Answering(
        model=model,
        tokenizer=Words(),
        pixels=pixels,
        batch_size=batch_size,
        max_new_tokens=6,
        device=torch.device("cpu"),
    )


def some_questions(num_questions: int) -> list[Question]:
    """Of differing lengths, with no, one and two images."""
    rng = np.random.default_rng(0)
    questions = []
    for i in range(num_questions):
        num_images = (1, 0, 2)[i % 3]
        ids = [int(n) for n in rng.integers(3, VOCABULARY, 2 + i % 4)]
        for _ in range(num_images):
            ids += [VOCABULARY] * NUM_IMAGE_TOKENS + [int(n) for n in rng.integers(3, VOCABULARY, 1 + i % 2)]
        images = tuple(f"{i}-{k} image".encode() for k in range(num_images))
        questions.append(Question(i, "What?", "", np.array(ids), images))
    return questions


def test_batches_answer_as_one_by_one(model: Any) -> None:
    """In the order of the questions, whatever stands beside them and however far they are padded on the left."""
    questions = some_questions(11)
    expected = [answering(model, 1)([q])[0] for q in questions]
    assert len(set(expected)) > 6, "the answers differ, so that another order would show"
    for batch_size in (1, 3, 4, 50):
        assert answering(model, batch_size)(questions) == expected
    assert answering(model, 4)(questions[::-1]) == expected[::-1]


@pytest.mark.parametrize(
    "own", [{}, {"repetition_penalty": 5.0, "do_sample": True, "temperature": 9.0, "num_beams": 2}]
)
def test_an_answer_is_what_comes_after_the_prompt(
    model: Any, own: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against greedy decoding by hand, one forward a token, the image token left out, whatever the base LLM's settings are."""
    for name, value in own.items():
        monkeypatch.setattr(model.generation_config, name, value)
    asked = some_questions(3)[2]
    ids = torch.from_numpy(asked.input_ids).unsqueeze(0)
    images = torch.from_numpy(np.stack([pixels(image) for image in asked.images]))
    words: list[int] = []
    with torch.no_grad():
        while len(words) < 6:
            logits = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=images, use_cache=False
            ).logits
            word = int(logits[0, -1, :VOCABULARY].argmax())
            words.append(word)
            ids = torch.cat([ids, torch.tensor([[word]])], 1)
    assert answering(model, 1)([asked]) == [" ".join(map(str, words))]


def test_an_answer_ends_where_the_model_says_and_has_none_of_its_tokens_that_are_no_text(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ends of a turn and what is suppressed are those of the model's own settings for generation."""
    asked = [some_questions(3)[2]]
    words = answering(model, 1)(asked)[0].split()
    assert len(words) == 6
    at = next(i for i, word in enumerate(words) if word != words[0])
    assert at < 5, "there is something to cut off"
    with monkeypatch.context() as patch:
        patch.setattr(model.generation_config, "eos_token_id", [2, int(words[at])])
        assert answering(model, 1)(asked) == [" ".join(words[: at + 1])]
    monkeypatch.setattr(model.generation_config, "suppress_tokens", [int(words[0])])
    assert words[0] not in answering(model, 1)(asked)[0].split()


def test_another_image_gives_another_answer(model: Any) -> None:
    """Images go to their own questions: swapping two of them swaps what is seen."""
    questions = [q for q in some_questions(30) if len(q.images) == 1]
    seen = answering(model, 4)(questions)
    shuffled = answering(model, 4)(with_shuffled_images(questions))
    assert sum(a != b for a, b in zip(seen, shuffled, strict=True)) >= 3


def test_no_questions_have_no_answers(model: Any) -> None:
    assert answering(model, 4)([]) == []
