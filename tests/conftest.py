"""Shared fixtures: tiny models and data, each made once a session, one trained run, and real S3 servers."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny models are slower on two threads than on one

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dpa_ray.leaving import leave
from tests.gcs import fake_gcs, gcs_host  # noqa: F401 (fixtures)
from tests.s3 import ceph_s3, ceph_server, rclone_s3, rclone_server, s3_server  # noqa: F401 (fixtures)

if TYPE_CHECKING:  # torch and transformers are imported in the fixtures: most unit tests do not want to wait for them
    from tests.integration.runs import Run
    from tests.real_assets import RealAssets
    from tests.tiny_models import LlavaData


EXIT_CODE = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[EXIT_CODE] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """The tests' verdict is not for threads to decide that Ray leaves behind: see `leave`."""
    if EXIT_CODE in config.stash:
        leave(config.stash[EXIT_CODE])


@pytest.fixture(scope="session")
def assets_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for everything that the session makes."""
    return tmp_path_factory.mktemp("assets")


def _made_once(assets_dir: Path, make: Callable[..., Path]) -> Callable[..., Path]:
    def get(kind: str, **options: Any) -> Path:
        folder = assets_dir / "-".join([make.__name__, kind, *(f"{k}={v}" for k, v in sorted(options.items()))])
        return folder if folder.exists() else make(folder, kind, **options)

    return get


@pytest.fixture(scope="session")
def tiny_llm(assets_dir: Path) -> Callable[..., Path]:
    """`tiny_llm(family, bos=..., ...)`: a folder of `tiny_models.make_llm`, made once for the same arguments."""
    from tests import tiny_models

    return _made_once(assets_dir, tiny_models.make_llm)


@pytest.fixture(scope="session")
def tiny_tower(assets_dir: Path) -> Callable[..., Path]:
    """`tiny_tower(kind, ...)`: a folder of `tiny_models.make_tower`, made once for the same arguments."""
    from tests import tiny_models

    return _made_once(assets_dir, tiny_models.make_tower)


@pytest.fixture(scope="session")
def captions(assets_dir: Path) -> LlavaData:
    """14 image-caption pairs, two of them without an image: three steps of 4 and a last one of 2."""
    from tests import tiny_models

    return tiny_models.make_captions(assets_dir / "captions", 14, text_only=(3, 8))


@pytest.fixture(scope="session")
def conversations(assets_dir: Path) -> LlavaData:
    """14 conversations: two without an image, one with two images, one whose answer `max_length` 150 cuts off."""
    from tests import tiny_models

    return tiny_models.make_conversations(
        assets_dir / "conversations", 14, text_only=(2, 9), several_images=(5,), no_target=(11,)
    )


@pytest.fixture(scope="session")
def random_connector(assets_dir: Path) -> Path:
    """A connector file between the tiny towers (width 32) and the tiny LLMs (width 48)."""
    from safetensors.torch import save_file
    from torch import nn

    layers = {"linear_1": nn.Linear(32, 48), "linear_2": nn.Linear(48, 48)}
    state = {f"{name}.{k}": v.detach() for name, layer in layers.items() for k, v in layer.state_dict().items()}
    save_file(state, assets_dir / "connector.safetensors")
    return assets_dir / "connector.safetensors"


@pytest.fixture(scope="session")
def measured(
    assets_dir: Path,
    tiny_llm: Callable[..., Path],
    tiny_tower: Callable[..., Path],
    captions: LlavaData,
    conversations: LlavaData,
) -> Run:
    """A finished DPA run of a Llama with BOS behind a CLIP tower: the proxy trains, stages 2 and 3 only measure (lr 0).

    The default tests of parity, reuse, base weights and result all look at this one run. Leave it as it is.
    """
    from tests.integration.runs import make_recipe, run_dpa

    llm, vision = tiny_llm("llama", bos=True, reserved="token"), tiny_tower("clip")
    run = run_dpa(make_recipe(llm, vision, captions, conversations, method="dpa"), assets_dir / "measured", "measured")
    assert run.returncode == 0, run.output
    return run


@pytest.fixture(scope="session")
def real() -> RealAssets:
    """Real small weights and data, made out of packages once a machine."""
    from tests import real_assets

    return real_assets.ensure()
