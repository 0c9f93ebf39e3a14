"""How files of a model come from the hub to this machine: those that loading needs, at one commit, whatever the hub does."""

from __future__ import annotations

import functools
import glob
import json
import ssl
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is its HTTP client's, whichever that is
    FileMetadataError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    XetDownloadError,
)

from dpa_ray.data.retry import first_line, retried
from dpa_ray.errors import NoAnswer, Unreachable, UserError
from dpa_ray.model.vlm import ModelRef

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
"""Of the repository's top folder: configs, tokenizer, chat templates, the index of the weights."""
TEMPLATES = "additional_chat_templates/*.jinja"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What transformers looks for, in order; an index names its files."""
PROCESSORS = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
AGAIN = frozenset({408, 429})
CUT_SHORT = "Consistency check failed"
"""In what the hub's client says of a file that did not come whole."""

T = TypeVar("T")


def asked(call: Callable[[], T], where: str) -> T:
    """What `call`, which asks the hub, returns; in a `bridging` block tried again while the hub is away.

    Args:
        where: what is asked for, as messages begin ("model.llm ORG/NAME").
    Raises: NoAnswer where the hub does not answer or is too busy (UserError, after `data.retry_s` of tries); Unreachable
        where it is not to be asked; UserError where it refuses, or has no such thing.
    """

    def told() -> T:
        try:
            return call()
        except UserError:
            raise
        except (OSError, HTTPError, XetDownloadError, ValueError) as err:
            text = f"{where}: no such folder, and not to be had from the hub: "
            if passes(err):
                raise NoAnswer(f"{text}{_reason(err)}; check that {constants.ENDPOINT} can be reached") from err
            away = any(isinstance(e, LocalEntryNotFoundError | OfflineModeIsEnabled) for e in _chain(err))
            raise (Unreachable if away else UserError)(text + first_line(err)) from err

    return retried(told, where)


def passes(err: BaseException) -> bool:
    """Is `err`, or what it came of, about a hub that does not answer or is too busy, so that the same call may succeed later?

    Not of a repository that is not there or is gated, nor of a certificate that is not trusted, nor where HF_HUB_OFFLINE is set.
    """
    chain = list(_chain(err))
    if any(isinstance(e, OfflineModeIsEnabled | ssl.SSLCertVerificationError | FileMetadataError) for e in chain):
        return False
    statuses = [e.response.status_code for e in chain if isinstance(e, HfHubHTTPError) and e.response is not None]
    if statuses:
        return all(status in AGAIN or status >= 500 for status in statuses)
    return any(
        isinstance(e, HTTPError | ConnectionError | TimeoutError | XetDownloadError) or CUT_SHORT in str(e)
        for e in chain
    )


def _chain(err: BaseException) -> Iterator[BaseException]:
    """`err` and what it came of."""
    seen: set[int] = set()
    cause: BaseException | None = err
    while cause is not None and id(cause) not in seen:
        yield cause
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__


def _reason(err: BaseException) -> str:
    """The innermost of what happened, which says it (of the hub's own errors, its status)."""
    of_hub = [e for e in _chain(err) if isinstance(e, HfHubHTTPError)]
    cause = (
        of_hub[-1] if of_hub else [e for e in _chain(err) if isinstance(e, HTTPError | OSError | XetDownloadError)][-1]
    )
    return f"{type(cause).__name__}: {first_line(cause)}"


def here(ref: ModelRef, *, with_weights: bool) -> ModelRef:
    """`ref` with the folder on this machine that its files are in; a local folder as it is.

    Fetches what is absent: configs and tokenizer, and then (`with_weights`) the weights in one format; of what else is in
    the repository (other formats, subfolders) nothing. Nothing is asked for twice in a process.
    Raises: as `asked`.
    """
    if ref.revision is None or (ref.folder is not None and not with_weights):
        return ref
    return replace(ref, folder=_fetched(ref.location, ref.revision, with_weights, constants.HF_HUB_CACHE))


def there(ref: ModelRef, *, with_weights: bool) -> ModelRef:
    """The same after another process of this machine has fetched it: the hub is not asked where a config is found."""
    folder = _cached(ref.location, ref.revision) if ref.revision is not None else None
    return here(ref, with_weights=with_weights) if folder is None else replace(ref, folder=str(folder))


@functools.lru_cache(maxsize=16)
def _fetched(location: str, revision: str, with_weights: bool, _cache: str) -> str:
    where = f"model {location}"
    return str(asked(lambda: _fetch(location, revision, with_weights), where))


def _fetch(location: str, revision: str, with_weights: bool) -> Path:
    try:
        # the listing is asked for, not taken from what is there: a cache may have a part only
        names = HfApi().list_repo_files(location, revision=revision)
        small = [name for name in names if any(_is_like(name, pattern) for pattern in SMALL_FILES)]
        templates = [name for name in names if fnmatch(name, TEMPLATES)]
        # weights come last, so that who has them has the rest
        folder = _download(location, revision, [*small, *templates])
        if with_weights:
            folder = _download(location, revision, _weights(folder, location, names))
    except (OSError, HTTPError, XetDownloadError) as err:
        cached = _cached(location, revision)
        if cached is None or not _is_whole(cached, with_weights) or (_is_refusal(err)):
            raise
        return cached  # without a network, or while the hub is away
    return folder


def _is_refusal(err: BaseException) -> bool:
    """Does the hub say that this is not to be had? (A disk that is full says nothing of the hub either.)"""
    return not (passes(err) or any(isinstance(e, OfflineModeIsEnabled) for e in _chain(err)))


def _is_like(name: str, pattern: str) -> bool:
    return "/" not in name and fnmatch(name, pattern)


def _download(location: str, revision: str, names: list[str]) -> Path:
    patterns = [glob.escape(name) for name in names]
    return Path(snapshot_download(location, revision=revision, allow_patterns=patterns))


def _weights(folder: Path, location: str, names: list[str]) -> list[str]:
    """The files of the first format that there is. Raises: UserError where there is none."""
    for name in WEIGHTS:
        if name in names:
            return sorted(_indexed(folder / name)) if name.endswith(".index.json") else [name]
    raise UserError(f"model {location}: expected weights ({WEIGHTS[0]}), found none in the repository")


def _indexed(index: Path) -> set[str]:
    return {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}


def _cached(location: str, revision: str) -> Path | None:
    """The folder in the hub's cache on this machine, of a commit of which it has a config."""
    found = try_to_load_from_cache(location, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _is_whole(folder: Path, with_weights: bool) -> bool:
    """Can a model be loaded from it, as far as names tell?"""
    if not any((folder / name).is_file() for name in PROCESSORS):
        return False
    if not with_weights:
        return True
    first = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        return False
    return not first.endswith(".index.json") or all((folder / name).is_file() for name in _indexed(folder / first))
