"""Does a recipe take what is right, and say all that is wrong, by key path?"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dpa_ray.data.mixture import entries
from dpa_ray.recipe import RECIPES_DIR, RecipeError, SourceSection, find_recipe, json_schema, load, parse
from dpa_ray.recipe_stages import METHOD_WEIGHTS
from dpa_ray.recipe_table import table
from dpa_ray.recipe_yaml import from_yaml, read_yaml
from tests.recipe_helpers import SMALLEST, errors_of, written


def changed(**sections: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(SMALLEST)), **sections}


def tiny_with(*overrides: str) -> dict[str, str]:
    return errors_of(lambda: load("tiny", overrides))


# What is there by default


def test_defaults_are_the_papers() -> None:
    stages = parse(SMALLEST).stages
    assert (stages.proxy_llm.lr, stages.proxy_mllm.lr, stages.instruct.lr) == (4e-5, 2e-3, 4e-5)
    assert (stages.proxy_llm.max_length, stages.proxy_mllm.max_length, stages.instruct.max_length) == (8192, 8192, 2048)
    for stage in (stages.proxy_llm, stages.proxy_mllm, stages.instruct):
        assert (stage.global_batch_size, stage.epochs, stage.warmup_fraction) == (256, 1, 0.03)
        assert (stage.betas, stage.weight_decay, stage.grad_clip) == ((0.9, 0.999), 0.0, 1.0)
    lora = stages.proxy_llm.lora
    assert (lora.rank, lora.alpha, lora.dropout) == (256, 512, 0.0)


def test_the_default_recipe_is_found_by_name_and_by_path() -> None:
    assert load("tiny").to_dict() == load(str(RECIPES_DIR / "tiny.yaml")).to_dict()


@pytest.mark.parametrize("name", ["nope", "../recipes/tiny", "a" * 5000, "~nobody-of-that-name/x", "x\0y", "", "/"])
def test_a_recipe_that_is_not_there_names_those_that_are(name: str) -> None:
    (message,) = errors_of(lambda: find_recipe(name)).values()
    assert "tiny" in message
    assert repr(name) in message


def test_a_file_without_a_name_is_called_after_itself(tmp_path: Path) -> None:
    values = {k: v for k, v in SMALLEST.items() if k != "name"}
    assert load(written(tmp_path, yaml.safe_dump(values))).name == "mine"


def test_json_round_trip_gives_the_same_recipe() -> None:
    first = load("tiny", ["stages.instruct.betas=[0.8, 0.95]", "stages.proxy_mllm.from=x", "cmo.lower=0.1"])
    again = parse(json.loads(json.dumps(first.to_dict())))
    assert again == first
    assert again.digest() == first.digest()
    assert first.to_dict()["stages"]["proxy_mllm"]["from"] == "x"


# Names, digests and the store


def test_digest_knows_neither_name_nor_store() -> None:
    base = load("tiny")
    assert base.digest() == load("tiny", name="other", store="s3://b/p").digest()
    assert base.digest() == load("tiny", ["name=x", "store=/elsewhere"]).digest()
    assert base.digest() != load("tiny", ["seed=1"]).digest()


def test_overrides_rename_a_run_and_equal_ones_alike() -> None:
    one, same, other = load("tiny", ["seed=1"]), load("tiny", ["seed=0x1"]), load("tiny", ["seed=2"])
    assert one.name == f"tiny-{one.digest()[:8]}"
    assert one.name == same.name != other.name


@pytest.mark.parametrize("overrides", [[], ["store=/x"], ["name=mine"], ["name=mine", "seed=3"]])
def test_a_run_keeps_a_given_name(overrides: list[str]) -> None:
    assert load("tiny", overrides).name == ("mine" if "name=mine" in overrides else "tiny")
    assert load("tiny", overrides, name="asked").name == "asked"


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-x", "a b", "ü", "a\n", "x" * 121, "s3://x"])
def test_names_that_are_no_folder_are_refused(name: str) -> None:
    assert "name" in errors_of(lambda: load("tiny", name=name))


def test_a_local_store_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert load("tiny", store="runs/here").store == str(tmp_path / "runs/here")
    assert load("tiny").store == "/home/someone/dpa_ray"
    assert load("tiny", store="s3://bucket/p").store == "s3://bucket/p"


@pytest.mark.parametrize(
    "store", ["", "s3:/bucket", "s3://", "s3:///p", "gs:///p", "file:///x", "S3://b", "~nobody-x/y"]
)
def test_stores_that_are_neither_folder_nor_s3_are_refused(store: str) -> None:
    message = errors_of(lambda: load("tiny", store=store))["store"]
    assert "expected a folder" in message
    assert repr(store) in message


# Errors


@pytest.mark.parametrize(
    ("override", "path", "expected", "found"),
    [
        ("seed=x", "seed", "expected an integer", "string 'x'"),
        ("seed=1.5", "seed", "expected an integer", "number 1.5"),
        ("seed=1e3", "seed", "expected an integer", "number 1000.0"),
        ("seed=true", "seed", "expected an integer", "boolean true"),
        ("seed=-1", "seed", "expected a number >= 0", "integer -1"),
        ("seed=2147483648", "seed", "expected a number < 2147483648", "integer 2147483648"),
        ("seed=", "seed", "expected an integer", "null"),
        ("method=dpo", "method", "'vanilla', 'pmo', 'cmo', 'cal' or 'dpa'", "string 'dpo'"),
        ("model.llm=7", "model.llm", "expected a string", "integer 7 (put it in quotes)"),
        ("model.llm=''", "model.llm", "not empty", "string ''"),
        ("model=x", "model", "expected a section", "string 'x'"),
        ("model=null", "model", "expected a section", "null"),
        ("data.pretrain=[1]", "data.pretrain", "expected a section", "list [1]"),
        ("data.eval_extra=[1]", "data.eval_extra", "expected a section", "list [1]"),
        ("data.eval_extra={a: 1}", "data.eval_extra.a", "expected a section", "integer 1"),
        ("data.pretrain.fraction=0", "data.pretrain.fraction", "a number > 0", "integer 0"),
        ("stages.instruct.lr=fast", "stages.instruct.lr", "expected a number", "string 'fast'"),
        ("stages.instruct.lr=.inf", "stages.instruct.lr", "expected a finite number", "Infinity"),
        ("stages.instruct.lr=.nan", "stages.instruct.lr", "expected a finite number", "NaN"),
        ("stages.instruct.lr=-1", "stages.instruct.lr", "expected a number >= 0", "integer -1"),
        ("stages.instruct.betas=0.9", "stages.instruct.betas", "expected a list", "number 0.9"),
        ("stages.instruct.betas=[0.9, x]", "stages.instruct.betas.1", "expected a number", "string 'x'"),
        ("stages.instruct.betas=[1, 2, 3]", "stages.instruct.betas", "expected 2 values", "list [1, 2, 3]"),
        ("stages.instruct.betas=[0.9, 1.0]", "stages.instruct", "both betas in [0, 1)", "[0.9, 1.0]"),
        ("stages.proxy_llm.llm=frozen", "stages.proxy_llm.llm", "'lora' or 'full'", "string 'frozen'"),
        ("debug.record_samples=1", "debug.record_samples", "expected true or false", "integer 1"),
        ("cmo.window=2", "cmo", "an odd window", "2"),
        ("cmo.lower=0.6", "cmo", "expected lower <= upper", "lower 0.6 > upper 0.5"),
        ("cmo={lower: 2, upper: 1}", "cmo", "expected lower <= upper", "lower 2.0 > upper 1.0"),
        ("data.pretrain.source=builtin:photos", "data.pretrain", "expected builtin:shapes", "builtin:photos"),
        ("data.pretrain.images=/x", "data.pretrain", "takes options", ""),
        ("data.pretrain.source=[]", "data.pretrain.source", "expected a list that is not empty", "list []"),
        ("data.pretrain.source=3", "data.pretrain.source", "expected a string", "integer 3"),
        ("data.eval={source: [{source: a.tar, tak: x}]}", "data.eval.source.0.tak", "did you mean take?", "'x'"),
        ("data.eval={source: [{source: a, take: ten}]}", "data.eval.source.0.take", "expected first:N", "'ten'"),
        ("data.eval={source: [{source: a, take: 'random:101%'}]}", "data.eval.source.0.take", "up to 100%", "101%"),
        ("data.eval={source: [{source: a, take: 'first:1.5'}]}", "data.eval.source.0.take", "a whole number", "1.5"),
        ("data.eval={source: [{source: a, weight: 0}]}", "data.eval.source.0.weight", "a number >= 0.001", "integer 0"),
        ("data.eval={source: [{source: a.yaml}]}", "data.eval.source.0", "found another mixture", "a.yaml"),
        ("data.eval={source: [{source: a}], format: llava}", "data.eval", "format, columns and options in its", ""),
        ("data.eval={source: a.yaml, format: llava}", "data.eval", "belong to single sources", ""),
        ("data.eval={source: a.tar, images: x}", "data.eval", "images does not belong to webdataset", ""),
        ("data.eval={source: a.json, columns: {text: x}}", "data.eval", "belong to parquet and webdataset", ""),
        ("data.eval={source: a.tar, columns: {txt: x}}", "data.eval.columns.txt", "did you mean text?", "'x'"),
        ("data.eval={source: a.tar, columns: {prompt: x}}", "data.eval.columns", "expected text", "found none"),
        ("data.pretrain.source=a.json", "data.pretrain", "builtin sources only", ""),
        ("deepspeed.zero_stage=4", "deepspeed.zero_stage", "expected a number <= 3", "integer 4"),
        ("deepspeed.zero_stage=true", "deepspeed.zero_stage", "expected an integer", "boolean true"),
        ("trackers.wandb={}", "trackers.wandb.project", "expected a value", "none"),
    ],
)
def test_a_wrong_value_says_where_what_was_expected_and_what_was_found(
    override: str, path: str, expected: str, found: str
) -> None:
    errors = tiny_with(override)
    assert list(errors) == [path]
    assert expected in errors[path]
    assert found in errors[path]


@pytest.mark.parametrize("name", ["pretrain", "instruct", "heldout", "heldout_captions"])
def test_a_held_out_set_does_not_take_the_place_of_other_data(name: str) -> None:
    """A set called pretrain was trained on."""
    errors = tiny_with(
        f"data.eval_extra={{{name}: {{source: 'builtin:shapes', options: {{style: ornate, split: heldout, size: 3}}}}}}"
    )
    assert list(errors) == [f"data.eval_extra.{name}"]
    assert "expected another name" in errors[f"data.eval_extra.{name}"]


@pytest.mark.parametrize(
    ("override", "path", "hint", "known"),
    [
        ("sed=1", "sed", "seed", "precision"),
        ("stages.instruct.from=x", "stages.instruct.from", "", "global_batch_size"),
        ("stages.proxy_llm.from_=x", "stages.proxy_llm.from_", "from", "lora"),
        ("stages.proxy_llm.lora.rnk=1", "stages.proxy_llm.lora.rnk", "rank", "alpha"),
        ("data.eval.sorce=1", "data.eval.sorce", "source", "images"),
        ("data.eval_extra.unseen_pairs.sise=1", "data.eval_extra.unseen_pairs.sise", "", "fraction"),
        ("data.eval_extra.unseen_pairs.options.sise=1", "data.eval_extra.unseen_pairs.options.sise", "size", "split"),
    ],
)
def test_an_unknown_key_names_the_known_ones_and_the_closest(override: str, path: str, hint: str, known: str) -> None:
    errors = tiny_with(override)
    assert list(errors) == [path]
    assert "unknown key" in errors[path]
    assert known in errors[path].split("expected one of")[1]
    assert (f"did you mean {hint}?" in errors[path]) == bool(hint)


def test_all_errors_come_at_once_with_their_paths() -> None:
    values = changed(seed="x", stages={"instruct": {"lr": -1, "nope": 1}}, cmo={"lower": 2, "upper": 1})
    del values["model"]["llm"]
    with pytest.raises(RecipeError) as caught:
        parse(values, "some.yaml", [("bad.override", "expected x, found y")])
    paths = [path for path, _ in caught.value.errors]
    assert sorted(paths) == sorted(
        ["bad.override", "model.llm", "seed", "stages.instruct.lr", "stages.instruct.nope", "cmo"]
    )
    text = str(caught.value)
    assert text.startswith("some.yaml: 6 errors\n")
    assert all(path in text for path in paths)


def test_several_bad_overrides_are_told_together() -> None:
    errors = tiny_with("seed", "name.x=1", "model.llm.a.b=1", "cluster.workers=[", "cluster.wrkers=1")
    assert errors["name.x"] == "expected name to be a section, found string 'tiny'"
    assert errors["model.llm.a.b"] == "expected model.llm to be a section, found string 'builtin:tiny-llm'"
    assert errors["cluster.workers"].startswith("expected a YAML value, found '['")
    assert errors["cluster.wrkers"].startswith("unknown key (did you mean workers?)")
    assert errors[""] == "expected key.path=value, found 'seed'"


def test_messages_stay_short_whatever_was_found() -> None:
    errors = tiny_with("seed=" + json.dumps({"key": "v" * 1000}))
    assert len(errors["seed"]) < 150


# Methods, weights and bounds

UNIFORM, PROB, LOGIT = ("uniform", (1.0, 1.0)), ("prob", (0.05, 0.5)), ("logit", (1.0, 5.0))


@pytest.mark.parametrize(
    ("method", "expected"),
    [("vanilla", UNIFORM), ("pmo", UNIFORM), ("cmo", PROB), ("cal", LOGIT), ("dpa", PROB)],
)
def test_weights_and_bounds_come_from_the_method(method: str, expected: tuple[str, tuple[float, float]]) -> None:
    got = parse(changed(method=method))
    for stage in ("proxy_mllm", "instruct"):
        assert (got.weights(stage), got.bounds(stage)) == expected
    assert (got.weights("proxy_llm"), got.bounds("proxy_llm")) == UNIFORM


@pytest.mark.parametrize("method", METHOD_WEIGHTS)
@pytest.mark.parametrize("own", [UNIFORM, PROB, LOGIT])
def test_a_stages_own_weights_win_over_the_methods(method: str, own: tuple[str, tuple[float, float]]) -> None:
    got = parse(changed(method=method, stages={"instruct": {"weights": own[0]}}))
    assert (got.weights("instruct"), got.bounds("instruct")) == own
    assert got.weights("proxy_mllm") == METHOD_WEIGHTS[got.method]


def test_bounds_of_the_recipe_apply_to_all_weights_but_uniform() -> None:
    got = parse(changed(method="dpa", cmo={"lower": 0.2}, stages={"proxy_mllm": {"weights": "uniform"}}))
    assert got.bounds("instruct") == (0.2, 0.5)
    assert got.bounds("proxy_mllm") == got.bounds("proxy_llm") == (1.0, 1.0)


def test_one_bound_alone_is_held_against_the_default_of_the_other() -> None:
    assert "lower 0.05 > upper 0.01" in errors_of(lambda: parse(changed(cmo={"upper": 0.01})))["cmo"]
    parse(changed(method="cal", cmo={"upper": 2.0}))
    assert "logit" in errors_of(lambda: parse(changed(method="cal", cmo={"upper": 0.9})))["cmo"]
    parse(changed(method="vanilla", cmo={"upper": 0.01}))  # uniform weights have no clamp


def test_equal_bounds_are_allowed() -> None:
    assert parse(changed(cmo={"lower": 0.3, "upper": 0.3})).bounds("instruct") == (0.3, 0.3)


@pytest.mark.parametrize(
    ("override", "fewest", "most"), [("cluster.workers=3", 3, 3), ("cluster.workers={min: 2, max: 8}", 2, 8)]
)
def test_workers_are_a_number_or_a_range(override: str, fewest: int, most: int) -> None:
    cluster = load("tiny", [override]).cluster
    assert (cluster.min_workers, cluster.max_workers) == (fewest, most)


@pytest.mark.parametrize(
    ("workers", "told"),
    [("0", "0"), ("{min: 3, max: 2}", "min <= max"), ("{min: 0, max: 2}", "min"), ("{min: 2}", "max"), ("two", "two"),
     ("{min: 1, max: 2, mean: 1}", "mean"), ("1.5", "1.5"), ("null", "null")],
)  # fmt: skip
def test_workers_that_are_neither_are_told_by_their_key(workers: str, told: str) -> None:
    errors = tiny_with(f"cluster.workers={workers}")
    ((key, text),) = errors.items()
    assert key.startswith("cluster.workers")
    assert told in f"{key} {text}"


@pytest.mark.parametrize("gpus", ["2", "0.5", "-1"])
def test_a_worker_has_one_gpu_or_none(gpus: str) -> None:
    """Ray would place them, and DeepSpeed take the wrong device."""
    assert (
        "expected 1, or 0 (training on CPUs)" in tiny_with(f"cluster.gpus_per_worker={gpus}")["cluster.gpus_per_worker"]
    )


# The schema for editors


def test_the_schema_file_is_up_to_date() -> None:
    file = RECIPES_DIR / "recipe.schema.json"
    assert json.loads(file.read_text()) == json_schema(), f"{file} is out of date: make schema"


@pytest.mark.parametrize("path", sorted(RECIPES_DIR.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_ours_loads_and_fits_the_schema(path: Path) -> None:
    load(str(path))
    jsonschema.validate(from_yaml(path.read_text()), json_schema())


def test_every_key_says_what_it_means() -> None:
    schema = json_schema()
    sections = {"Recipe": schema, **schema["$defs"]}
    keys = [(name, key, found) for name, section in sections.items() for key, found in section["properties"].items()]
    assert len(keys) > 100
    assert [f"{name}.{key}" for name, key, found in keys if not found.get("description")] == []


def test_the_table_of_all_keys_is_up_to_date_and_has_each_of_them() -> None:
    file = RECIPES_DIR / "README.md"
    assert file.read_text() == table(json_schema()), f"{file} is out of date: make schema"
    headings = [line for line in file.read_text().splitlines() if line.startswith("## ")]
    for path in ("cmo", "stages.instruct.lora", "data.pretrain.source.N", "data.eval_extra.NAME", "cluster.workers"):
        assert any(f"`{path}`" in heading for heading in headings), path
    for row in ("| `skip_ids` | `[]` | list |", "| `window` | `3` | integer >= 1 |", "| `llm` | - | text |"):
        assert row in file.read_text()


def test_the_bounds_that_a_key_tells_are_those_of_its_methods() -> None:
    keys = json_schema()["$defs"]["CmoSection"]["properties"]
    for side, key in enumerate(("lower", "upper")):
        for method in ("cmo", "dpa", "cal"):
            bound = load("tiny", [f"method={method}"]).bounds("instruct")[side]
            named = next(part for part in keys[key]["description"].split("; ") if method in part.partition("(")[2])
            assert f"{bound:g} of" in named


def test_the_schema_refuses_what_parse_refuses() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed(sed=1), json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed(seed="x"), json_schema())


# The examples of the README


def test_recipes_in_the_readme_are_right_and_its_commands_are_the_promised_ones(tmp_path: Path) -> None:
    text = (RECIPES_DIR.parent.parent / "README.md").read_text()
    examples = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert examples
    for example in examples:
        values = from_yaml(example)
        if "datasets" in values:  # a mixture's file, not a recipe's
            (tmp_path / "mix.yaml").write_text(example)
            assert len(entries(SourceSection(source=str(tmp_path / "mix.yaml")))) == 2
        elif "sweep" in values:  # a space of keys; these are the recipe's
            keys = [key for key in values if key != "sweep"]
            assert load("tiny", [f"{keys[0]}={values[keys[0]][0]}", f"{keys[1]}={values[keys[1]]['grid'][0]}"])
        elif set(values) <= {"pretrain", "instruct"}:  # a part of `data`
            tiny_values = read_yaml(RECIPES_DIR / "tiny.yaml")
            parse({**tiny_values, "data": {**tiny_values["data"], **values}})
        else:
            load(written(tmp_path, example))
    for command in ("pip install -e . && python jobs/run_dpa.py", "pip install -e '.[test]' && pytest"):
        assert f"\n{command}\n" in text


def test_q_computed_beforehand_is_refused_where_stage_two_needs_none(tmp_path: Path) -> None:
    """It would be ignored; auto is not."""
    values = {**SMALLEST, "cmo": {"blind": "cached"}}
    assert parse(values).caches_blind("proxy_mllm")
    for change in ({"method": "vanilla"}, {"stages": {"proxy_mllm": {"from": "a.safetensors"}}}):
        errors = errors_of(lambda change=change: parse({**values, **change}))  # type: ignore[misc]
        assert list(errors) == ["cmo.blind"]
        assert "expected auto or live, found cached: it is for stage 2" in errors["cmo.blind"]
        assert not parse({**SMALLEST, **change}).caches_blind("proxy_mllm")
    assert not parse({**SMALLEST, "cmo": {"blind": "live"}}).caches_blind("proxy_mllm")


def test_q_of_stage_three_is_computed_beforehand_where_its_llm_is_frozen() -> None:
    frozen = {"stages": {"instruct": {"llm": "frozen"}}}
    assert parse({**SMALLEST, **frozen}).caches_blind("instruct")
    for change in ({}, {**frozen, "method": "vanilla"}, {**frozen, "cmo": {"blind": "live"}}):
        assert not parse({**SMALLEST, **change}).caches_blind("instruct")
    alone = {"proxy_mllm": {"from": "a.safetensors"}, **frozen["stages"]}
    assert parse({**SMALLEST, "stages": alone, "cmo": {"blind": "cached"}}).caches_blind("instruct")


def test_other_nodes_are_asked_for_before_the_wait_ends() -> None:
    cluster = {"fallback_label_selector": {"ray.io/market-type": "on-demand"}, "start_timeout_s": 300}
    values = {**SMALLEST, "cluster": cluster}
    with pytest.raises(RecipeError, match="expected fallback_after_s < start_timeout_s, found 300 and 300"):
        parse(values)
    assert parse({**values, "cluster": cluster | {"fallback_after_s": 60}}).cluster.fallback_after_s == 60
