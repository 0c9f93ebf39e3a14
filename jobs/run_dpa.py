"""The main job: three stages of DPA, from images in an object store to a model that transformers loads.

    python jobs/run_dpa.py [RECIPE] [key=value ...] [--dry-run] [--store URI] [--name NAME]

RECIPE is a YAML file or the name of one in jobs/recipes (default: tiny). Exit code 0: done; 1: failed; 2: the recipe or
the arguments are wrong, and nothing was started.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # a working directory that `ray job submit` brought is not installed
    sys.path.insert(0, str(ROOT))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="run_dpa.py",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", default="tiny", help="YAML file, or the name of one in jobs/recipes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. stages.instruct.lr=2e-5")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and the plan; start nothing")
    parser.add_argument(
        "--store", metavar="URI", help="folder, s3://bucket/prefix or gs://bucket/prefix (default: the recipe's)"
    )
    parser.add_argument("--name", help="name of the run (default: the recipe's, with a digest where it is overridden)")
    arguments = parser.parse_intermixed_args(argv)
    recipe_name, overrides = arguments.recipe, arguments.overrides
    if "=" in recipe_name and not Path(recipe_name).is_file():  # overrides of the default recipe
        recipe_name, overrides = "tiny", [recipe_name, *overrides]

    from dpa_ray.report.quiet import quiet_libraries

    quiet_libraries()
    from dpa_ray.credentials import without_credentials
    from dpa_ray.engine.stopping import heed_sigterm
    from dpa_ray.errors import UserError
    from dpa_ray.recipe import RecipeError, load

    heed_sigterm()
    try:
        recipe = load(recipe_name, overrides, name=arguments.name, store=arguments.store)
        if arguments.dry_run:
            from dpa_ray.engine.dry_run import dry_run

            dry_run(recipe)
        else:
            from dpa_ray.engine.job import run

            run(recipe)
    except RecipeError as err:
        print(f"error: {without_credentials(str(err))}", file=sys.stderr)
        return 2
    except UserError as err:
        print(f"error: {without_credentials(str(err))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "interrupted: finished stages and checkpoints are kept; the same command goes on from there",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    from dpa_ray.leaving import leave

    leave(code)
