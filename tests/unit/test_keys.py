"""Does what changes a result change its key, and what does not leave it?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpa_ray.recipe import Recipe
from dpa_ray.stages import weights
from dpa_ray.stages.keys import merged_inputs
from dpa_ray.stages.pipeline import make_plan
from dpa_ray.stages.runs import identity
from dpa_ray.store.artifacts import content_key
from dpa_ray.store.fs import Store
from tests.small_recipes import ORDER, keys_of, weights_of

# Every key of a recipe: another value, and the first result that it changes (all later ones hang on that). None: none.
# A recipe key that is not here fails the test, so that whoever adds one must decide.
CHANGES: dict[str, tuple[Any, str | None]] = {
    "name": ("other", None),
    "store": ("/elsewhere", None),
    "precision": ("bf16", "proxy_llm"),
    "seed": (1, "proxy_llm"),
    "engine": ("torch", None),
    "deepspeed.zero_stage": (3, None),
    "cluster.workers": (2, None),
    "cluster.gpus_per_worker": (1, None),
    "cluster.cpus_per_worker": (1.5, None),
    "cluster.start_timeout_s": (5, None),
    "cluster.label_selector": ({"market-type": "spot"}, None),
    "cluster.fallback_label_selector": ({"market-type": "on-demand"}, None),
    "cluster.fallback_after_s": (60, None),
    "cluster.grow_every_s": (60, None),
    "cluster.max_failures": (0, None),
    "cluster.max_preemptions": (None, None),
    "cluster.collective_timeout_s": (99, None),
    "checkpoint.every_s": (9, None),
    "checkpoint.every_steps": (9, None),
    "checkpoint.keep": (9, None),
    "trackers.tensorboard": (False, None),
    "trackers.wandb": ({"project": "p"}, None),
    "trackers.mlflow": ({"tracking_uri": "u"}, None),
    "debug.record_samples": (True, None),
    "model.llm": ("OTHER_LLM", "proxy_llm"),
    "model.vision": ("OTHER_VISION", "proxy_mllm"),
    "model.vision_layer": (-3, "proxy_mllm"),
    "model.attention": ("eager", None),
    "model.compile": (True, None),
    "model.image_size": (28, "proxy_mllm"),
    "model.template_date": ("01 Jan 2025", "instruct"),
    "data.pretrain.fraction": (0.5, "proxy_llm"),
    "data.pretrain.image_aspect": ("pad", "proxy_mllm"),
    "data.pretrain.options.style": ("terse", "proxy_llm"),
    "data.pretrain.options.split": ("heldout", "proxy_llm"),
    "data.pretrain.options.size": (11, "proxy_llm"),
    "data.pretrain.options.seed": (5, "proxy_llm"),
    "data.instruct.fraction": (0.5, "instruct"),
    "data.instruct.image_aspect": ("crop", "instruct"),
    "data.instruct.options.style": ("terse", "instruct"),
    "data.instruct.options.split": ("heldout", "instruct"),
    "data.instruct.options.size": (11, "instruct"),
    "data.instruct.options.seed": (5, "instruct"),
    "data.eval.options.style": ("terse", "eval"),
    "data.eval.options.split": ("train", "eval"),
    "data.eval.options.size": (11, "eval"),
    "data.eval.options.seed": (5, "eval"),
    "data.max_quarantined_fraction": (0.5, None),
    "data.shuffle_window": (7, "proxy_llm"),
    "data.prefetch_batches": (3, None),
    "data.stall_timeout_s": (5, None),
    "data.workers": (3, None),
    "data.retry_s": (3.0, None),
    "data.check_supervision": (False, None),
    "data.skip_ids": (["some-id"], "proxy_llm"),  # not prepared here; of prepared data: test_skip.py
    "cmo.lower": (0.1, "proxy_mllm"),
    "cmo.upper": (0.7, "proxy_mllm"),
    "cmo.window": (5, "proxy_mllm"),
    "stages.proxy_llm.packing": (False, None),
    "stages.proxy_llm.llm": ("full", "proxy_llm"),
    "stages.proxy_mllm.weights": ("logit", "proxy_mllm"),
    "stages.instruct.weights": ("logit", "instruct"),
    "stages.instruct.llm": ("lora", "instruct"),
    "stages.instruct.group_by_length": (False, "instruct"),
    "eval.max_samples": (3, "eval"),
    "eval.batch_size": (3, None),
    "eval.max_new_tokens": (3, "eval"),
    "eval.every_steps": (3, None),
    "eval.running_samples": (3, None),
}
for _stage in ("proxy_llm", "proxy_mllm", "instruct"):
    for _key, _value in {
        "lr": 0.5, "epochs": 2, "global_batch_size": 5, "max_length": 99, "max_steps": 1, "grad_clip": 0.5,
        "betas": [0.8, 0.9], "weight_decay": 0.1, "warmup_fraction": 0.5,
    }.items():  # fmt: skip
        CHANGES[f"stages.{_stage}.{_key}"] = (_value, _stage)
    CHANGES[f"stages.{_stage}.micro_batch_size"] = (3, None)
    CHANGES[f"stages.{_stage}.gradient_checkpointing"] = (False, None)
for _key, _value in {"rank": 7, "alpha": 7, "dropout": 0.5}.items():
    CHANGES[f"stages.proxy_llm.lora.{_key}"] = (_value, "proxy_llm")
    CHANGES[f"stages.instruct.lora.{_key}"] = (_value, None)  # as long as instruct.llm is not lora

for _key in ("max_length", "max_steps"):  # what is read, and how much of it
    CHANGES[f"stages.proxy_mllm.{_key}"] = (CHANGES[f"stages.proxy_mllm.{_key}"][0], "blind")

ELSEWHERE = {
    "cmo.blind": "test_where_q_comes_from_is_in_no_key_but_its_own",
    "method": "test_methods_share_what_they_have_in_common",
    "stages.proxy_llm.from": "test_an_adapter_of_ones_own_takes_the_place_of_stage_one",
    "stages.proxy_mllm.from": "test_a_connector_of_ones_own_takes_the_place_of_stages_one_and_two",
    "data.eval_extra": "test_further_held_out_sets_are_in_the_key_of_eval_alone",
    "data.eval_captions": "held-out nll while a stage runs",
    "data.eval.fraction": "held-out sets are cut by eval.max_samples",
    "data.eval.image_aspect": "the finished model's own processor",
    **{f"data.{s}.{k}": "files: what lies there is in the digest" for s in ("pretrain", "instruct", "eval") for k in ("source", "images", "format", "columns")},
}  # fmt: skip


def leaves(values: dict[str, Any], path: str = "") -> set[str]:
    found: set[str] = set()
    for key, value in values.items():
        found |= leaves(value, f"{path}{key}.") if isinstance(value, dict) and value else {f"{path}{key}"}
    return found


def test_every_key_of_a_recipe_is_decided_upon(recipe: Callable[..., Recipe]) -> None:
    assert leaves(recipe().to_dict()) == set(CHANGES) | set(ELSEWHERE)


def test_each_key_changes_the_results_that_it_should(recipe: Callable[..., Recipe], models: dict[str, str]) -> None:
    before = keys_of(recipe())
    assert tuple(before) == ORDER
    names = {"OTHER_LLM": models["other_llm"], "OTHER_VISION": models["other_vision"]}
    wrong = {}
    for key, (value, first) in CHANGES.items():
        made = recipe(f"{key}={json.dumps(names.get(value, value) if isinstance(value, str) else value)}")
        after = keys_of(made.model_copy(update={"store": recipe().store}))
        expected = set(ORDER[ORDER.index(first) :]) if first else set()
        found = {name for name in ORDER if after[name] != before[name]}
        if found != expected:
            wrong[key] = (sorted(found), sorted(expected))
    assert not wrong


def test_a_mixture_counts_by_what_it_takes_of_what(recipe: Callable[..., Recipe]) -> None:
    def keys(*entries: str) -> tuple[str, ...]:
        return tuple(keys_of(recipe(f"data.pretrain={{source: [{', '.join(entries)}]}}")).values())

    shapes = "{source: builtin:shapes, options: {size: 10}}"
    assert keys(shapes) == tuple(
        keys_of(recipe("data.pretrain={source: builtin:shapes, options: {size: 10}}")).values()
    )
    twice = shapes.replace("}}", "}, weight: 2}")
    half = shapes.replace("}}", "}, take: 'first:5'}")
    found = [keys(shapes), keys(shapes, shapes), keys(twice), keys(half), keys(shapes, half)]
    assert len(set(found)) == 5
    assert len({key[0] for key in found}) == 5, "from stage 1 on"


def test_loras_of_stage_three_count_where_it_has_one(recipe: Callable[..., Recipe]) -> None:
    before = keys_of(recipe("stages.instruct.llm=lora"))
    after = keys_of(recipe("stages.instruct.llm=lora", "stages.instruct.lora.rank=7"))
    assert {name for name in ORDER if after[name] != before[name]} == {"instruct", "eval"}


def test_a_default_said_aloud_is_the_same(recipe: Callable[..., Recipe]) -> None:
    said = recipe(
        "data.pretrain.image_aspect=crop", "data.instruct.image_aspect=pad", "cmo.lower=0.05", "cmo.upper=0.5",
        "stages.instruct.weights=prob",
    )  # fmt: skip
    assert keys_of(said) == keys_of(recipe())


def test_uniform_weights_have_no_bounds(recipe: Callable[..., Recipe]) -> None:
    bounds = ("cmo.lower=0.1", "cmo.upper=0.9", "cmo.window=7")
    assert keys_of(recipe("method=vanilla", *bounds)) == keys_of(recipe("method=vanilla"))
    assert keys_of(recipe("method=pmo", *bounds)) == keys_of(recipe("method=pmo"))


def test_methods_share_what_they_have_in_common(recipe: Callable[..., Recipe]) -> None:
    """The proxy of pmo and dpa; nothing else of any two, but where the switches are the same by hand."""
    found = {m: keys_of(recipe(f"method={m}")) for m in ("vanilla", "pmo", "cmo", "cal", "dpa")}
    assert set(found["vanilla"]) == {"proxy_mllm", "instruct", "eval"}
    assert [set(found[m]) for m in ("cmo", "cal")] == [{"blind", "proxy_mllm", "instruct", "eval"}] * 2
    assert found["cmo"]["blind"] == found["cal"]["blind"] != found["dpa"]["blind"], "of the base LLM, of the proxy"
    assert "blind" not in found["pmo"]
    assert found["pmo"]["proxy_llm"] == found["dpa"]["proxy_llm"]
    assert found["pmo"]["proxy_merged"] == found["dpa"]["proxy_merged"]
    for name in ("proxy_mllm", "instruct", "eval"):
        assert len({keys[name] for keys in found.values()}) == 5
    by_hand = keys_of(recipe("method=pmo", "stages.proxy_mllm.weights=prob", "stages.instruct.weights=prob"))
    assert by_hand == found["dpa"]


def test_where_q_comes_from_is_in_no_key_but_its_own(recipe: Callable[..., Recipe]) -> None:
    auto = keys_of(recipe())
    assert keys_of(recipe("cmo.blind=cached")) == auto
    assert keys_of(recipe("cmo.blind=live")) == {name: key for name, key in auto.items() if name != "blind"}
    assert "blind" not in keys_of(recipe("stages.proxy_mllm.weights=uniform"))


def test_q_is_shared_by_whatever_reads_the_same_captions_with_the_same_llm(recipe: Callable[..., Recipe]) -> None:
    """Without a proxy, whose key holds the seed, any seed shares it; on fewer samples all that chooses them counts."""

    def key(*overrides: str) -> str:
        return keys_of(recipe("method=cmo", *overrides))["blind"]

    whole = key()
    s = "stages.proxy_mllm"
    for same in (
        "seed=9", "cmo.lower=0.2", "cmo.upper=0.9", "cmo.window=5", f"{s}.epochs=3", f"{s}.global_batch_size=2",
        f"{s}.lr=1", "data.shuffle_window=7", "method=cal", "model.vision_layer=-3", "stages.instruct.max_length=9",
        "data.pretrain.image_aspect=pad", "model.attention=eager",
    ):  # fmt: skip
        assert key(same) == whole, same
    for other in (
        "precision=bf16",
        f"{s}.max_length=9",
        "data.pretrain.options.seed=5",
        "data.pretrain.options.size=9",
    ):
        assert key(other) != whole, other
    part = ("data.pretrain.fraction=0.5",)
    assert key(*part) == key(*part, "data.shuffle_window=7", f"{s}.global_batch_size=2")
    few = (f"{s}.max_steps=1",)
    kept = {whole, key(*part), key(*few)}
    for changed in ("seed=9", "data.shuffle_window=7", f"{s}.global_batch_size=2", f"{s}.max_steps=2", *part):
        kept.add(key(*few, changed))
    kept.add(key(*part, "seed=9"))
    assert len(kept) == 3 + 5 + 1


def test_q_of_a_frozen_stage_three_has_what_it_reads_in_its_key(recipe: Callable[..., Recipe]) -> None:
    """The base LLM, conversations and their template: nothing of stages 1 and 2."""

    def key(*overrides: str) -> str:
        return keys_of(recipe("stages.instruct.llm=frozen", *overrides))["blind_instruct"]

    assert "blind_instruct" not in keys_of(recipe())
    whole = key()
    for same in (
        "method=cmo", "seed=9", "cmo.lower=0.2", "stages.instruct.epochs=3", "stages.instruct.lr=1",
        "stages.instruct.global_batch_size=2", "stages.instruct.group_by_length=false", "data.shuffle_window=7",
        "stages.proxy_mllm.max_length=9", "data.pretrain.options.seed=5", "stages.instruct.micro_batch_size=1",
    ):  # fmt: skip
        assert key(same) == whole, same
    others = (
        "precision=bf16", "stages.instruct.max_length=9", "data.instruct.options.seed=5", 'model.template_date="1 May 2025"',
        "data.instruct.fraction=0.5", "stages.instruct.max_steps=1",
    )  # fmt: skip
    few = "stages.instruct.max_steps=1"
    found = {whole, *map(key, others), key(few, "stages.instruct.group_by_length=false"), key(few, "seed=9")}
    assert len(found) == 1 + len(others) + 2
    assert key("data.instruct.fraction=0.5", "data.shuffle_window=7") == key("data.instruct.fraction=0.5")


@pytest.mark.parametrize(
    ("stage", "name", "overrides"),
    [("proxy_mllm", "blind", ["method=cmo"]), ("instruct", "blind_instruct", ["stages.instruct.llm=frozen"])],
)
def test_q_is_of_the_samples_as_its_stage_takes_them_in_this_version(
    stage: str, name: str, overrides: list[str], recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version may encode them otherwise, or take others in so many steps."""
    every, few = recipe(*overrides), recipe(*overrides, f"stages.{stage}.max_steps=1")
    before = [keys_of(made)[name] for made in (every, few)]
    monkeypatch.setattr(f"dpa_ray.stages.{stage}.VERSION", 99)
    after = [keys_of(made)[name] for made in (every, few)]
    assert not any(a == b for a, b in zip(before, after, strict=True))


def test_a_merge_is_of_the_runs_precision_wherever_its_adapter_is_from(recipe: Callable[..., Recipe]) -> None:
    """An adapter of one's own has a key of what is in it alone."""
    base = weights_of()
    fp32, bf16 = (merged_inputs(recipe(f"precision={p}"), base, "an adapter's key") for p in ("fp32", "bf16"))
    assert content_key(fp32) != content_key(bf16)
    assert content_key(fp32) == content_key(merged_inputs(recipe("seed=7"), base, "an adapter's key"))


def test_as_many_image_tokens_are_the_same_q_whatever_the_tower(
    recipe: Callable[..., Recipe], tiny_tower: Callable[..., Path]
) -> None:
    """Positions are all that the image leaves of itself; a built-in tower's are known before it is made."""
    before = keys_of(recipe("method=cmo"))
    same = keys_of(recipe("method=cmo", f"model.vision={tiny_tower('siglip')}"))
    assert same["blind"] == before["blind"]
    assert same["proxy_mllm"] != before["proxy_mllm"]
    finer = keys_of(recipe("method=cmo", f"model.vision={tiny_tower('clip', patch_size=14)}"))
    assert finer["blind"] != before["blind"]
    made = recipe("method=cmo", "model.vision=builtin:tiny-vit")
    absent = keys_of(made)
    weights.resolve("builtin:tiny-vit", "vision", Store(made.store), make=True, report=lambda _: None)
    assert keys_of(made) == absent


