"""Can every recipe in jobs/recipes be planned and its models be put together, without weights and without a network?"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from dpa_ray.model.vlm import ModelRef
from dpa_ray.recipe import RECIPES_DIR, Recipe, load
from dpa_ray.stages import weights
from dpa_ray.stages.preflight import config_only, preflight
from dpa_ray.stages.weights import Weights
from dpa_ray.store.fs import Store
from tests.published_models import COMMIT, CONFIGS, NUM_PARAMETERS, hub_cache
from tests.tiny_models import make_captions

ROOT = Path(__file__).resolve().parents[2]
PAPER = ("llama31-8b-blip558k", "llama31-8b-sharegpt4v", "qwen25-7b-sharegpt4v", "gemma2-9b-sharegpt4v", "qwen25-1.5b")

CONNECTOR = {width: (1024 * width + width) + (width * width + width) for width in (4096, 3584, 1536)}
"""Parameters of two linear layers from CLIP-L's 1,024 features."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_cache(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client with no network, and this cache; both libraries read the environment when they are imported."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


@pytest.fixture(scope="module")
def run_dpa() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_dpa", ROOT / "jobs" / "run_dpa.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def located(recipe: Recipe, store: Store) -> tuple[ModelRef, ModelRef]:
    found: list[Weights] = [
        weights.resolve(recipe.model.llm, "llm", store, make=False, report=lambda text: None),
        weights.resolve(recipe.model.vision, "vision", store, make=False, report=lambda text: None),
    ]
    return found[0].located(store), found[1].located(store)


def test_these_are_all_the_recipes() -> None:
    assert {p.stem for p in RECIPES_DIR.glob("*.yaml")} == {*PAPER, "tiny"}


@pytest.mark.parametrize("name", PAPER)
def test_recipes_have_the_papers_values(name: str) -> None:
    """arXiv 2509.14735 and its released scripts; what of it is a default is written out all the same."""
    recipe = load(name)
    assert recipe.name == name
    assert recipe.method == "dpa"
    assert recipe.model.vision == "openai/clip-vit-large-patch14-336"
    assert recipe.model.vision_layer == -2
    one, two, three = recipe.stages.proxy_llm, recipe.stages.proxy_mllm, recipe.stages.instruct
    assert [s.lr for s in (one, two, three)] == [4e-5, 2e-3, 4e-5]
    assert [s.max_length for s in (one, two, three)] == [8192, 8192, 2048]
    for stage in (one, two, three):
        assert (stage.global_batch_size, stage.epochs, stage.max_steps) == (256, 1, None)
        assert (stage.weight_decay, stage.warmup_fraction, stage.grad_clip) == (0.0, 0.03, 1.0)
        assert stage.betas == (0.9, 0.999)
        assert stage.gradient_checkpointing
        assert stage.global_batch_size % (stage.micro_batch_size * recipe.cluster.max_workers) == 0, "no idle rank"
    assert (one.lora.rank, one.lora.alpha, one.lora.dropout) == (256, 512, 0.0)
    assert three.llm == "full"
    assert recipe.precision == "bf16"
    assert recipe.deepspeed.zero_stage == 2
    assert (recipe.data.pretrain.image_aspect, recipe.data.instruct.image_aspect) == ("crop", "pad")
    for stage_name in ("proxy_mllm", "instruct"):
        assert recipe.weights(stage_name) == "prob"
        assert recipe.bounds(stage_name) == (0.05, 0.5)
    assert recipe.cmo.window == 3
    assert recipe.caches_blind("proxy_mllm")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", PAPER)
def test_recipes_models_are_put_together_from_their_configs(name: str, tmp_path: Path) -> None:
    recipe = load(name, store=str(tmp_path / "store"))
    llm, tower = located(recipe, Store(recipe.store))
    assert llm.revision == tower.revision == COMMIT
    checked = preflight(recipe, llm, tower)  # templates, tokens, attention, processor
    assert checked.tower.num_image_tokens == 576
    config = CONFIGS[recipe.model.llm]()
    row = checked.vocabulary.row
    assert not row.appended, "each of these families has a row to spare"
    assert row.num_base_rows == config.vocab_size
    connector = CONNECTOR[config.hidden_size]
    size = NUM_PARAMETERS[recipe.model.llm]
    counts = {}
    for stage in ("proxy_llm", "proxy_mllm", "instruct"):
        model, trained = config_only(recipe, llm, checked, stage)
        assert {p.device.type for p in model.parameters()} == {"meta"}
        counts[stage] = (trained.description, trained.num_parameters)
        if stage == "instruct":
            assert model.config.text_config.vocab_size == config.vocab_size
    assert counts["proxy_mllm"] == ("connector", connector)
    assert counts["instruct"] == ("connector + LLM", connector + size)
    per_layer = lora_widths(config)
    assert counts["proxy_llm"] == ("LoRA of the LLM", 256 * config.num_hidden_layers * per_layer)


