"""From what lies in a store to report.html: of a run, of runs side by side, of a sweep."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import yaml

from dpa_ray.credentials import without_credentials
from dpa_ray.data.images import ImageError
from dpa_ray.data.ingest import Loader
from dpa_ray.data.prepared import find_prepared
from dpa_ray.engine import examples, words
from dpa_ray.engine.evaluate import ANSWERS
from dpa_ray.errors import NoAnswer, UserError
from dpa_ray.model.gain import edges
from dpa_ray.recipe import RecipeError, parse
from dpa_ray.report import metrics
from dpa_ray.report.content import STAGES, RunData, Weighting, WordLosses
from dpa_ray.report.runs_page import NUM_ASKED, run_page, runs_page
from dpa_ray.report.sweep_page import sweep_page
from dpa_ray.stages.runs import RUN_FILE
from dpa_ray.store.artifacts import Artifact, fetch, find
from dpa_ray.store.fs import Store

FILE = "report.html"
SWEEP_FILE = "sweep.json"

MOST_TRIALS = 100
"""Of a sweep, whose words are read."""


class NotAPlace(UserError):
    """Words that name no run and no sweep."""


@dataclass(frozen=True)
class Place:
    """A run or a sweep in a store."""

    store: Store
    kind: str  # runs | sweeps
    name: str

    @property
    def path(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def url(self) -> str:
        return self.store.url(self.path)

    @classmethod
    def of(cls, uri: str) -> Place:
        """Of STORE/runs/NAME or STORE/sweeps/NAME. Raises: NotAPlace where it is neither, or nothing is there."""
        whole = uri.rstrip("/") if "://" in uri else str(_absolute(uri))
        store, _, rest = whole.rpartition("/")
        store, _, kind = store.rpartition("/")
        if kind not in ("runs", "sweeps") or not store or not rest:
            raise NotAPlace(f"{uri}: expected a run or a sweep, STORE/runs/NAME or STORE/sweeps/NAME")
        try:
            place = cls(Store(store), kind, rest)
        except UserError as err:
            raise NotAPlace(str(err)) from None
        file = f"{place.path}/{RUN_FILE if kind == 'runs' else SWEEP_FILE}"
        place.store.check(write=False)
        if not place.store.exists(file):
            raise NotAPlace(f"{uri}: expected {place.store.url(file)}, found no such file; is the name right?")
        return place


def _absolute(path: str) -> Any:
    from pathlib import Path

    return Path(path.removeprefix("file://")).expanduser().absolute()


def write_report(place: Place) -> str:
    """Make the report of one run or sweep, in its folder; returns where it is."""
    path = f"{place.path}/{FILE}"
    place.store.write_bytes(path, page([place]).encode())
    return place.store.url(path)


def page(places: Sequence[Place]) -> str:
    """The page of a run, of several, or of one sweep.

    Raises: NotAPlace for other combinations; UserError where the store does not answer, or a sweep.json cannot be read.
    """
    places = list(dict.fromkeys(places))  # who names one twice gets it once
    kinds = {place.kind for place in places}
    if kinds == {"sweeps"} and len(places) == 1:
        (sweep,) = places
        values = _mapping(sweep.store, f"{sweep.path}/{SWEEP_FILE}")
        return sweep_page(sweep.name, sweep.url, values, _words_of_trials(sweep.store, values))
    if kinds != {"runs"}:
        raise NotAPlace(f"expected runs, or one sweep, found {', '.join(place.url for place in places)}")
    runs = [gather(place) for place in places]
    names = [run.name for run in runs]
    runs = [run if names.count(run.name) == 1 else replace(run, name=run.url) for run in runs]
    bins = [float(edge) for edge in edges()]
    return run_page(runs[0], bins) if len(runs) == 1 else runs_page(runs, bins)


def gather(place: Place) -> RunData:
    """What the store has of a run. What is not there is left out, and so is, with its reason, what cannot be read.

    Raises: NoAnswer where the store does not answer.
    """
    store = place.store
    unread: list[str] = []
    info: dict[str, Any] = {}
    with _left_out(RUN_FILE, unread):
        info = _mapping(store, f"{place.path}/{RUN_FILE}")
    records: list[metrics.Record] = []
    with _left_out(metrics.FILE, unread):
        records = metrics.read(store, place.path)
    artifacts = info.get("artifacts")
    found = {}
    for name, told in artifacts.items() if isinstance(artifacts, dict) else ():
        with _left_out(f"what {name} left", unread):
            if (artifact := _artifact(store, name, told)) is not None:
                found[name] = artifact
    weighed = {}
    for stage in STAGES:
        with _left_out(f"words of {stage}", unread):
            if lines := _lines(store, found.get(stage.replace("_", "-")), examples.FILE):
                weighed[stage] = lines
    by_word = {}
    for stage in STAGES:
        with _left_out(f"losses of words of {stage}", unread):
            if (told := _words(store, found.get(stage.replace("_", "-")))) is not None:
                by_word[stage] = told
    answers: list[dict[str, Any]] = []
    with _left_out("answers to held-out questions", unread):
        answers = _lines(store, found.get("eval"), ANSWERS)
    return RunData(
        name=place.name,
        url=place.url,
        info=info,
        metrics=records,
        recipe_text=yaml.safe_dump(info.get("recipe"), sort_keys=False, allow_unicode=True) if "recipe" in info else "",
        weightings=_weightings(info.get("recipe")),
        examples=weighed,
        words=by_word,
        answers=answers,
        pictures=_pictures(store, found["eval"], answers, unread) if answers else {},
        unread=unread,
    )


@contextmanager
def _left_out(what: str, unread: list[str]) -> Iterator[None]:
    """Tell in `unread` what the block could not read, and why, instead of raising it."""
    try:
        yield
    except NoAnswer:
        raise
    except (UserError, ImageError, OSError, ValueError, LookupError, TypeError) as err:
        reason = " ".join(without_credentials(str(err)).split()) or type(err).__name__
        unread.append(f"{what}: {reason}")


def _mapping(store: Store, path: str) -> dict[str, Any]:
    values = store.read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{store.url(path)}: expected a JSON object, found {type(values).__name__}")
    return values


def _artifact(store: Store, name: str, told: Any) -> Artifact | None:
    if name not in ("proxy-llm", "proxy-mllm", "instruct", "eval") or not isinstance(told, dict) or "key" not in told:
        return None
    return find(store, name, str(told["key"]))


def _lines(store: Store, artifact: Artifact | None, name: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file of an artifact, verified; none where there is no such file."""
    if artifact is None or name not in artifact.files:
        return []
    text = (fetch(store, artifact, names=[name]) / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def _words(store: Store, artifact: Artifact | None) -> WordLosses | None:
    """The losses of a stage's words, verified; None where it left none."""
    if artifact is None or words.FILE not in artifact.files:
        return None
    about, rows = words.read(fetch(store, artifact, names=[words.FILE]) / words.FILE)
    return WordLosses(
        about.get("samples", "unknown"), about.get("num_samples", "unknown"), rows, about.get("digest", "")
    )


def _words_of_trials(store: Store, sweep: dict[str, Any]) -> dict[str, dict[str, WordLosses]]:
    """The losses of words by trial and stage, of the first trials that are done; each artifact is read once."""
    read: dict[str, WordLosses | None] = {}
    found: dict[str, dict[str, WordLosses]] = {}
    trials = sweep.get("trials")
    for trial in trials if isinstance(trials, list) else []:
        if not isinstance(trial, dict) or trial.get("status") != "done" or len(found) == MOST_TRIALS:
            continue
        made = trial.get("artifacts")
        paths = {stage: str(made[stage]) for stage in STAGES if stage in made} if isinstance(made, dict) else {}
        for stage, path in paths.items():
            name, _, key = path.removeprefix("artifacts/").rpartition("-")
            if path not in read and name:
                read[path] = None
                with _left_out(path, []):
                    read[path] = _words(store, find(store, name, key))
            if (told := read.get(path)) is not None:
                found.setdefault(str(trial.get("name")), {})[stage] = told
    return found


def _weightings(recipe: Any) -> dict[str, Weighting]:
    """By stage; none of a recipe that this version does not read."""
    try:
        parsed = parse(recipe)
    except (RecipeError, TypeError):
        return {}
    weighted = {s: Weighting(parsed.weights(s), *parsed.bounds(s)) for s in ("proxy_mllm", "instruct")}
    return {"proxy_llm": Weighting("uniform", 1.0, 1.0), **weighted}


def _pictures(
    store: Store, artifact: Artifact, answers: Sequence[dict[str, Any]], unread: list[str]
) -> dict[tuple[str, int], list[str]]:
    """Thumbnails of the samples whose questions are shown, out of the prepared data; without data, none."""
    found: dict[tuple[str, int], list[str]] = {}
    for name, digest in artifact.manifest["inputs"].get("sets", {}).items():
        with _left_out(f"pictures of {name}", unread):
            prepared = find_prepared(store, digest)
            if prepared is None:
                continue
            rows = list(dict.fromkeys(answer["sample"] for answer in answers if answer["set"] == name))[:NUM_ASKED]
            loader = Loader(store=store, prepared=prepared, encoder=None, image_processor=None, pad_token_id=0)  # type: ignore[arg-type]
            for row, sample in zip(rows, loader.samples(rows), strict=True):
                found[name, row] = [examples.thumbnail(image.data) for image in sample.images]
    return found