def test_further_held_out_sets_are_in_the_key_of_eval_alone(recipe: Callable[..., Recipe]) -> None:
    extra = 'data.eval_extra={pairs: {source: "builtin:shapes", options: {split: heldout_pairs, size: 3}}}'
    before, after = keys_of(recipe()), keys_of(recipe(extra))
    assert {name for name in ORDER if after[name] != before[name]} == {"eval"}


def test_another_file_of_the_same_model_folder_is_another_model(
    recipe: Callable[..., Recipe], models: dict[str, str], tmp_path: Path
) -> None:
    """Weights, tokenizer and configs are what a model is; where it lies is not."""
    import shutil

    shutil.copytree(models["llm"], tmp_path / "copy")
    moved = recipe(f"model.llm={tmp_path / 'copy'}")
    assert keys_of(moved) == keys_of(recipe())
    config = tmp_path / "copy" / "tokenizer_config.json"
    config.write_text(config.read_text() + "\n")
    assert keys_of(moved) != keys_of(recipe())


def test_a_proxy_that_is_trained_in_full_has_no_rank(recipe: Callable[..., Recipe]) -> None:
    full = keys_of(recipe("stages.proxy_llm.llm=full"))
    assert keys_of(recipe("stages.proxy_llm.llm=full", "stages.proxy_llm.lora.rank=7")) == full
    assert keys_of(recipe("method=vanilla", "stages.proxy_llm.llm=full")) == keys_of(recipe("method=vanilla"))


