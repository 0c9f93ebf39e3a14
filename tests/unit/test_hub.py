"""Are a hub model's files fetched once a node, those that loading needs, and is a hub that is away waited for? Against an
HTTP server that answers as the hub does."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpa_ray.data import retry
from dpa_ray.data.retry import bridging
from dpa_ray.engine.fetching import needs
from dpa_ray.errors import NoAnswer, Unreachable, UserError
from dpa_ray.model import vlm
from dpa_ray.model.image_row import load_tokenizer
from dpa_ray.model.vlm import ModelRef
from dpa_ray.recipe import RecipeError, parse
from dpa_ray.stages import hub, weights
from dpa_ray.stages.pipeline import make_plan
from dpa_ray.stages.runs import Run
from dpa_ray.stages.spec import (
    ArtifactRef,
    BaseLlm,
    BlindTask,
    MergedProxy,
    ProxyLlmTask,
    ProxyMllmTask,
    Weights,
)
from dpa_ray.store import Store
from tests.encoders import IM, byte_level
from tests.hub_server import HubServer, hub_of
from tests.hub_worker import NUM_RANKS
from tests.recipe_helpers import SMALLEST
from tests.small_recipes import common

ROOT = Path(__file__).parents[2]
NAME = "some/llm"
RECIPE = parse(SMALLEST)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small LLM with random weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("llm")
    tokenizer = byte_level(IM, has_image=False)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return {"llm": str(folder)}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.1)
    with hub_of(tmp_path / "cache", monkeypatch) as made:
        yield made


def publish(server: HubServer, folder: Path) -> ModelRef:
    """The model of `folder` among what repositories have besides."""
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert "model.safetensors" in files
    others = (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/x.safetensors",
        "README.md",
        "onnx/config.json",
    )
    return ModelRef(NAME, server.commit(NAME, files | dict.fromkeys(others, b"large")))


def test_only_what_loading_needs_is_fetched_once(server: HubServer, models: dict[str, str]) -> None:
    ref = publish(server, Path(models["llm"]))
    small = hub.here(ref, with_weights=False)
    assert small.folder is not None
    assert "model.safetensors" not in os.listdir(small.folder)
    whole = hub.here(ref, with_weights=True)
    assert set(os.listdir(str(whole.folder))) == set(os.listdir(models["llm"])) - {"README.md"}
    assert server.downloads("model.safetensors") == 1
    before = len(server.asked)
    assert hub.here(ref, with_weights=True) == whole
    load_tokenizer(whole)
    vlm.load_llm(whole, torch.float32)
    assert len(server.asked) == before, "the hub was asked for what is there"


def test_weights_in_shards_are_those_of_their_index(server: HubServer) -> None:
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    files = dict.fromkeys(("model-1-of-2.safetensors", "model-2-of-2.safetensors", "model-extra.safetensors"), b"") | {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
    }
    found = hub.here(ModelRef(NAME, server.commit(NAME, files)), with_weights=True)
    assert set(os.listdir(str(found.folder))) == set(files) - {"model-extra.safetensors"}


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_is_too_busy_is_waited_for(
    server: HubServer, models: dict[str, str], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    ref = publish(server, Path(models["llm"]))
    server.failing, server.num_failures = status, 14  # the client itself tries six times
    with bridging(60):
        assert hub.here(ref, with_weights=True).folder is not None
    assert f"model {NAME}: the hub is away" in caplog.text
    assert str(status) in caplog.text
    assert "data.retry_s" in caplog.text


def test_a_hub_that_stays_away_is_told(
    server: HubServer, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    ref = publish(server, Path(models["llm"]))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NoAnswer, match=f"model {NAME}.*not to be had from the hub.*Connect"):
        hub.here(ref, with_weights=True)
    with bridging(0.3), pytest.raises(UserError, match=f"model {NAME}: no answer from the hub for .* tries") as told:
        hub.here(ref, with_weights=True)
    assert not isinstance(told.value, NoAnswer)


def test_what_is_whole_needs_no_hub(server: HubServer, models: dict[str, str]) -> None:
    ref = publish(server, Path(models["llm"]))
    folder = hub.here(ref, with_weights=True).folder
    hub._fetched.cache_clear()
    server.failing = 503
    assert hub.here(ref, with_weights=True).folder == folder
    hub._fetched.cache_clear()
    (Path(str(folder)) / "model.safetensors").unlink()
    with pytest.raises(NoAnswer):
        hub.here(ref, with_weights=True)
    assert hub.here(ref, with_weights=False).folder == folder


def test_what_the_hub_refuses_is_told_at_once(server: HubServer, models: dict[str, str]) -> None:
    store = Store("/nowhere")
    server.commit("some/gated", Path(models["llm"]))
    server.gated.add("some/gated")
    with bridging(600):
        for name, what in (("some/absent", "not a valid model identifier"), ("some/gated", "gated")):
            with pytest.raises(UserError, match=f"model.llm {name}.*{what}") as told:
                weights.resolve(name, "llm", store, make=False, report=lambda text: None)
            assert not isinstance(told.value, Unreachable)
        for name in ("some/absent", "some/gated"):
            with pytest.raises(UserError) as told:
                hub.here(ModelRef(name, "0" * 40), with_weights=True)
            assert not isinstance(told.value, Unreachable)
        with pytest.raises(UserError, match="expected weights"):
            hub.here(ModelRef(NAME, server.commit(NAME, {"config.json": b"{}"})), with_weights=True)


def test_offline_is_not_an_outage(server: HubServer, models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    ref = publish(server, Path(models["llm"]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with bridging(600), pytest.raises(Unreachable) as told:
        hub.here(ref, with_weights=True)
    assert not isinstance(told.value, NoAnswer)
    assert server.asked == []


# -- commits


def test_a_revision_is_a_commit_tag_or_branch(server: HubServer, models: dict[str, str]) -> None:
    first = server.commit(NAME, Path(models["llm"]))
    server.refs[NAME]["v1"] = first
    second = server.commit(NAME, Path(models["llm"]))

    def commit_of(name: str, commit: str | None = None) -> Weights:
        return weights.resolve(name, "llm", Store("/none"), make=False, report=lambda text: None, commit=commit)

    assert commit_of(NAME).ref == ModelRef(NAME, second)
    assert commit_of(f"{NAME}@v1").ref == commit_of(f"{NAME}@{first}").ref == ModelRef(NAME, first)
    assert commit_of(f"{NAME}@{second}") == commit_of(NAME), "another key for the same weights"
    assert commit_of(NAME, first) == commit_of(f"{NAME}@v1")
    with pytest.raises(UserError, match=f"model.llm {NAME}@v2.*not a valid git identifier"):
        commit_of(f"{NAME}@v2")


def test_a_run_keeps_to_the_commit_that_it_began_with(
    server: HubServer, models: dict[str, str], tmp_path: Path
) -> None:
    recipe = parse(SMALLEST | {"model": {"llm": NAME, "vision": "builtin:tiny-vit"}, "store": str(tmp_path / "store")})
    store, told = Store(recipe.store), list[str]()
    first = server.commit(NAME, Path(models["llm"]))
    begun = Run(store, recipe)
    resolve = functools.partial(weights.resolve, NAME, "llm", store, make=False, report=told.append)
    before = resolve(commit=begun.commits.get(NAME))
    begun.commits = {NAME: str(before.ref and before.ref.revision)}
    begun.write("running")
    server.commit(NAME, Path(models["llm"]))  # the hub moves on
    again = Run(store, recipe)
    again.check_name()
    assert again.commits == {NAME: first}
    assert resolve(commit=again.commits.get(NAME)) == before
    assert told == [f"model.llm {NAME}: at commit {first}, as before, wherever the hub stands now"]
    assert resolve().digest != before.digest
    other = Run(store, parse(recipe.to_dict() | {"seed": 1}))
    with pytest.raises(RecipeError):
        other.check_name()
    assert other.commits == {}


def test_a_plan_says_its_commits_and_keeps_to_others(server: HubServer, models: dict[str, str], tmp_path: Path) -> None:
    values = SMALLEST | {
        "model": {"llm": NAME, "vision": "builtin:tiny-vit"}, "store": str(tmp_path / "store"), "method": "vanilla",
        "data": {"pretrain": {"source": "builtin:shapes"}, "instruct": {"source": "builtin:shapes"}},
    }  # fmt: skip
    recipe = parse(values)
    first = server.commit(NAME, Path(models["llm"]))
    plan = functools.partial(make_plan, recipe, Store(recipe.store), make=False, report=lambda text: None)
    before = plan()
    assert before.commits == {NAME: first}
    second = server.commit(NAME, Path(models["llm"]))
    assert plan(commits=before.commits).refs == before.refs
    assert plan().commits == {NAME: second}
    assert plan().refs["instruct"] != before.refs["instruct"]


# -- the processes of nodes


def ranks(server: HubServer, folder: Path, name: str, commit: str) -> list[str]:
    """What each of four processes on two nodes says."""
    environment = {**os.environ, "HF_ENDPOINT": server.url, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "tests.hub_worker", str(folder), name, commit]
    done = subprocess.run(command, env=environment, timeout=300, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [(folder / f"{r}.txt").read_text() for r in range(NUM_RANKS)]


def test_one_process_of_a_node_fetches(server: HubServer, models: dict[str, str], tmp_path: Path) -> None:
    ref = publish(server, Path(models["llm"]))
    server.failing, server.num_failures = 503, 4  # an outage as they begin
    said = ranks(server, tmp_path, NAME, str(ref.revision))
    assert said[0] == said[1] != said[2] == said[3]
    assert server.downloads("model.safetensors") == 2
    listings = [asked for asked in server.asked if "/tree/" in asked]
    assert len(listings) <= 2 * 2 + 4, "two of each node that fetches, and tries"


def test_all_ranks_raise_what_one_cannot_fetch(server: HubServer, tmp_path: Path) -> None:
    for text in ranks(server, tmp_path, "some/absent", "0" * 40):
        assert text.startswith("UserError: model some/absent: ")


def test_weights_are_fetched_where_they_are_read() -> None:
    base, tower = (Weights(n, n, ref=ModelRef(n, "c")) for n in ("llm", "tower"))
    values = {**common(RECIPE), "tower": tower}
    proxy = ProxyMllmTask(**values, llm=MergedProxy(ArtifactRef("proxy-merged", "0")), tokenizer=BaseLlm(base))
    plain = ProxyMllmTask(**values, llm=BaseLlm(base), tokenizer=BaseLlm(base))
    assert needs(proxy) == {base.ref: False, tower.ref: True}
    assert needs(plain) == {base.ref: True, tower.ref: True}
    common_blind = {key: values[key] for key in ("result", "inputs", "recipe", "run_path")}
    assert needs(BlindTask(**common_blind, reader=plain, num_image_tokens=4)) == {base.ref: True}
    first = {key: values[key] for key in (*common_blind, "data", "num_steps")}
    assert needs(ProxyLlmTask(**first, base=BaseLlm(base))) == {base.ref: True}
