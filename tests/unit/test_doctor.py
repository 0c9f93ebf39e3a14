"""Does the doctor find what is wrong with a recipe, all of it at once, and write nothing?"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpa_ray.data.prepare import prepare
from dpa_ray.doctor import cost, data, screen
from dpa_ray.doctor.cluster import Node, Nodes
from dpa_ray.doctor.cost import StepTime
from dpa_ray.doctor.examine import Options, _Examined, examine
from dpa_ray.doctor.findings import Check, Findings
from dpa_ray.engine import job
from dpa_ray.errors import UserError
from dpa_ray.recipe import Recipe, RecipeError, SourceSection, parse
from dpa_ray.report.console import terminal
from dpa_ray.stages.pipeline import make_plan
from dpa_ray.store.fs import Store
from tests import tiny_models
from tests.integration.runs import make_recipe
from tests.integration.test_bad_recipes import WRONG_TARGETS
from tests.tiny_models import LlavaData, make_captions

ROOT = Path(__file__).resolve().parents[2]


def status(findings: Findings) -> dict[str, str]:
    return {check.name: check.status for check in findings.checks}


def detail(findings: Findings, name: str) -> str:
    (check,) = [check for check in findings.checks if check.name == name]
    return check.detail


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="module")
def source(assets_dir: Path) -> LlavaData:
    """40 captions of one image each."""
    return make_captions(assets_dir / "doctor", 40)


def section(source: LlavaData, **values: Any) -> SourceSection:
    return SourceSection(source=str(source.file), images=str(source.images), **values)


def test_a_recipe_that_is_well(recipe: Callable[..., Recipe]) -> None:
    made = recipe()
    found = examine(made, Options({"instruct": StepTime(2.0, "given")}))
    assert found.exit_code == 0, [check.to_dict() for check in found.checks if check.status != "ok"]
    assert not Path(made.store).exists(), "nothing is written"
    stages = found.stages
    assert list(stages) == ["proxy_llm", "proxy_mllm", "instruct"]
    assert [stages[s]["num_steps"] for s in stages] == [3, 3, 3]
    assert [stages[s]["trained"] for s in stages] == ["LoRA of the LLM", "connector", "connector + LLM"]
    assert stages["instruct"]["estimated_time_s"] == 6.0
    for stage in stages.values():
        assert 0 < stage["supervised_fraction"] < 1
        assert [row["zero_stage"] for row in stage["memory"]] == [0, 1, 2, 3]
        assert [row["is_chosen"] for row in stage["memory"]] == [False, False, True, False]
        assert len(stage["samples"]) == 2
    json.dumps(found.to_dict(), allow_nan=False)


def test_everything_wrong_is_told_at_once(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes the import fail, as if it were not there
    store_is_a_file = tmp_path / "file"
    store_is_a_file.write_text("")
    made = recipe(
        "model.llm=/no/such/llm", "model.vision_layer=-9", "data.instruct={source: /no/such.json}",
        "cluster.gpus_per_worker=1", "trackers.wandb.project=small", "data.skip_ids=[no-such-sample]",
        f"store={store_is_a_file}",
    )  # fmt: skip
    found = examine(made, Options())
    assert found.exit_code == 1
    statuses = status(found)
    assert {name for name, value in statuses.items() if value == "fail"} == {
        "trackers", "store", "LLM", "vision tower", "data.instruct", "cluster",
    }  # fmt: skip
    for name, word in (("store", "expected a folder"), ("LLM", "/no/such/llm"), ("vision tower", "-9"),
                       ("data.instruct", "/no/such.json"), ("cluster", "room for 1 worker"),
                       ("trackers", "trackers.wandb: expected the package wandb"), ("data.skip_ids", "prepares it first")):  # fmt: skip
        assert word in detail(found, name)
    assert statuses["data.pretrain"] == "ok", "read from the source"
    skipped = ("data.skip_ids", "tokenizer", "memory", "targets of proxy_llm")
    assert {statuses[name] for name in skipped} == {"skipped"}


@pytest.mark.parametrize("store", ["s3://a", "s3://bucket/dpa"], ids=["bucket", "endpoint"])
def test_a_store_that_cannot_be_opened_at_all_is_the_users_error(
    store: str, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "minio.example:9000")
    with pytest.raises(UserError, match=r"expected .* found '(s3://a|minio.example:9000)'"):
        examine(recipe(f"store={store}"), Options())


def test_too_few_nodes_are_a_risk_where_a_cluster_may_grow(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    examined = _Examined(recipe("cluster.workers=4"), Options(), Store(str(tmp_path)), tmp_path, Findings())
    one = (Node({"CPU": 1.0}),)
    for nodes, expected in ((Nodes("a cluster", True, one), "warn"), (Nodes("a laptop", False, one), "fail")):
        check = Check("cluster")
        examined.check_placing(nodes, check)
        assert check.status == expected
        assert "expected room for 4 workers" in check.detail


def test_bytes_that_may_be_there_already_are_a_risk_and_others_a_failure(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "free_bytes", lambda store: 99)
    for folder, expected in (("runs", "fail"), ("artifacts/instruct-0", "warn")):
        (tmp_path / folder).mkdir(parents=True)
        examined = _Examined(recipe(), Options(), Store(str(tmp_path)), tmp_path, Findings())
        examined.looked["instruct"] = data.Looked("d", 1, False, size_bytes=100)
        examined.check_cost()
        assert status(examined.findings)["bytes written"] == expected


def test_a_folder_with_a_config_alone_is_checked_but_for_its_weights(
    recipe: Callable[..., Recipe], models: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(models["llm"], tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    found = examine(recipe(f"model.llm={tmp_path / 'bare'}"), Options())
    assert {name: value for name, value in status(found).items() if value != "ok"} == {"weights": "warn"}
    assert "expected weights (*.safetensors), found none here" in detail(found, "weights")
    assert found.stages["instruct"]["memory"]


def test_weights_that_are_cut_off_or_of_another_model_are_found(
    recipe: Callable[..., Recipe], models: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(models["llm"], tmp_path / "cut")
    file = tmp_path / "cut/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    found = examine(recipe(f"model.llm={tmp_path / 'cut'}"), Options())
    assert "expected a whole safetensors file" in detail(found, "weights")
    config = json.loads((tmp_path / "cut/config.json").read_text())
    shutil.copy(Path(models["llm"]) / "model.safetensors", file)
    (tmp_path / "cut/config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "layer_types": None}))
    found = examine(recipe(f"model.llm={tmp_path / 'cut'}"), Options())
    assert status(found)["weights"] == "fail"
    assert "as its config.json says" in detail(found, "weights")


def test_a_template_without_targets_is_found(
    recipe: Callable[..., Recipe], models: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(models["llm"], tmp_path / "mute")
    (tmp_path / "mute/chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: ...\n{% endfor %}")
    found = examine(recipe(f"model.llm={tmp_path / 'mute'}"), Options())
    assert [name for name, value in status(found).items() if value == "fail"] == ["targets of instruct"]
    assert "no way to find" in detail(found, "targets of instruct")


def test_samples_longer_than_the_llm_has_positions_are_a_risk(
    recipe: Callable[..., Recipe], models: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(models["llm"], tmp_path / "short")
    config = json.loads((tmp_path / "short/config.json").read_text())
    (tmp_path / "short/config.json").write_text(json.dumps({**config, "max_position_embeddings": 20}))
    found = examine(recipe(f"model.llm={tmp_path / 'short'}"), Options())
    assert status(found)["targets of instruct"] == "warn"
    assert "expected samples of at most 20 tokens" in detail(found, "targets of instruct")


def test_a_decoder_that_cannot_be_counted_is_told_and_the_rest_estimated(
    recipe: Callable[..., Recipe], models: dict[str, str], tmp_path: Path
) -> None:
    """A mixture of experts in fp32: torch's grouped product is of bfloat16 alone on the meta device."""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path / "experts"
    shutil.copytree(models["llm"], folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    rows = json.loads((Path(models["llm"]) / "config.json").read_text())["vocab_size"]
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=rows, num_key_value_heads=2, num_local_experts=2, **small)
    MixtralForCausalLM(config).save_pretrained(folder)
    found = examine(recipe(f"model.llm={folder}"), Options())
    assert {name: value for name, value in status(found).items() if value != "ok"} == {"memory": "warn"}
    assert "what a mixtral keeps for the backward cannot be counted" in detail(found, "memory")
    assert found.stages["instruct"]["memory"][0]["weights_bytes"] > 4 * rows * 32