def test_a_method_in_one_stage_alone_shares_the_other_stages(recipe: Callable[..., Recipe]) -> None:
    """CMO in pretraining only has DPA's connector, in tuning only PMO's; the proxy is that of all."""
    dpa, pmo = keys_of(recipe("method=dpa")), keys_of(recipe("method=pmo"))
    pretraining = keys_of(recipe("method=dpa", "stages.instruct.weights=uniform"))
    tuning = keys_of(recipe("method=dpa", "stages.proxy_mllm.weights=uniform"))
    assert pretraining["proxy_mllm"] == dpa["proxy_mllm"] != pmo["proxy_mllm"]
    assert tuning["proxy_mllm"] == pmo["proxy_mllm"]
    assert len({keys["proxy_llm"] for keys in (dpa, pmo, pretraining, tuning)}) == 1
    assert len({keys["instruct"] for keys in (dpa, pmo, pretraining, tuning)}) == 4


def test_a_dry_run_writes_nothing(recipe: Callable[..., Recipe]) -> None:
    made = recipe()
    make_plan(made, Store(made.store), make=False, report=lambda _: None)
    assert not Path(made.store).exists() or not list(Path(made.store).rglob("*"))


def test_a_name_goes_on_with_what_says_how_alone(recipe: Callable[..., Recipe]) -> None:
    """By the table of keys: what changes a result is another run; what changes none is not (but for a few, which may)."""
    base = identity(recipe())
    for key, (value, first) in CHANGES.items():
        if isinstance(value, str) and value.startswith("OTHER"):
            value = "/other"
        same = identity(recipe(f"{key}={json.dumps(value)}")) == base
        if first is not None:
            assert not same, f"{key} changes {first}"
        elif key not in ("data.max_quarantined_fraction", "eval.batch_size") and ".lora." not in key:
            assert same, f"{key} changes nothing"
