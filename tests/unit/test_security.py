"""Can anything that is read from store, data, recipe or a model execute code, or a password be written down?"""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dpa_ray.credentials import has_credentials, without_credentials
from dpa_ray.data import files
from dpa_ray.errors import UserError
from dpa_ray.model.image_row import load_tokenizer
from dpa_ray.model.tower import tower_spec
from dpa_ray.model.vlm import ModelRef, load_llm_config
from dpa_ray.recipe import RecipeError, load
from dpa_ray.store import Store
from dpa_ray.store.s3_client import configure_endpoint

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted([*(ROOT / "dpa_ray").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")])

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle", "pty", "code"}
"""Reading with them, or starting them, runs what is read."""
CALLS = {"eval", "exec", "compile", "__import__", "input"}
ATTRIBUTES = {
    ("os", "system"), ("os", "popen"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("yaml", "load_all"),
    ("torch", "jit"), ("hub", "load"), ("builtins", "exec"), ("pd", "read_pickle"), ("runpy", "run_path"),
}  # fmt: skip
KNOWN_IMPORTS = {"package"}  # trackers.check: one of two names that stand in the code
"""Variables that `importlib.import_module` is called with."""


def offences(source: str) -> Iterator[str]:
    """Each place of a Python source that could execute what it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno}: imports {n}" for n in names if n.split(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        keywords = {k.arg: k.value for k in node.keywords}
        function = node.func
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        owner = ast.unparse(function.value).split(".")[-1] if isinstance(function, ast.Attribute) else ""
        where = f"{node.lineno}: {ast.unparse(node)[:80]}"
        if (isinstance(function, ast.Name) and name in CALLS) or (owner, name) in ATTRIBUTES:
            yield where
        if name == "load" and owner == "torch" and not _is(keywords.get("weights_only"), True):
            yield where
        if name == "load" and owner == "np" and "allow_pickle" in keywords:
            yield where
        if name == "load" and owner == "yaml" and "_Loader" not in [ast.unparse(a) for a in node.args[1:]]:
            yield where
        if "shell" in keywords and not _is(keywords["shell"], False):
            yield where
        if "trust_remote_code" in keywords and not _is(keywords["trust_remote_code"], False):
            yield where
        if name == "from_pretrained" and owner.startswith("Auto"):
            spread = any(k.arg is None and ast.unparse(k.value) == "ref.kwargs()" for k in node.keywords)
            if not spread and "trust_remote_code" not in keywords:
                yield where
        if name == "import_module" and ast.unparse(node.args[0]) not in KNOWN_IMPORTS:
            yield where


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_nothing_that_we_ship_executes_what_it_reads() -> None:
    assert len(SHIPPED) > 80
    found = [f"{path.relative_to(ROOT)}:{o}" for path in SHIPPED for o in offences(path.read_text())]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from cloudpickle import loads", "import os, marshal", "torch.load(f)", "eval(x)",
        "torch.load(f, weights_only=False)", "yaml.load(t, yaml.Loader)", "yaml.unsafe_load(t)", "exec(x)",
        "subprocess.run(c, shell=True)", "os.system(c)", "np.load(f, allow_pickle=True)", "__import__(n)",
        "AutoModel.from_pretrained(f)", "AutoConfig.from_pretrained(f, trust_remote_code=True)",
        "x.from_config(c, trust_remote_code=flag)", "importlib.import_module(name)", "torch.hub.load(r, m)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(line: str) -> None:
    assert len(list(offences(line))) == 1


def test_a_models_weights_are_pinned_and_its_code_is_not_run() -> None:
    assert ModelRef("x").kwargs()["trust_remote_code"] is False


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_code_that_comes_with_a_model_is_not_run_and_nobody_is_asked(
    file: str, llm_folder: Callable[..., Path], tiny_tower: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source = tiny_tower("clip") if file == "preprocessor_config.json" else llm_folder("llama")
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    marker = tmp_path / "it ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
    values = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    classes = (
        "AutoConfig",
        "AutoModelForCausalLM",
        "AutoTokenizer",
        "AutoImageProcessor",
        "AutoProcessor",
        "AutoModel",
    )
    values["auto_map"] = {c: ["evil.Evil", "evil.Evil"] if c == "AutoTokenizer" else "evil.Evil" for c in classes}
    for key, unknown in {"model_type": "evil", "tokenizer_class": "Evil", "image_processor_type": "Evil"}.items():
        if key in values:
            values[key] = unknown
    (folder / file).write_text(json.dumps(values))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    ref = ModelRef(str(folder))
    for read in (load_llm_config, load_tokenizer, lambda ref: tower_spec(ref, -2, None)):
        try:
            read(ref)
        except UserError as err:
            assert str(folder) in str(err)
    assert not marker.exists()


# -- passwords

SECRET = "hunter2-SECRET"
ADDRESSES = [
    f"https://me:{SECRET}@host/x",
    f"s3://KEY:{SECRET}@bucket/x",
    f"http://{SECRET}@host:80",
    f"a://:{SECRET}@h?q",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_password_in_an_address_is_refused_and_never_shown(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_credentials(address)
    assert SECRET not in without_credentials(f"at {address} and {address}")
    messages = []
    for key in (
        "store", "data.pretrain.source", "data.pretrain.images", "stages.proxy_llm.from", "model.llm",
        "trackers.mlflow.tracking_uri",
    ):  # fmt: skip
        with pytest.raises(RecipeError) as caught:
            load("tiny", [f"{key}={address}"])
        assert key in str(caught.value)
        assert "without user and password" in str(caught.value)
        messages.append(str(caught.value))
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    for call in (
        lambda: Store(address),
        configure_endpoint,
        lambda: Store("s3://bucket/x"),
        lambda: files.open_uri(address),
    ):
        with pytest.raises(UserError) as refused:
            call()
        messages.append(str(refused.value))
    assert not [m for m in messages if SECRET in m]


def test_an_override_that_is_wrong_shows_no_password() -> None:
    for override in (f"store https://me:{SECRET}@host", f"store=[https://me:{SECRET}@host"):
        with pytest.raises(RecipeError) as caught:
            load("tiny", [override])
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("address", ["s3://bucket/a@b", "/folder/a@b", "https://host/x?mail=a@b", "me@host", ""])
def test_other_places_of_an_at_sign_are_ordinary(address: str) -> None:
    assert not has_credentials(address)
    assert without_credentials(address) == address
