"""What is known of a recipe's models and data, and of an earlier run of it?"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dpa_ray.data.encode import Encoder
from dpa_ray.doctor import data, models
from dpa_ray.doctor.cost import WARM_UP_STEPS
from dpa_ray.doctor.findings import Check
from dpa_ray.doctor.plan.options import Given, PlanOptions
from dpa_ray.doctor.plan.work import Model, Work
from dpa_ray.engine.reporting import Place
from dpa_ray.errors import UserError
from dpa_ray.model.tower import tower_spec
from dpa_ray.model.vlm import quiet_loading
from dpa_ray.recipe import Recipe, SourceSection, parse
from dpa_ray.report import metrics
from dpa_ray.stages import build, preflight
from dpa_ray.stages.runs import RUN_FILE
from dpa_ray.store.fs import Store


@dataclass(frozen=True)
class Measured:
    """Of one stage of an earlier run: medians over its steps."""

    step: Given
    batch: int
    tokens: float
    targets: float
    wait_fraction: float  # of a step, for data


@dataclass(frozen=True)
class Facts:
    works: dict[str, Work]
    measured: dict[str, Measured]
    measured_as: Recipe | None  # of the run that was measured
    image_side: int  # pixels
    shards_to_make: float  # bytes of data that is not prepared yet
    notes: list[str] = field(default_factory=list)


def measured(uri: str) -> tuple[Recipe, dict[str, Measured]]:
    """What the run at `uri` (STORE/runs/NAME) came to, by stage. Raises: UserError."""
    place = Place.of(uri)
    recipe = parse(place.store.read_json(f"{place.path}/{RUN_FILE}")["recipe"], f"{place.url}/{RUN_FILE}")
    if recipe.cluster.min_workers != recipe.cluster.max_workers:
        raise UserError(
            f"{place.url}: its steps were made by {recipe.cluster.min_workers} to {recipe.cluster.max_workers} workers, and it is not "
            "written down which by how many; expected a run on a fixed number, or --step-time STAGE=SECONDS@GPUS"
        )
    gpus = max(1, round(recipe.cluster.max_workers * (recipe.cluster.gpus_per_worker or 1)))
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for record in metrics.read(place.store, place.path):
        if record.get("step_time_s") and record.get("num_samples"):
            by_stage.setdefault(record["stage"], []).append(record)
    found = {}
    for stage, every in by_stage.items():
        batch = getattr(recipe.stages, stage).global_batch_size
        whole = [r for r in every[WARM_UP_STEPS:] or every if r["num_samples"] == batch] or every
        samples = sum(r["num_samples"] for r in every)
        found[stage] = Measured(
            Given(statistics.median(r["step_time_s"] for r in whole), gpus), whole[0]["num_samples"],
            sum(r["num_tokens"] for r in every) / samples, sum(r["num_targets"] for r in every) / samples,
            statistics.median(r["data_wait_s"] / r["step_time_s"] for r in whole),
        )  # fmt: skip
    if not found:
        raise UserError(f"{place.url}: expected steps in its metrics.jsonl, found none")
    return recipe, found


def gather(recipe: Recipe, stages: tuple[str, ...], options: PlanOptions) -> Facts:
    """Counts of models from their configs, of data from the store, the source or `options`.

    Raises: UserError, naming the option that helps, where something can be known from nowhere.
    """
    measured_as, found = measured(options.from_run) if options.from_run else (None, {})
    store, check, notes = Store(recipe.store), Check("models"), []
    with quiet_loading(), tempfile.TemporaryDirectory(prefix="dpa_ray-") as scratch:
        try:
            llm = models.locate(recipe.model.llm, "llm", store, Path(scratch), check)
            vision = models.locate(recipe.model.vision, "vision", store, Path(scratch), check)
        except UserError as err:
            raise UserError(
                f"{err}. A plan needs config and tokenizer alone: set model.llm or model.vision to a folder that has them"
            ) from None
        vocabulary = build.vocabulary(llm, recipe)
        tower = tower_spec(vision, recipe.model.vision_layer, recipe.model.image_size)
        checked = preflight.Checked(vocabulary, tower)
        whole, _ = preflight.config_only(recipe, llm, checked, "instruct")
        model = _model(whole, tower.num_image_tokens)
        works, to_make = {}, 0.0
        looked: dict[str, data.Looked | UserError] = {}
        for stage in stages:
            staged, trained = preflight.config_only(recipe, llm, checked, stage)
            name = "instruct" if stage == "instruct" else "pretrain"
            section: SourceSection = getattr(recipe.data, name)
            if name not in looked and not _is_told(stage, options, found):
                looked[name] = _looked(store, section)
            images = 0 if stage == "proxy_llm" else tower.num_image_tokens

            def encoder(stage: str = stage, images: int = images) -> Encoder:
                return preflight.check_template(recipe, stage, vocabulary, images)

            sizes = _sizes(stage, section, options, found.get(stage), looked.get(name), images, encoder)
            notes.append(f"{stage}: {sizes.origin}")
            works[stage] = _work(recipe, stage, sizes, model, trained.num_parameters, _num_lora(staged))
        for one in looked.values():
            if isinstance(one, data.Looked) and not one.is_prepared:
                to_make += one.size_bytes
        if not any(isinstance(one, data.Looked) for one in looked.values()):  # nothing could be seen: all of it
            sets = {("instruct" if stage == "instruct" else "pretrain"): work for stage, work in works.items()}
            to_make = sum(work.num_samples * work.bytes_per_sample for work in sets.values())
    for stage, one_stage in found.items():
        if one_stage.wait_fraction > 0.05:
            notes.append(f"{stage}: {one_stage.wait_fraction:.0%} of a measured step was waiting for data")
    return Facts(works, found, measured_as, tower.image_size, to_make, notes)


def _model(whole: Any, num_image_tokens: int) -> Model:
    parts, config = models.num_parameters(whole), whole.model.language_model.config
    embedding, head = whole.get_input_embeddings().weight, whole.get_output_embeddings().weight
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return Model(
        llm=parts["llm"], lookup=0 if embedding is head else embedding.numel(), tower=parts["tower"],
        connector=parts["connector"], num_layers=config.num_hidden_layers, attention_width=width,
        num_image_tokens=num_image_tokens,
    )  # fmt: skip


def _num_lora(model: Any) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)


@dataclass(frozen=True)
class _Sizes:
    num_samples: int
    tokens: float
    text_tokens: float
    num_bytes: float
    origin: str


def _is_told(stage: str, options: PlanOptions, found: dict[str, Measured]) -> bool:
    tokens = stage in options.tokens_per_sample or stage in found
    return stage in options.samples and bool(options.bytes_per_sample) and tokens


def _looked(store: Store, section: SourceSection) -> data.Looked | UserError:
    """The data, or why it cannot be looked at."""
    try:
        return data.look(store, section)
    except UserError as err:
        return err


def _sizes(
    stage: str,
    section: SourceSection,
    options: PlanOptions,
    run: Measured | None,
    looked: data.Looked | UserError | None,
    num_image_tokens: int,
    encoder: Callable[[], Encoder],
) -> _Sizes:
    """A stage's data: as told, else as measured, else as looked at."""

    def seen(what: str, option: str) -> data.Looked:
        if isinstance(looked, data.Looked) and looked.num_rows:
            return looked
        why = f"{section.label} cannot be looked at: {looked}" if looked is not None else "the data was not looked at"
        raise UserError(f"{stage}: {what} is not known, as {why}; give {option}")

    told = options.samples.get(stage)
    num = told or max(1, round(section.fraction * seen("the number of samples", f"--samples {stage}=N").num_rows))
    num_bytes = options.bytes_per_sample
    if not num_bytes:
        one = seen("the size of a sample", "--bytes-per-sample N")
        num_bytes = one.size_bytes / one.num_rows
    if stage in options.tokens_per_sample:
        tokens, text, origin = options.tokens_per_sample[stage], 0.0, "given"
    elif run is not None:
        tokens, text, origin = run.tokens, run.targets, "as in the run"
    else:
        samples = seen("the length of a sample", f"--tokens-per-sample {stage}=N").samples
        if not samples:
            raise UserError(f"{stage}: no sample of {section.label} could be read; give --tokens-per-sample {stage}=N")
        encode = encoder()
        lengths = [len(encode(sample).input_ids) for sample in samples]
        tokens, text, origin = float(np.mean(lengths)), 0.0, f"mean of {len(lengths)} looked at"
    text = text or max(1.0, tokens - num_image_tokens)
    counted = "given" if told else "counted"
    return _Sizes(
        num, tokens, text, num_bytes,
        f"{num:,} samples ({counted}) of {tokens:,.0f} tokens ({origin}) and {num_bytes:,.0f} bytes in the shards",
    )  # fmt: skip


def _work(recipe: Recipe, stage: str, sizes: _Sizes, model: Model, trained: int, lora: int) -> Work:
    section = getattr(recipe.stages, stage)
    blind = "none"
    if recipe.weights(stage) != "uniform":
        blind = "cached" if recipe.caches_blind(stage) else "live"
    return Work(
        stage=stage, llm_mode=preflight.llm_mode(recipe, stage), num_samples=sizes.num_samples, epochs=section.epochs,
        max_steps=section.max_steps, global_batch_size=section.global_batch_size, tokens=sizes.tokens,
        text_tokens=sizes.text_tokens, bytes_per_sample=sizes.num_bytes, trained=trained, lora=lora,
        with_images=stage != "proxy_llm", blind=blind, model=model,
    )  # fmt: skip
