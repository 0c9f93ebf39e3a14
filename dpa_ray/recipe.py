"""What a run is: a strict, typed recipe, checked as a whole, with every error by key path."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from dpa_ray.recipe_errors import RecipeError, credentials_in, key_path, message, shown
from dpa_ray.recipe_running import (
    CheckpointSection,
    ClusterSection,
    DebugSection,
    DeepspeedSection,
    EvalSection,
    TrackersSection,
)
from dpa_ray.recipe_sources import ColumnsSection, Section, SourceEntry, SourceOptions, SourceSection
from dpa_ray.recipe_stages import (
    BOUNDS_ORDER,
    METHOD_WEIGHTS,
    WEIGHT_BOUNDS,
    CmoSection,
    Method,
    StagesSection,
    Weights,
)
from dpa_ray.recipe_yaml import apply_override, kept_beside_source, read_yaml

__all__ = [
    "ColumnsSection", "Recipe", "RecipeError", "SourceEntry", "SourceOptions", "SourceSection", "find_recipe",
    "json_schema", "load", "parse",
]  # fmt: skip

TRAINED_ON = ("pretrain", "instruct")
HELD_OUT, HELD_OUT_CAPTIONS = "heldout", "heldout_captions"
"""Names of `data.eval` and `data.eval_captions` among a run's sets of data, beside those it is TRAINED_ON; those of
`data.eval_extra` have their own."""

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Names become folders and object keys."""

DEFAULT_RETRY_S = 300.0
"""Servers restart and networks heal within minutes; a wrong endpoint is told before, when the source is listed."""

DEFAULT_STORE = "~/dpa_ray"
RECIPES_DIR = Path(__file__).resolve().parent.parent / "jobs" / "recipes"


def checked_store(store: str) -> str:
    """`store` as it is. Raises: ValueError where it is no folder and no bucket."""
    is_remote = re.match(r"(s3|gs)://[^/]", store)
    other = store == "" or "\0" in store or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", store)
    if other and not is_remote:
        raise ValueError(f"expected a folder, s3://bucket/prefix or gs://bucket/prefix, found {shown(store)}")
    return store


def absolute_store(store: str) -> str:
    """`store`, a local one made absolute. Raises: ValueError where it is none."""
    if checked_store(store).startswith(("s3://", "gs://")):
        return store
    try:
        return str(Path(store).expanduser().absolute())
    except RuntimeError as err:  # ~ of a user that is not known
        raise ValueError(f"expected a folder, found {shown(store)}: {err}") from None


class ModelSection(Section):
    llm: str = Field(
        min_length=1,
        description="decoder LLM: hub id (ORG/NAME, or ORG/NAME@REVISION: a commit, tag or branch), folder, or builtin:tiny-llm",
    )
    vision: str = Field(
        min_length=1,
        description="CLIP, SigLIP or DINOv2 tower: hub id (ORG/NAME or ORG/NAME@REVISION), folder, or builtin:tiny-vit",
    )
    vision_layer: int = Field(
        -2, description="hidden state of the tower that feeds the connector; negative counts from the last"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = Field(
        "auto", description="of the LLM; auto: what transformers takes for its type"
    )
    compile: bool = Field(
        False,
        description="compile the LLM's layers (torch.compile): fewer seconds a step, about half a minute more a stage",
    )
    image_size: int | None = Field(None, gt=0, description="pixels a side; default: the tower's image processor's")
    template_date: str = Field("26 Jul 2024", description="what a chat template that reads the clock is told")


class DataSection(Section):
    pretrain: SourceSection = Field(description="images with captions, for stages 1 (their text alone) and 2")
    instruct: SourceSection = Field(description="conversations about images, for stage 3")
    eval: SourceSection | None = Field(
        None, description="held-out conversations, which the finished model is asked; eval.max_samples bounds them"
    )
    eval_extra: dict[str, SourceSection] = Field(default_factory=dict, description="further held-out sets, by name")
    eval_captions: SourceSection | None = Field(
        None, description="held-out captions, for the nll of stages 1 and 2 while they run (eval.every_steps)"
    )
    max_quarantined_fraction: float = Field(
        0.01, ge=0, le=1, description="share of a source's samples that may be unusable before the run refuses it"
    )
    skip_ids: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description="training samples to pass over: ids (every sample that has one), or DIGEST:ROW of prepared data",
    )
    check_supervision: bool = Field(
        True, description="refuse data of which hardly any text token is trained on, or (in a chat) nearly every one"
    )
    retry_s: float = Field(
        DEFAULT_RETRY_S, ge=0, description="how long an S3 outage may last before reading data gives up"
    )
    stall_timeout_s: float = Field(
        900, gt=0, description="how long a worker waits for one batch before the run ends and says so"
    )
    shuffle_window: int = Field(65536, gt=0, description="samples that are shuffled together")
    prefetch_batches: int = Field(2, ge=1, le=8, description="micro-batches that are made ahead for each worker")
    workers: int = Field(2, ge=1, description="decode tasks at once for each training worker")