def lora_widths(config: object) -> int:
    """Inputs plus outputs of a layer's seven matrices: each rank of a LoRA has as many parameters."""
    width, middle = config.hidden_size, config.intermediate_size  # type: ignore[attr-defined]
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads  # type: ignore[attr-defined]
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads  # type: ignore[attr-defined]
    return 2 * (width + queries) + 2 * (width + keys) + 3 * (width + middle)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", PAPER)
def test_recipes_are_dry_run(
    name: str, run_dpa: ModuleType, tmp_path: Path, assets_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = make_captions(assets_dir / "recipes", 3)
    source = f"{{source: {captions.file}, images: {captions.images}}}"
    store = tmp_path / "store"
    code = run_dpa.main(
        [name, "--dry-run", "--store", str(store), f"data.pretrain={source}", f"data.instruct={source}"]
    )
    shown = capsys.readouterr()
    assert code == 0, shown.err
    for stage in ("proxy_llm", "blind", "proxy_mllm", "instruct"):
        assert any(line.split()[:1] == [stage] for line in shown.out.splitlines()), stage
    assert (
        f"{NUM_PARAMETERS[load(name).model.llm] + CONNECTOR[CONFIGS[load(name).model.llm]().hidden_size]:,}"
        in shown.out
    )
    assert not store.exists()


def test_a_dry_run_without_a_network_says_what_it_does_not_know(
    run_dpa: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    assert run_dpa.main(["qwen25-1.5b", "--dry-run", "--store", str(tmp_path / "store")]) == 0
    told = capsys.readouterr().out
    assert "Qwen/Qwen2.5-1.5B-Instruct" in told
    assert "? is not known from here: model.llm Qwen/Qwen2.5-1.5B-Instruct" in told
    rows = [
        line.split()
        for line in told.splitlines()
        if line.split()[:1] and line.split()[0] in ("proxy_llm", "blind", "instruct")
    ]
    assert [row[:3] for row in rows] == [["proxy_llm", "?", "?"], ["blind", "?", "?"], ["instruct", "?", "?"]]


def test_a_dry_run_without_a_store_says_so(
    run_dpa: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens at the discard port
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    assert run_dpa.main(["llama31-8b-sharegpt4v", "--dry-run"]) == 0
    assert "? is not known from here: s3://my-bucket/dpa: no answer" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.vision_layer=40"], "model.vision_layer: expected a hidden state of builtin:tiny-vit, -3 to 2"),
        (["model.attention=flex_attention"], "model.attention: flex_attention trains on GPUs only"),
        (["stages.proxy_mllm.from=/nope.bin"], "stages.proxy_mllm.from: expected a file or folder, found none at /nope.bin"),
        (["stages.proxy_llm.from={empty}"], "{empty}: expected a PEFT adapter folder"),
        (["stages.proxy_llm.from={recipes}"], "{recipes}: expected a PEFT adapter folder"),
        (["model.llm=s3://bucket/llm"], "model.llm: expected a model folder, a hub id or builtin:tiny-*, found a URI"),
        (["model.vision=hf://x/y"], "copy the folder to the same path on every node, or name a hub id"),
    ],
)  # fmt: skip
def test_a_dry_run_looks_at_models_before_they_are_made(
    overrides: list[str], told: str, run_dpa: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also at built-in ones that are not in the store, and at what `stages.X.from` names."""
    places = {"empty": str(tmp_path / "empty"), "recipes": str(RECIPES_DIR)}
    (tmp_path / "empty").mkdir()
    filled = [override.format(**places) for override in overrides]
    assert run_dpa.main(["tiny", "--dry-run", "--store", str(tmp_path / "store"), *filled]) == 1
    assert told.format(**places) in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_dry_run_of_built_in_models_says_what_would_be_trained(
    run_dpa: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = "stages.proxy_llm.from=s3://bucket/adapter"
    for overrides in ([], [away]):
        assert run_dpa.main(["tiny", "--dry-run", "--store", str(tmp_path / "store"), *overrides]) == 0
        told = capsys.readouterr().out
        rows = {line.split()[0]: line for line in told.splitlines() if line.split()}
        trained = {"proxy_llm": "LoRA of the LLM", "proxy_mllm": "connector", "instruct": "connector + LLM"}
        assert [what for stage, what in trained.items() if what not in rows[stage]] == []
        assert ("s3://bucket/adapter is looked at by the run" in " ".join(told.split())) == bool(overrides)
    assert not (tmp_path / "store").exists()
