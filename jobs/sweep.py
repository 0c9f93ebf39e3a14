"""Many runs that share what they can: a space of recipes by Ray Tune, or methods side by side over seeds.

    python jobs/sweep.py [RECIPE] [--space SPACE.yaml] [key=value ...] [--store URI] [--name NAME]
    python jobs/sweep.py [RECIPE] --compare M1,M2,... --seeds N [key=value ...]

RECIPE is a YAML file or the name of one in jobs/recipes (default: tiny). Without --space: LoRA rank by upper clamp bound,
around the recipe's, as far as its method uses them. The same command again goes on where the last one stopped. Exit code 0:
done (a failed trial is listed); 1: every trial failed, or it was interrupted, or its time budget ended before it; 2: the
recipe, the space or the arguments are wrong, and nothing was started.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # a working directory that `ray job submit` brought is not installed
    sys.path.insert(0, str(ROOT))


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    recipe_name, overrides = arguments.recipe, arguments.overrides
    if "=" in recipe_name and not Path(recipe_name).is_file():  # overrides of the default recipe
        recipe_name, overrides = "tiny", [recipe_name, *overrides]

    from dpa_ray.report.quiet import quiet_libraries

    quiet_libraries()
    from dpa_ray.credentials import without_credentials
    from dpa_ray.errors import UserError
    from dpa_ray.recipe import RecipeError, load

    try:
        recipe = load(recipe_name, overrides, store=arguments.store)
        from dpa_ray.sweep.main import Options, run

        return run(
            recipe,
            Options(
                name=arguments.name, space=arguments.space, compare=tuple(filter(None, arguments.compare.split(","))),
                seeds=arguments.seeds, search=arguments.search, trials=arguments.trials, metric=arguments.metric,
                time_budget_s=arguments.time_budget, max_concurrent=arguments.max_concurrent,
            ),
        )  # fmt: skip
    except RecipeError as err:
        print(f"error: {without_credentials(str(err))}", file=sys.stderr)
        return 2
    except UserError as err:
        print(f"error: {without_credentials(str(err))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept; the same command goes on from there", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sweep.py",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", default="tiny", help="YAML file, or the name of one in jobs/recipes")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of every trial, e.g. stages.instruct.lr=2e-5"
    )
    parser.add_argument(
        "--space", type=Path, metavar="YAML", help="recipe keys and their values (default: rank by bound)"
    )
    parser.add_argument(
        "--compare", default="", metavar="M1,M2", help="methods side by side; vanilla is what they meet"
    )
    parser.add_argument(
        "--seeds", type=_positive, default=5, help="of --compare: so many, from the recipe's (default: 5)"
    )
    parser.add_argument(
        "--store", metavar="URI", help="folder, s3://bucket/prefix or gs://bucket/prefix (default: the recipe's)"
    )
    parser.add_argument(
        "--name",
        help="of the sweep (default: RECIPE-SPACE, or RECIPE-SPACE-SEARCH where that is not grid, or RECIPE-compare-DIGEST); "
        "a trial's run is NAME-0000, NAME-0001, ...",
    )
    parser.add_argument(
        "--search", choices=("grid", "random", "optuna"), help="default: grid, where all keys are lists"
    )
    parser.add_argument("--trials", type=_positive, help="how many, of a grid at most")
    parser.add_argument("--time-budget", type=_positive, metavar="SECONDS", help="stop then; start again to go on")
    parser.add_argument("--max-concurrent", type=_positive, metavar="N", help="trials at once (default: what has room)")
    parser.add_argument("--metric", metavar="NAME", help="what trials are judged by, e.g. eval.heldout.accuracy")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number > 0, found {text}")
    return int(text)


if __name__ == "__main__":
    code = main()
    from dpa_ray.leaving import leave

    leave(code)