class Recipe(Section):
    """The whole of a run. `resolve` fills what depends on other keys; `digest` names the result."""

    name: str = Field(
        pattern=NAME_PATTERN, max_length=120, description="of the run; default: the file's, with a digest of overrides"
    )
    store: str = Field(
        DEFAULT_STORE,
        description="where data, artifacts and runs go: a folder, s3://bucket/prefix or gs://bucket/prefix",
    )
    method: Method = Field(
        "dpa",
        description="dpa: proxy LLM and weighted tokens; pmo: proxy alone; cmo, cal: weights alone; vanilla: neither",
    )
    model: ModelSection = Field(description="the LLM and the vision tower")
    data: DataSection = Field(description="what is trained and evaluated on")
    cmo: CmoSection = Field(default_factory=CmoSection, description="how tokens are weighted, where they are")
    stages: StagesSection = Field(default_factory=StagesSection, description="how each stage is trained")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="of what is computed; trained parameters and optimizer states are kept in fp32 too"
    )
    engine: Literal["deepspeed", "torch"] = Field(
        "deepspeed", description="what runs the steps; torch: plain data parallelism"
    )
    deepspeed: DeepspeedSection = Field(default_factory=DeepspeedSection, description="of engine deepspeed")
    cluster: ClusterSection = Field(
        default_factory=ClusterSection, description="workers, where they go, what they outlive"
    )
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection, description="of the stage under way")
    eval: EvalSection = Field(default_factory=EvalSection, description="of held-out data")
    trackers: TrackersSection = Field(
        default_factory=TrackersSection, description="where metrics go besides metrics.jsonl"
    )
    debug: DebugSection = Field(default_factory=DebugSection, description="what is kept to look into a run")
    seed: int = Field(0, ge=0, lt=2**31, description="of the order of samples, new weights and dropout")

    @field_validator("store")
    @classmethod
    def _folder_or_bucket(cls, store: str) -> str:
        return checked_store(store)

    def weights(self, stage: str) -> Weights:
        """Token weights of `stage`: its own setting, else the method's; stage 1 is always uniform."""
        if stage == "proxy_llm":
            return "uniform"
        own: Weights | None = getattr(self.stages, stage).weights
        return own or METHOD_WEIGHTS[self.method]

    def bounds(self, stage: str) -> tuple[float, float]:
        """(lower, upper) of the clamp in `stage`: the recipe's, else the default of its weights; uniform has one."""
        weights = self.weights(stage)
        lower, upper = WEIGHT_BOUNDS[weights]
        if weights == "uniform":
            return (lower, upper)
        return (
            lower if self.cmo.lower is None else self.cmo.lower,
            upper if self.cmo.upper is None else self.cmo.upper,
        )

    def held_out(self, stage: str) -> SourceSection | None:
        """What `stage` is evaluated on while it runs: captions in stages 1 and 2, `data.eval` in 3; None where it is not."""
        if self.eval.every_steps is None:
            return None
        return self.data.eval if stage == "instruct" else self.data.eval_captions

    def caches_blind(self, stage: str) -> bool:
        """Is `stage` given a q that was computed beforehand? Where its LLM is frozen: always in stage 2, by recipe in 3."""
        is_frozen = not self.stages.proxy_mllm.from_ if stage == "proxy_mllm" else self.stages.instruct.llm == "frozen"
        return self.cmo.blind != "live" and self.weights(stage) != "uniform" and is_frozen

    @property
    def collective_limit_s(self) -> float:
        """Seconds after which a collective gives up. A worker may honestly wait for its batch or the store, and others then
        for it."""
        return self.cluster.collective_timeout_s + max(self.data.stall_timeout_s, self.data.retry_s)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, aliases as users write them; `parse` gives the same recipe back."""
        return self.model_dump(mode="json", by_alias=True)

    def digest(self) -> str:
        """12 hex digits over everything but `name` and `store`."""
        content = {k: v for k, v in self.to_dict().items() if k not in ("name", "store")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def find_recipe(name_or_path: str) -> Path:
    """The YAML file of a recipe: a path, or the name of one in jobs/recipes.

    Raises: RecipeError, naming the known recipes, where there is no such file.
    """
    own = RECIPES_DIR / f"{name_or_path}.yaml"
    try:
        path = Path(name_or_path).expanduser()
        if path.is_file():
            return path
        if re.fullmatch(NAME_PATTERN, name_or_path) and own.is_file():
            return own
    except (OSError, ValueError, RuntimeError):  # a name too long, with a NUL, of a user that does not exist
        pass
    known = ", ".join(sorted(p.stem for p in RECIPES_DIR.glob("*.yaml"))) or "none"
    raise RecipeError([("", f"expected a YAML file or one of: {known}; found {name_or_path!r}")], "recipe not found")


def parse(values: dict[str, Any], where: str = "recipe", extra_errors: list[tuple[str, str]] | None = None) -> Recipe:
    """A recipe from plain values.

    Checks between keys run where the keys themselves are right.
    Raises: RecipeError with every error found, each with its key path, what was expected and what was found.
    """
    errors = [*(extra_errors or []), *credentials_in(values)]
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as err:
        for error in err.errors(include_url=False):
            errors.append((key_path(error["loc"]), message(error, Recipe)))
    if recipe is not None:
        for weights, stage in {recipe.weights(stage): stage for stage in ("proxy_mllm", "instruct")}.items():
            lower, upper = recipe.bounds(stage)
            if lower > upper:
                defaults = "{} and {}".format(*WEIGHT_BOUNDS[weights])
                found = f"{BOUNDS_ORDER}, found lower {lower} > upper {upper}"
                errors.append(("cmo", f"{found} (the defaults of {weights} weights are {defaults})"))
        if recipe.cmo.blind == "cached" and not any(recipe.caches_blind(s) for s in ("proxy_mllm", "instruct")):
            why = "is not trained" if recipe.stages.proxy_mllm.from_ else "has uniform weights, which need no q"
            found = f"expected auto or live, found cached: it is for stage 2, which {why}, and a frozen LLM in stage 3"
            errors.append(("cmo.blind", found))
        if recipe.stages.proxy_llm.from_ and recipe.stages.proxy_llm.llm == "full":
            found = "expected lora, as stages.proxy_llm.from is a PEFT adapter, found full"
            errors.append(("stages.proxy_llm.llm", found))
        if recipe.model.compile and recipe.engine == "deepspeed" and recipe.deepspeed.zero_stage == 3:
            found = "expected false with deepspeed.zero_stage 3, whose parameters come and go inside layers, found true"
            errors.append(("model.compile", found))
        errors += _ignored_in_held_out(recipe)
    if errors or recipe is None:
        raise RecipeError(errors, where)
    return recipe


def _ignored_in_held_out(recipe: Recipe) -> list[tuple[str, str]]:
    """Settings of held-out sets that would be ignored: images are made square as in training, or scores mean nothing."""
    sets = {f"data.eval_extra.{name}": section for name, section in recipe.data.eval_extra.items()}
    if recipe.data.eval is not None:
        sets["data.eval"] = recipe.data.eval
    if recipe.data.eval_captions is not None:
        sets["data.eval_captions"] = recipe.data.eval_captions
    errors = []
    if recipe.eval.every_steps is not None and not any(recipe.held_out(s) for s in ("proxy_mllm", "instruct")):
        found = "expected data.eval (for stage 3) or data.eval_captions (for 1 and 2) to evaluate on, found neither"
        errors.append(("eval.every_steps", found))
    for name in recipe.data.eval_extra:
        if name in (*TRAINED_ON, HELD_OUT, HELD_OUT_CAPTIONS):
            errors.append((f"data.eval_extra.{name}", "expected another name: a run has a set of this name already"))
    for path, section in sets.items():
        if section.fraction != 1.0:
            bound = "eval.running_samples" if path == "data.eval_captions" else "eval.max_samples"
            found = f"expected 1.0 or no such key, found {section.fraction}; {bound} bounds held-out sets"
            errors.append((f"{path}.fraction", found))
        if section.image_aspect is not None:
            alike = "data.pretrain" if path == "data.eval_captions" else "data.instruct"
            found = f"expected no such key, found {section.image_aspect}; held-out images follow {alike}'s"
            errors.append((f"{path}.image_aspect", found))
    return errors


def load(
    name_or_path: str, overrides: Sequence[str] = (), *, name: str | None = None, store: str | None = None
) -> Recipe:
    """The recipe of a YAML file (or of one of jobs/recipes) with `key.path=value` overrides on top.

    Without `name`, a run with overrides is called `RECIPE-<digest>`, so that two trials never share a name.
    A local store is made absolute. Raises: RecipeError with every error.
    """
    path = find_recipe(name_or_path)
    values = read_yaml(path)
    errors = [e for e in (apply_override(values, o) for o in overrides) if e]
    kept = kept_beside_source(read_yaml(path), overrides)
    values.setdefault("name", path.stem)
    if name is not None:
        values["name"] = name
    if store is not None:
        values["store"] = store
    try:
        recipe = parse(values, str(path), errors)
    except RecipeError as err:
        raise RecipeError([(key, text + kept.get(key, "")) for key, text in err.errors], str(path)) from None
    update: dict[str, Any] = {}
    named = name is not None or any(o.startswith("name=") for o in overrides)
    content = [o for o in overrides if not o.startswith(("name=", "store="))]
    if content and not named:
        update["name"] = f"{recipe.name}-{recipe.digest()[:8]}"
    try:
        update["store"] = absolute_store(recipe.store)
    except ValueError as err:
        raise RecipeError([("store", str(err))], str(path)) from None
    return recipe.model_copy(update=update)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors (`# yaml-language-server: $schema=...`)."""
    schema = Recipe.model_json_schema(by_alias=True)
    schema["required"].remove("name")  # a file without one is called after itself
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