@pytest.mark.parametrize(("gib", "expected"), [(1000.0, "ok"), (0.001, "fail")], ids=["large", "small"])
def test_memory_is_compared_with_the_gpus_that_will_be_there(
    gib: float, expected: str, recipe: Callable[..., Recipe]
) -> None:
    found = examine(recipe("cluster.gpus_per_worker=1"), Options(gpu_bytes=int(gib * 2**30)))
    assert status(found)["memory"] == expected
    assert status(found)["cluster"] in ("skipped", "ok"), "not this machine's GPUs are meant"
    if expected == "fail":
        assert "lower stages.instruct.micro_batch_size" in detail(found, "memory")
        assert "set cmo.blind=live" in detail(found, "memory")


@pytest.mark.parametrize("attention", ["auto", "flex_attention"])
def test_eager_attention_on_gpus_is_told_where_nobody_asked_for_it(
    attention: str, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Gemma-2: its scores are soft-capped."""
    folder = tiny_models.make_llm(tmp_path / "llm", "gemma2")
    overrides = (f"model.llm={folder}", "cluster.gpus_per_worker=1", f"model.attention={attention}")
    text = detail(examine(recipe(*overrides), Options(gpu_bytes=80 * 2**30)), "memory")
    assert ("model.attention=flex_attention is fused" in text) == (attention == "auto")


# -- data


def test_samples_come_from_the_source_or_the_shards_and_are_the_same(source: LlavaData, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    before = data.look(store, section(source))
    assert (before.is_prepared, before.num_rows, before.num_looked_at) == (False, 40, 40)
    assert not (tmp_path / "store").exists()
    prepare(store, section(source), max_quarantined_fraction=0)
    after = data.look(store, section(source))
    assert (after.is_prepared, after.num_rows, after.digest) == (True, 40, before.digest)
    assert len(after.samples) == 16, "of one row group"
    assert all(sample in before.samples for sample in after.samples)
    assert before.size_bytes == pytest.approx(after.size_bytes, rel=0.5)
    assert data.look(None, section(source)).samples == before.samples
    assert data.look(None, section(source), ["c0", "c7"]).samples == [
        before.samples[i] for i in range(40) if i not in (0, 7)
    ]


def test_samples_that_are_passed_over_are_looked_up_where_data_is_prepared(
    source: LlavaData, recipe: Callable[..., Recipe]
) -> None:
    captions = f"{{source: {source.file}, images: {source.images}}}"
    made = recipe(f"data.pretrain={captions}")
    store = Store(made.store)

    def looked_up(*entries: str) -> Check:
        check = Check("data.skip_ids")
        changed = made.model_copy(update={"data": made.data.model_copy(update={"skip_ids": list(entries)})})
        sets = {name: data.look(store, getattr(made.data, name), entries) for name in ("pretrain", "instruct")}
        data.look_up_skipped(changed, store, sets, check)
        return check

    assert looked_up("c3", "no-such-sample").status == "skipped"
    digests = [
        prepare(store, getattr(made.data, name), max_quarantined_fraction=0).digest for name in ("pretrain", "instruct")
    ]
    assert looked_up("c3", f"{digests[0][:8]}:5").detail == "2 rows of data.pretrain"
    with pytest.raises(RecipeError, match=r"skip_ids.1: expected the id of a sample.*'no-such-sample', which none has"):
        looked_up("c3", "no-such-sample")
    every = {sample.id for sample in data.look(store, made.data.pretrain).samples}
    named = next(i for i in range(40) if f"c{i}" in every)
    left = data.look(store, made.data.pretrain, [f"{digests[0][:8]}:{named}", f"{digests[1][:8]}:{named}"]).samples
    assert {sample.id for sample in left} == every - {f"c{named}"}


def test_a_file_with_windows_line_ends_and_missing_images(source: LlavaData, tmp_path: Path) -> None:
    records = [
        {**record, "image": "gone.png"} if i % 4 == 1 else record for i, record in enumerate(source.samples.values())
    ]
    file = tmp_path / "crlf.json"
    file.write_bytes(json.dumps(records, indent=1).replace("\n", "\r\n").encode())
    looked = data.look(None, SourceSection(source=str(file), images=str(source.images)))
    assert (len(looked.samples), len(looked.rejected)) == (30, 10)
    check = Check("data")
    data.judge_unusable(looked, 0.01, check)
    assert check.status == "fail"
    assert "10 of 40 samples looked at cannot be used (image_missing: 10)" in check.detail
    assert "crlf.json#1: image_missing: expected an image at" in check.detail


@pytest.mark.parametrize(
    ("bad", "of", "num_rows", "expected"),
    [(0, 64, 10_000, "ok"), (1, 64, 10_000, "warn"), (3, 64, 10_000, "warn"), (4, 64, 10_000, "fail"),
     (1, 64, 64, "fail"), (1, 200, 200, "ok"), (64, 64, 10_000, "fail")],
)  # fmt: skip
def test_few_broken_samples_are_a_risk_and_many_a_failure(bad: int, of: int, num_rows: int, expected: str) -> None:
    looked = data.Looked("d", num_rows, False, [None] * (of - bad), [data.Rejected(None, "p#1", "r", "d")] * bad)  # type: ignore[list-item]
    check = Check("data")
    data.judge_unusable(looked, 0.01, check)
    assert check.status == expected


def test_what_is_imported_is_looked_at_and_what_nobody_needs_is_not_counted(
    recipe: Callable[..., Recipe], random_connector: Path, tmp_path: Path
) -> None:
    found = examine(recipe(f"stages.proxy_mllm.from={random_connector}"), Options())
    assert found.exit_code == 0, [check.to_dict() for check in found.checks if check.status != "ok"]
    assert list(found.stages) == ["instruct"]
    assert "is whole" in detail(found, "stages.proxy_mllm.from")
    found = examine(recipe(f"stages.proxy_llm.from={tmp_path}"), Options())
    assert list(found.stages) == ["proxy_mllm", "instruct"]
    assert "expected a PEFT adapter folder" in detail(found, "stages.proxy_llm.from")
    assert status(found)["bytes written"] == "ok"


# -- the main job's own part


def test_the_main_job_looks_ahead_where_something_is_to_be_made(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    made = recipe("cluster.workers=6")
    store = Store(made.store)
    plan = make_plan(made, store, make=False, report=lambda text: None)
    notes: list[str] = []
    job._look_ahead(plan, store, notes.append)
    assert [note.partition(":")[0] for note in notes] == ["proxy_llm", "proxy_mllm", "instruct"]
    assert all("found 2 workers that get none" in note for note in notes)
    assert not Path(made.store).exists(), "nothing is left of the probe"
    with pytest.raises(UserError, match="the store cannot write"):
        job._look_ahead(plan, Store("/proc/nowhere"), notes.append)


# -- the screen and the command


def test_targets_are_marked_in_colour_and_without_colours_in_brackets(recipe: Callable[..., Recipe]) -> None:
    found = examine(recipe(), Options(num_shown=1))
    (sample,) = found.stages["instruct"]["samples"]
    kinds = [kind for _, kind in sample["spans"]]
    assert {"target", "context", "image"} == set(kinds)
    plain, coloured = io.StringIO(), io.StringIO()
    screen.show(found, terminal(plain, 80))
    from rich.console import Console

    screen.show(found, Console(file=coloured, width=80, force_terminal=True, color_system="standard", markup=False))
    for text, kind in sample["spans"]:
        shown = text.replace("\n", "\\n")
        if kind == "target":
            assert f"[{shown}]" in plain.getvalue()
            assert f"\x1b[1;32m{shown}" in coloured.getvalue()
    assert "skipped" not in plain.getvalue()
    memory = plain.getvalue()[plain.getvalue().index("MiB a device") : plain.getvalue().index("  *: ")]
    checks = plain.getvalue()[plain.getvalue().index("check  ") :]
    assert max(map(len, (memory + checks).splitlines())) <= 80
    for row in memory.splitlines()[1:]:
        *parts, total, _ = map(float, row.replace("*", " ").split()[2:])
        assert sum(parts) == pytest.approx(total, abs=0.4), "the columns add up, but for rounding"


@pytest.mark.ci
@pytest.mark.parametrize("case", WRONG_TARGETS)
def test_what_ends_a_run_is_found_beforehand(
    case: str, tiny_llm: Callable, tiny_tower: Callable, captions: LlavaData, conversations: LlavaData, tmp_path: Path
) -> None:
    """The main job's own cases: a word of its message, and no check that is not of this failure fails."""
    right = make_recipe(
        tiny_llm("llama", bos=True, reserved="token", num_steps=1), tiny_tower("clip"), captions, conversations
    )
    wrong, words = WRONG_TARGETS[case](right, tmp_path)
    made = parse({**wrong, "name": "wrong", "store": str(tmp_path / "store")})
    found = examine(made, Options())
    (failed,) = [check for check in found.checks if check.status == "fail"]
    for word in words:
        assert re.search(word, failed.detail, re.IGNORECASE), failed.detail
    assert "nobody foresaw" not in failed.detail
    assert not (tmp_path / "store").exists()


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "jobs/doctor.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.ci
def test_the_command_on_the_embedded_default(tmp_path: Path) -> None:
    store = tmp_path / "store"
    done = doctor("--json", "--store", str(store), "--step-time", "0.5")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"checks", "stages"}
    assert {check["status"] for check in found["checks"]} == {"ok"}
    assert [stage["num_steps"] for stage in found["stages"]] == [40, 60, 400]
    assert found["stages"][2]["estimated_time_s"] == 200.0
    assert not store.exists()
    shown = doctor("cluster.gpus_per_worker=1", "--store", str(store))
    assert shown.returncode == 1
    assert "room for 1 worker" in shown.stdout
    assert "Traceback" not in shown.stdout + shown.stderr


@pytest.mark.ci
def test_wrong_recipes_and_arguments_exit_2(tmp_path: Path) -> None:
    for arguments in (["tiny", "stages.instruct.lrr=1", "method=dbo"], ["tiny", "--step-time", "fast"], ["no-such-recipe"],
                      ["tiny", "--gpu-memory", "-1"], ["tiny", "--store", "s3://a"]):  # fmt: skip
        done = doctor("--json", "--store", str(tmp_path / "store"), *arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        if "--gpu-memory" not in arguments:
            assert json.loads(done.stdout)["checks"][0]["status"] == "fail"
    assert not (tmp_path / "store").exists()
