"""Prepare a source: check every sample, and write what can be used as shards into the store.

    python jobs/prepare_data.py SOURCE --store URI [--format llava|webdataset|parquet] [--images URI]
    python jobs/prepare_data.py 's3://bucket/cc3m-{0000..0331}.tar' --store URI --take first:10000
    python jobs/prepare_data.py train.parquet --store URI --column image=picture --column text=description
    python jobs/prepare_data.py mixture.yaml --store URI --images URI
    python jobs/prepare_data.py builtin:shapes --store URI [--option style=qa --option size=8000 --option seed=1]

A run does the same on first use, and then finds the data prepared. Exit 0 done, 1 failed, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # a working directory that `ray job submit` brought is not installed
    sys.path.insert(0, str(ROOT))

from dpa_ray.data.prepare import prepare  # noqa: E402
from dpa_ray.errors import UserError  # noqa: E402
from dpa_ray.recipe import DEFAULT_RETRY_S, DEFAULT_STORE, RecipeError, SourceSection, absolute_store  # noqa: E402
from dpa_ray.recipe_errors import key_path, message  # noqa: E402
from dpa_ray.recipe_yaml import from_yaml  # noqa: E402
from dpa_ray.store.fs import Store  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Check a source and write it as shards into the store.",
        epilog="Exit 0 done, 1 failed, 2 wrong arguments.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="local path, s3:// or gs:// URI of a file, of tars and Parquet also of a folder, glob or {00..12} pattern; "
        "a .yaml mixture; or builtin:shapes",
    )
    parser.add_argument(
        "--store",
        metavar="URI",
        default=DEFAULT_STORE,
        help="folder, s3://bucket/prefix or gs://bucket/prefix (default: %(default)s)",
    )
    parser.add_argument("--format", choices=["llava", "webdataset", "parquet"], help="default: by the file's name")
    parser.add_argument("--images", metavar="URI", help="folder of the images; default: the source's own")
    parser.add_argument(
        "--column",
        metavar="KEY=NAME",
        action="append",
        default=[],
        help="image, text, prompt, conversations or id: the column of a Parquet file, or what it is in a tar",
    )
    parser.add_argument("--take", metavar="HOW", help="first:N, last:N or random:N of the rows; N or a percentage")
    parser.add_argument("--option", metavar="KEY=VALUE", action="append", default=[], help="of builtin:shapes")
    parser.add_argument("--max-quarantined-fraction", metavar="F", type=float, default=0.01, help="default: 0.01")
    parser.add_argument(
        "--retry-s",
        metavar="S",
        type=float,
        default=DEFAULT_RETRY_S,
        help="how long an S3 outage may last before this gives up (a recipe's data.retry_s); default: %(default)g",
    )
    arguments = parser.parse_args(argv)
    try:
        section, store = _section(arguments), _store(arguments)
    except RecipeError as err:
        for place, text in err.errors:
            print(f"{place}: {text}", file=sys.stderr)
        return 2
    if not 0 <= arguments.max_quarantined_fraction <= 1:
        found = arguments.max_quarantined_fraction
        print(f"--max-quarantined-fraction: expected 0 to 1, found {found}", file=sys.stderr)
        return 2
    if not arguments.retry_s >= 0:
        print(f"--retry-s: expected 0 or more, found {arguments.retry_s}", file=sys.stderr)
        return 2
    try:
        _prepare(arguments, section, store)
    except UserError as err:
        print(err, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 1
    return 0


def _section(arguments: argparse.Namespace) -> SourceSection:
    """Raises: RecipeError, by what the user typed."""
    columns, wrong_columns = _pairs("--column", arguments.column)
    texts, wrong_options = _pairs("--option", arguments.option)
    errors, options = [*wrong_columns, *wrong_options], {}
    for key, text in texts.items():
        try:
            options[key] = from_yaml(text)
        except ValueError as err:
            errors.append((f"--option {key}", f"expected a YAML value, found {text!r}: {err}"))
    if errors:
        raise RecipeError(errors)
    values: dict[str, Any] = {
        "source": arguments.source,
        "images": arguments.images,
        "format": arguments.format,
        "columns": columns or None,
        "options": options or None,
    }
    if arguments.take is not None:
        values = {"source": [{**values, "take": arguments.take}]}
    try:
        return SourceSection.model_validate(values)
    except ValidationError as err:
        found = [(_typed(key_path(e["loc"])), message(e, SourceSection)) for e in err.errors(include_url=False)]
        raise RecipeError(found) from None


def _pairs(flag: str, texts: list[str]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """What KEY=VALUE arguments say, and what is wrong with them."""
    found = {key: value for key, _, value in (text.partition("=") for text in texts)}
    return found, [(flag, f"expected KEY=VALUE, found {text!r}") for text in texts if "=" not in text]


def _typed(path: str) -> str:
    """A key path of the section as the argument that it came from."""
    path = path.removeprefix("source.0").removeprefix(".")
    for section, flag in (("columns.", "--column "), ("options.", "--option ")):
        if path.startswith(section):
            return flag + path.removeprefix(section)
    return f"--{path}" if path in ("images", "format", "take") else "SOURCE"


def _store(arguments: argparse.Namespace) -> str:
    """Raises: RecipeError."""
    try:
        return absolute_store(arguments.store)
    except ValueError as err:
        raise RecipeError([("--store", str(err))]) from None


def _prepare(arguments: argparse.Namespace, section: SourceSection, uri: str) -> None:
    store = Store(uri)
    store.check()
    prepared = prepare(
        store,
        section,
        max_quarantined_fraction=arguments.max_quarantined_fraction,
        report=lambda message: print(message, file=sys.stderr, flush=True),
        ray_is_ready=_start_ray,
        retry_s=arguments.retry_s,
        limit_name="--max-quarantined-fraction",
    )
    print(store.url(prepared.path))


def _start_ray() -> bool:
    """The cluster that RAY_ADDRESS names (`ray job submit` sets it), else Ray on this machine; for large sources."""
    import ray

    from dpa_ray.data.ray_tasks import RETRY_ENVIRONMENT

    for name, value in RETRY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nobody else is to reach it
    quiet = {"log_to_driver": False, "configure_logging": False}
    if address:
        ray.init(address=address, **quiet)
    else:
        ray.init(address="local", include_dashboard=False, **quiet)
    return True


if __name__ == "__main__":
    code = main()
    from dpa_ray.leaving import leave

    leave(code)
