"""Are tokens joined to the words that a person reads, and are a word's numbers those of its tokens?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from dpa_ray.data.ingest import Loader
from dpa_ray.data.prepare import prepare
from dpa_ray.data.words import join, pieces, runs
from dpa_ray.engine import words
from dpa_ray.engine.words import SampleLosses, Words, table
from dpa_ray.model.vlm import ModelRef
from dpa_ray.recipe import Recipe
from dpa_ray.stages import proxy_mllm
from dpa_ray.stages.spec import ArtifactRef, BaseLlm, ProxyMllmTask, Weights
from dpa_ray.store.fs import Store
from tests.small_recipes import common


def words_of(*texts: str) -> list[tuple[str, list[str]]]:
    return [(word, list(texts[tokens])) for word, tokens in join(texts)]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (("a", " red", " squ", "are", "."), ["a", "red", "square", "."]),
        ((" Don", "'t", " well", "-", "known"), ["don't", "well-known"]),
        (("\n", "it", " ", "is", "\n"), ["it", "is"]),
        (("is", ' it."', "\n"), ["is", 'it."']),
        (("yes", "<|im_end|>"), ["yes", "<|im_end|>"]),
        (("日本", "語", "の red"), ["日本", "語", "の red"]),
        (("x", "", "", "é", " y"), ["xé", "y"]),
        (("x ", "", "", "é", " y"), ["x", "é", "y"]),
        ((" ", "\n"), []),
        ((), []),
    ],
)
def test_words_as_they_are_read(texts: tuple[str, ...], expected: list[str]) -> None:
    found = words_of(*texts)
    assert [word for word, _ in found] == expected
    for word, tokens in found:
        assert word in "".join(tokens).lower()


def test_no_token_is_in_two_words_and_only_blanks_are_in_none() -> None:
    draw = np.random.default_rng(0)
    parts = ["a", " b", "", "'", "-", ". ", "é", " 日", "本", "\n", "c d", "<x>", "7"]
    for _ in range(300):
        texts = [parts[i] for i in draw.integers(len(parts), size=8)]
        taken = [i for _, tokens in join(texts) for i in range(len(texts))[tokens]]
        assert taken == sorted(set(taken))
        assert not "".join(text for i, text in enumerate(texts) if i not in taken).strip()


def test_a_character_of_several_tokens_is_of_one_word_with_all_of_them(tiny_llm: Callable[..., Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm("llama", num_steps=1))
    ids = tokenizer("a red, 日 café", add_special_tokens=False)["input_ids"]
    found = join(pieces(tokenizer, ids))
    assert [word for word, _ in found] == ["a", "red", ",", "日", "café"]
    assert found[0][1].start == 0
    assert found[-1][1].stop == len(ids)
    assert [tokenizer.decode(ids[tokens]).strip() for _, tokens in found] == ["a", "red", ",", "日", "café"]


def test_no_word_reaches_from_one_answer_into_another() -> None:
    assert runs([4, 5, 6, 9, 10], [0, 0, 1, 1, 1]) == [slice(0, 2), slice(2, 3), slice(3, 5)]
    assert runs([], []) == []


def sample(row: int, nll: list[float], gain: list[float]) -> SampleLosses:
    """`red` in one token that the image shows, `square` in two that it does not."""
    found = [("red", slice(0, 1)), ("square", slice(1, 3))]
    visual = np.array([True, False, False])
    return SampleLosses(row, found, visual, np.array(nll, np.float32), np.array(gain, np.float32))


def test_a_words_loss_is_the_sum_over_its_tokens_and_its_gain_the_mean() -> None:
    none = [0.0, 0.0, 0.0]
    before = [sample(0, [1, 2, 3], none), sample(9, [3, 2, 1], none)]
    after = [sample(0, [0.5, 1, 1], [0.4, 0.1, 0.3]), sample(9, [0.5, 2, 2], [0.2, 0, 0])]
    rows = {row["word"]: row for row in table(before, after).to_pylist()}
    assert rows["red"] == pytest.approx(
        {"word": "red", "count": 2, "num_tokens": 1, "nll_before": 2, "nll_after": 0.5, "gain": 0.3, "visual": 1}
    )
    assert rows["square"] == pytest.approx(
        {"word": "square", "count": 2, "num_tokens": 2, "nll_before": 4, "nll_after": 3, "gain": 0.1, "visual": 0}
    )
    assert table([], []).num_rows == 0


@pytest.fixture
def looked(recipe: Callable[..., Recipe]) -> tuple[Words, list[str]]:
    """Words of the ten captions of a stage 2 that was built; and what is noted."""
    made = recipe()
    store = Store(made.store)
    prepared = prepare(store, made.data.pretrain, max_quarantined_fraction=0)
    base = BaseLlm(Weights(made.model.llm, "1", ref=ModelRef(made.model.llm)))
    tower = Weights(made.model.vision, "2", ref=ModelRef(made.model.vision))
    values = {**common(made), "tower": tower, "result": ArtifactRef("proxy-mllm", "1"), "data": prepared}
    built = proxy_mllm.build_stage(ProxyMllmTask(**values, llm=base, tokenizer=base), store)
    loader = Loader(
        store=store, prepared=prepared, encoder=built.encoder, image_processor=built.image_processor, pad_token_id=0,
        skipped=frozenset({4}),
    )  # fmt: skip
    notes: list[str] = []
    return Words(built.module, loader, None, 4, torch.device("cpu"), notes.append), notes


def test_both_looks_make_a_file_that_says_what_it_is_of(looked: tuple[Words, list[str]], tmp_path: Path) -> None:
    """Its words are those of the captions, with what is known of them, and their losses those of the loss."""
    made, notes = looked
    made.look_before()
    with torch.no_grad():
        made.module.model.get_output_embeddings().weight.mul_(1.5)
    made.look_after()
    made.write(tmp_path)
    about, found = words.read(tmp_path / words.FILE)
    assert about == {"samples": "training", "num_samples": "9", "digest": made.loader.prepared.digest}
    rows = {row["word"]: row for row in found}
    texts = [turn.text for sample in made.loader.samples(made.rows) for turn in sample.turns if turn.role == "gpt"]
    expected = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text.lower()))
    assert {word: row["count"] for word, row in rows.items()} == expected
    seen = [word for word in ("small", "large", "red", "top", "bottom") if word in rows]
    assert seen
    assert all(rows[word]["visual"] == 1 for word in seen)
    assert rows["at"]["visual"] == rows[";"]["visual"] == 0
    assert any(row["gain"] != 0 for row in found)
    sums = [made.module(made.loader.load(rows, 0).to("cpu")) for rows in made.passes]
    blanks = sum(float(s.nll) for s in sums) - sum(row["count"] * row["nll_after"] for row in found)
    assert blanks > 0, "of the blanks, and the newline behind each caption"
    visual = sum(float(s.grounded_nll) for s in sums)
    assert sum(row["count"] * row["nll_after"] for row in found if row["visual"]) == pytest.approx(visual, rel=1e-4)
    assert all(row["nll_before"] != row["nll_after"] for row in found)
    assert notes == []


def test_a_stage_that_goes_on_has_the_first_look_of_the_one_before_it(
    looked: tuple[Words, list[str]], tmp_path: Path
) -> None:
    """To the bit, though the model is another one by then."""
    made, _ = looked
    ((file, lines),) = made.look_before().items()
    assert file == made.file
    assert len(lines) == len(made.rows)
    expected = made.before
    with torch.no_grad():
        made.module.model.get_output_embeddings().weight.mul_(1.5)
    made.before = None
    made.resume(lines)
    assert [vars(sample)["row"] for sample in made.before or ()] == [sample.row for sample in expected or ()]
    for found, sample in zip(made.before or (), expected or (), strict=True):
        assert found.words == sample.words
        for name in ("visual", "nll", "gain"):
            one, other = getattr(found, name), getattr(sample, name)
            assert one.dtype == other.dtype
            assert (one == other).all()
    made.rows = made.rows[1:]
    assert made.file != file, "a look at other samples is another file"
    made.rows = np.array([sample.row for sample in expected or ()])
    made.look_after()
    made.write(tmp_path)
    assert all(row["nll_before"] != row["nll_after"] for row in words.read(tmp_path / words.FILE)[1])


def test_a_look_leaves_random_numbers_gradients_and_parameters_alone(looked: tuple[Words, list[str]]) -> None:
    made, _ = looked
    made.module.train()
    made.module(made.loader.load(made.passes[0], 0).to("cpu")).loss.backward()
    state = torch.get_rng_state()
    before = {n: (p.clone(), None if p.grad is None else p.grad.clone()) for n, p in made.module.named_parameters()}
    made.look_before()
    made.look_after()
    assert torch.equal(state, torch.get_rng_state())
    assert all(part.training for part in made.module.modules())
    for name, parameter in made.module.named_parameters():
        value, grad = before[name]
        assert torch.equal(parameter, value)
        assert (grad is None) == (parameter.grad is None)
        assert grad is None or parameter.grad is None or torch.equal(parameter.grad, grad)


def test_samples_that_cannot_be_read_cost_the_table_and_not_the_stage(
    looked: tuple[Words, list[str]], tmp_path: Path
) -> None:
    made, notes = looked
    made.look_before()
    assert isinstance(made.loader.store, Store)
    made.loader.store.delete("data")
    made.loader = replace(made.loader)  # which has nothing in memory
    made.look_after()
    made.write(tmp_path)
    assert len(notes) == 1
    assert notes[0].startswith("the report will show no losses by word: ")
    assert not (tmp_path / words.FILE).exists()


def test_a_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"word": ["red"]}), tmp_path / words.FILE)
    with pytest.raises(ValueError, match="expected the columns word, count, .*, found word"):
        words.read(tmp_path / words.FILE)
