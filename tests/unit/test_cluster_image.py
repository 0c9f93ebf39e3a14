"""Do the image, its lock and every file of cluster/ say the same, and hold no secret?"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import ray
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests import image
from tests.image import DOCKERFILE

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FILES = sorted(p for p in CLUSTER.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def locked() -> dict[str, str]:
    """Package -> version of the lock."""
    lines = (CLUSTER / "requirements.lock").read_text().splitlines()
    found = [re.match(r"([a-zA-Z0-9._-]+)==(\S+)", line) for line in lines]
    return {match[1].lower(): match[2] for match in found if match}


def installs() -> list[str]:
    """The Dockerfile's lines that install Python packages, each as one command."""
    whole = DOCKERFILE.replace("\\\n", " ")
    return [line.removeprefix("RUN ") for line in whole.splitlines() if line.startswith("RUN uv ")]


def test_the_lock_gives_what_the_package_asks_for() -> None:
    lock = locked()
    asked = [
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"]["wandb"],
        *PROJECT["optional-dependencies"]["mlflow"],
    ]
    extra = (CLUSTER / "requirements.in").read_text().splitlines()
    asked += [line.partition("#")[0] for line in extra if line.partition("#")[0].strip()]
    assert len(asked) > 15
    for text in asked:
        requirement = Requirement(text)
        assert requirement.specifier.contains(lock[requirement.name.lower()]), text


def test_ray_knows_its_settings_in_the_image_by_these_names() -> None:
    """It passes over one that it does not know, as after an upgrade that gave it another name."""
    programs = Path(ray.__file__).parent / "core/src/ray"
    text = b"".join((programs / name).read_bytes() for name in ("gcs/gcs_server", "raylet/raylet"))
    settings = image.ray_settings()
    assert len(settings) == 4
    assert [name for name in settings if name.removeprefix("RAY_").encode() not in text] == []


def test_every_package_of_the_lock_has_a_hash_and_no_index_is_named() -> None:
    text = (CLUSTER / "requirements.lock").read_text()
    packages = re.split(r"\n(?=[a-zA-Z0-9])", text.partition("make lock\n")[2])
    assert len(packages) == len(locked()) > 80
    for package in packages:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", package), package.splitlines()[0]
    assert not re.search(r"https?://|index-url|find-links|file:", text)


def test_every_file_names_the_versions_of_the_lock() -> None:
    lock = locked()
    python = re.search(r"uv venv --python (\d+\.\d+)\.\d+", DOCKERFILE)
    cuda = re.search(r"FROM nvidia/cuda:(\d+)\.(\d+)\.\d+-base", DOCKERFILE)
    assert python is not None
    assert cuda is not None
    tag = f"ray{lock['ray']}-py{python[1]}-cu{cuda[1]}{cuda[2]}"
    assert SpecifierSet(PROJECT["requires-python"]).contains(python[1])
    assert lock["nvidia-cuda-runtime"].startswith(f"{cuda[1]}.{cuda[2]}."), "the wheels' CUDA is the image's"
    tags, ray = set(), set()
    for file in [*FILES, ROOT / "Makefile"]:
        text = file.read_text(errors="replace")
        tags |= set(re.findall(r"ray\d+\.\d+\.\d+-py[\d.]+-cu\d+", text))
        ray |= set(re.findall(r"rayVersion: (\S+)", text))
    assert tags == {tag}
    assert ray == {lock["ray"]}
    makefile = (ROOT / "Makefile").read_text()
    assert f"--python-version {python[1]} " in makefile


def test_the_installed_ray_is_the_locks() -> None:
    import ray

    assert ray.__version__ == locked()["ray"], "the nodes' Ray and the one that talks to them are the same"


SECRETS = {
    "AWS access key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "Google key": r"\bAIza[\w-]{30,}|\"private_key\"|GOOG[A-Z0-9]{10,}",
    "private key": r"BEGIN [A-Z ]*PRIVATE KEY",
    "password in an address": r"://[^/\s:@]+:[^/\s@]+@",
    "value of a secret": r"(?i)(?:token|secret|password|access_key)(?:_id)?[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9+/_-]{16,}[\"']?\s*$",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_no_file_holds_a_secret(kind: str) -> None:
    for file in FILES:
        for line in file.read_text(errors="replace").splitlines():
            if "--hash=sha256:" not in line:
                assert not re.search(SECRETS[kind], line), f"{file}: {line}"


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("AWS access key", "  AWS_ACCESS_KEY_ID: AKIAABCDEFGHIJKLMNOP"),
        ("Hugging Face token", "--env=HF_TOKEN=hf_" + "a" * 34),
        ("password in an address", "redis://me:word@host"),
        ("value of a secret", 'auth_token: "0123456789abcdef0123456789abcdef"'),
    ],
)
def test_a_secret_would_be_found(kind: str, line: str) -> None:
    assert re.search(SECRETS[kind], line)


def test_dockerfile_is_linted() -> None:
    tool = Path(sys.executable).with_name("hadolint")
    found = subprocess.run(
        [tool, "--no-color", CLUSTER / "Dockerfile"], capture_output=True, text=True, check=False, timeout=60
    )
    assert (found.returncode, found.stdout) == (0, ""), found.stdout + found.stderr


def test_the_image_runs_as_a_user_and_says_whether_it_is_well() -> None:
    users = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)
    assert users == ["1000:1000"], "a number: Kubernetes cannot tell who a name is"
    assert re.search(r"^HEALTHCHECK ", DOCKERFILE, re.MULTILINE)
    assert "RAY_AUTH_MODE=token" in DOCKERFILE
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert all(re.search(r":\d+\.\d+\.\d+", base) for base in bases), "pinned"


def test_the_image_has_what_the_cluster_files_start() -> None:
    """Every path under /opt/dpa_ray is in the repository, and .dockerignore lets it in."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    for file in FILES:
        for path in re.findall(r"/opt/dpa_ray/([\w./-]+\w)", file.read_text(errors="replace")):
            assert (ROOT / path).exists(), f"{file}: {path}"
            assert f"!{path.partition('/')[0]}" in ignored
    assert os.access(CLUSTER / "kuberay/pre_stop.sh", os.X_OK)


@pytest.mark.full
def test_the_images_install_lines_run(tmp_path: Path) -> None:
    """In a fresh venv, from the package index (some GB of CUDA wheels); then the package imports and plans a recipe."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv installs the image's packages; pip install uv")
    work = tmp_path / "dpa_ray"
    for name in ("dpa_ray", "jobs", "cluster"):
        shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, work / name)
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("UV_", "PIP_", "PYTHON"))}
    venv = tmp_path / "venv"
    env = {
        **keep,
        "VIRTUAL_ENV": str(venv),
        "PATH": f"{venv}/bin:{os.environ['PATH']}",
        "UV_CACHE_DIR": str(tmp_path / "cache"),
    }
    commands = installs()
    assert len(commands) == 2
    for command in commands:
        here = re.sub(r"--python 3\.11\.\d+", "--python 3.11", command)  # whichever 3.11 this machine has
        done = subprocess.run(["bash", "-c", here], cwd=work, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    plan = [venv / "bin/python", "jobs/run_dpa.py", "tiny", "--dry-run", "--store", str(tmp_path / "store")]
    done = subprocess.run(plan, cwd=work, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    check = subprocess.run([uv, "pip", "check"], env=env, capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr
