"""Does recipe text become the values it says: YAML, overrides, and any text at all?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dpa_ray.recipe import Recipe, RecipeError, load, parse
from dpa_ray.recipe_yaml import apply_override, from_yaml
from tests.recipe_helpers import SMALLEST, errors_of, written

# Overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("a=1", 1),
        ("a=4e-5", 4e-5),
        ("a=true", True),
        ("a=x y", "x y"),
        ("a=s3://b/k=v", "s3://b/k=v"),
        ("a='1'", "1"),
        ("a=[1, 2.5, x]", [1, 2.5, "x"]),
        ("a={b: null}", {"b": None}),
        ("a=null", None),
        ("a=", None),
        ("a=builtin:tiny-llm", "builtin:tiny-llm"),
        ("a=2024-07-26", "2024-07-26"),
    ],
)
def test_override_values_are_yaml(override: str, value: Any) -> None:
    values: dict[str, Any] = {"a": "before"}
    assert apply_override(values, override) is None
    assert values == {"a": value}


def test_an_override_makes_the_sections_on_its_way() -> None:
    values: dict[str, Any] = {"a": None}
    assert apply_override(values, "a.b.c=1") is None
    assert apply_override(values, "a.b.d=2") is None
    assert values == {"a": {"b": {"c": 1, "d": 2}}}


def test_later_overrides_win() -> None:
    assert load("tiny", ["seed=1", "seed=2"]).seed == 2


def test_overrides_reach_nested_lists_nulls_and_optional_sections() -> None:
    got = load(
        "tiny",
        [
            "stages.instruct.betas=[0.5, 0.6]",
            "data.eval=null",
            "data.eval_extra.more.source=x.json",
            "checkpoint.every_s=",
        ],
    )
    assert got.stages.instruct.betas == (0.5, 0.6)
    assert got.data.eval is None
    assert got.data.eval_extra["more"].source == "x.json"
    assert got.data.eval_extra["unseen_pairs"].options is not None
    assert got.checkpoint.every_s is None


@pytest.mark.parametrize("override", ["seed", "", "=", "a b=1", "a.=1", ".a=1", "a[0]=1", "ü=1"])
def test_an_override_without_a_key_path_is_an_error(override: str) -> None:
    error = apply_override({}, override)
    assert error is not None
    assert "expected key.path=value" in error[1]


@pytest.mark.parametrize("section", ["cluster.label_selector", "cluster.fallback_label_selector"])
@pytest.mark.parametrize("label", ["ray.io/accelerator-type", "team/gpu", "ray.io"])
def test_a_label_in_a_key_path_is_told_how_it_is_written(section: str, label: str) -> None:
    wrong = f"{section}.{label}=H100"
    (found,) = errors_of(lambda: load("tiny", [wrong])).items()
    hint = f"{section}={{{label}: H100}}"
    assert found == (section, f"expected a label with '.' or '/' in braces, as '{hint}', found '{wrong}'")
    assert getattr(load("tiny", [hint]).cluster, section.split(".")[1]) == {label: "H100"}
    assert load("tiny", [f"{section}.team=vision"]).to_dict()["cluster"][section.split(".")[1]] == {"team": "vision"}


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.pretrain.source=/my.json"], "data.pretrain.options=null"),
        (["data.pretrain.source=/my.yaml"], "data.pretrain.options=null"),
        (["data.pretrain.source=/my.json", "data.pretrain.options.size=5"], None),
    ],
)
def test_what_the_recipe_says_beside_a_source_that_is_replaced_is_told(overrides: list[str], told: str | None) -> None:
    text = errors_of(lambda: load("tiny", overrides))["data.pretrain"]
    if told is None:
        assert text == "options belong to builtin sources only"
        return
    assert text.endswith(
        f"data.pretrain.options comes from the recipe, whose source was replaced: leave it out with {told}"
    )
    assert load("tiny", [*overrides, told]).data.pretrain.options is None


def test_all_that_does_not_fit_the_new_source_is_told(tmp_path: Path) -> None:
    values = {
        **SMALLEST,
        "data": {**SMALLEST["data"], "instruct": {"source": "a.parquet", "images": "i", "format": "parquet"}},
    }
    file = written(tmp_path, yaml.safe_dump(values))
    text = errors_of(lambda: load(file, ["data.instruct.source=builtin:shapes"]))["data.instruct"]
    assert text.endswith("data.instruct.images=null data.instruct.format=null")


def test_an_override_changes_one_of_two_sections_that_share_an_anchor(tmp_path: Path) -> None:
    text = yaml.safe_dump(SMALLEST) + "stages: {proxy_llm: &same {lr: 1}, instruct: *same}\n"
    got = load(written(tmp_path, text), ["stages.instruct.lr=2"])
    assert (got.stages.proxy_llm.lr, got.stages.instruct.lr) == (1, 2)


# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [("4e-5", 4e-5), ("1E3", 1000.0), ("-2.5e+1", -25.0), (".5e1", 5.0), ("+1e0", 1.0), ("1.0e-3", 1e-3), ("4e", "4e")],
)
def test_exponents_need_no_dot(text: str, value: Any) -> None:
    assert from_yaml(text) == value
    assert type(from_yaml(text)) is type(value)


def test_dates_are_text() -> None:
    assert load("tiny", ["model.template_date=2024-02-30"]).model.template_date == "2024-02-30"


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_text(yaml.safe_dump(SMALLEST), encoding="utf-8-sig")
    assert load(str(path)).name == "small"


def test_merge_keys_work_and_own_keys_win(tmp_path: Path) -> None:
    text = "proxy_llm: &x {lr: 1, epochs: 2}\nproxy_mllm: &y {<<: *x, lr: 3}\ninstruct: {<<: *y, epochs: 4}\n"
    got = load(written(tmp_path, yaml.safe_dump(SMALLEST) + "stages:\n  " + text.replace("\n", "\n  ").rstrip() + "\n"))
    assert (got.stages.proxy_mllm.lr, got.stages.proxy_mllm.epochs) == (3, 2)
    assert (got.stages.instruct.lr, got.stages.instruct.epochs) == (3, 4)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1\nname: x\nseed: 2\n", "line 3: the key 'seed' stands twice"),
        ("model: {llm: a, llm: b}\n", "line 1: the key 'llm' stands twice"),
        ("1: x\n", "line 1: expected a name as key, found '1'"),
        ("yes: x\n", "expected a name as key, found 'yes'"),
        ("? [a]\n: x\n", "expected a name as key, found a sequence"),
        ("name:\n\tx: 1\n", "line 2"),
        ("name: [\n", "line"),
        ("name: *nowhere\n", "nowhere"),
        ("a: 1\n---\nb: 2\n", "document"),
        ("", "expected a mapping of keys, found null"),
        ("- 1\n", "expected a mapping of keys, found list [1]"),
        ("just words", "expected a mapping of keys, found string 'just words'"),
        ("seed: !!int x\n", "not readable"),
        ("seed: !!bool x\n", "not readable"),
        ("seed: !!python/object/apply:os.getcwd []\n", "not readable"),
        ("seed: 0x" + "f" * 5000 + "\n", "2**63"),
        ("seed: " + "9" * 5000 + "\n", "not readable"),
        ("seed: " + "[" * 20000 + "\n", "not readable"),
        ("name: \x01\n", "not readable"),
    ],
)
def test_yaml_that_is_not_a_recipe_says_why_in_one_line(text: str, says: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load(path)
    (message,) = (m for _, m in caught.value.errors)
    assert says in message
    assert "\n" not in message
    assert path in str(caught.value)


def test_other_encodings_and_folders_are_told(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: ü".encode("latin-1"))
    assert "utf-8" in errors_of(lambda: load(str(path)))[""]
    assert "expected a YAML file" in errors_of(lambda: load(str(tmp_path)))[""]


def test_a_section_that_contains_itself_is_an_error(tmp_path: Path) -> None:
    assert errors_of(
        lambda: load(written(tmp_path, "name: &a {x: *a}\nmodel: &m {llm: *m, vision: *m}\ndata: &d {eval: *d}\n"))
    )


# Anything at all

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def paths_of(model: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, value in model.items():
        found.append((*prefix, name))
        if isinstance(value, dict):
            found += paths_of(value, (*prefix, name))
    return found


FULL = load("tiny", ["trackers.wandb={project: p}", "trackers.mlflow={tracking_uri: u}"]).to_dict()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(paths_of(FULL)), anything), min_size=1, max_size=4))
def test_any_values_at_any_keys_give_a_recipe_or_a_recipe_error(changes: list[tuple[tuple[str, ...], Any]]) -> None:
    values = json.loads(json.dumps(FULL))
    for path, value in changes:
        here = values
        for key in path[:-1]:
            here = here.get(key) if isinstance(here, dict) else None
        if isinstance(here, dict):
            here[path[-1]] = value
    try:
        got = parse(values)
    except RecipeError as err:
        assert err.errors
    else:
        assert parse(got.to_dict()) == got
        assert len(got.digest()) == 12


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(list(Recipe.model_fields)) | st.text(max_size=5), anything, max_size=5))
def test_any_mapping_gives_a_recipe_error(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        parse(values)


YAML_SIGNS = st.text(alphabet="abk:-?[]{}&*!|>'\"%@`#,~<=.0123456789xe+_ \n\t\\\ufeff\x85\ud800é", max_size=40)


@settings(max_examples=300, deadline=None)
@given(YAML_SIGNS)
def test_any_text_is_yaml_or_a_value_error_of_one_line(text: str) -> None:
    try:
        from_yaml(text)
    except ValueError as err:
        assert "\n" not in str(err)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([".".join(p) for p in paths_of(FULL)]), YAML_SIGNS), min_size=1, max_size=3))
def test_any_override_gives_a_recipe_or_a_recipe_error(overrides: list[tuple[str, str]]) -> None:
    try:
        load("tiny", [f"{path}={text}" for path, text in overrides])
    except RecipeError as err:
        assert err.errors
