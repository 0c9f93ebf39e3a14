"""What will fail or is at risk, before a GPU is billed: on one CPU, in seconds, starting nothing.

    python jobs/doctor.py [RECIPE] [key=value ...] [--json] [--store URI] [--name NAME] [--step-time SECONDS]
                          [--gpu-memory GIB] [--samples N]
    python jobs/doctor.py [RECIPE] [key=value ...] --plan [--gpus 1,8,64] [--step-time STAGE=SECONDS@GPUS] ...

RECIPE is a YAML file or the name of one in jobs/recipes (default: tiny). It looks at the recipe, the store (a probe is
written and deleted), trackers, models, data, batches, memory and the cluster that RAY_ADDRESS names; with --plan it works
out steps, hours and bytes on so many GPUs instead. Exit code 0: all is well; 1: something will fail or is at risk; 2: the
recipe or the arguments are wrong.
"""

from __future__ import annotations

import argparse
import json
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

    def wrong(name: str, err: Exception) -> int:
        text = without_credentials(str(err))
        if arguments.json:
            found = {"name": name, "status": "fail", "detail": text}
            print(json.dumps({"checks": [found], "stages": []}, indent=1, ensure_ascii=False))
        print(f"error: {text}", file=sys.stderr)
        return 2

    try:
        recipe = load(recipe_name, overrides, name=arguments.name, store=arguments.store)
        from dpa_ray.doctor import examine, screen
        from dpa_ray.doctor.cost import given_step_times
        from dpa_ray.doctor.plan.arguments import read, refuse_without_plan

        refuse_without_plan(arguments)
        stages = examine.training_stages(recipe)
        if arguments.plan:
            from dpa_ray.doctor.plan import command

            command.run(recipe, stages, read(arguments, stages), measure=arguments.measure, as_json=arguments.json)
            return 0
        num_shown = _one_natural(arguments.samples)
        given = given_step_times(arguments.step_time, stages)
        options = examine.Options(given, int(arguments.gpu_memory * 2**30), num_shown)
    except (RecipeError, ValueError) as err:
        return wrong("recipe", err)
    except UserError as err:  # of a plan: something cannot be known
        return wrong("plan", err)
    except KeyboardInterrupt:
        return _interrupted()
    try:
        findings = examine.examine(recipe, options)
    except UserError as err:  # no check leaves one: the store cannot be opened at all
        return wrong("store", err)
    except KeyboardInterrupt:
        return _interrupted()
    if arguments.json:
        print(json.dumps(findings.to_dict(), indent=1, ensure_ascii=False))
    else:
        screen.show(findings)
    return findings.exit_code


def _interrupted() -> int:
    print("interrupted: nothing was started", file=sys.stderr)
    return 1


def _one_natural(texts: list[str]) -> int:
    """The last of `--samples`, of which there are 2 by default. Raises: ValueError."""
    text = texts[-1] if texts else "2"
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"--samples: expected a number of samples, found {text!r} (STAGE=N goes with --plan)")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    from dpa_ray.doctor.plan.arguments import add_arguments, positive

    parser = argparse.ArgumentParser(
        prog="doctor.py",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", default="tiny", help="YAML file, or the name of one in jobs/recipes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. stages.instruct.lr=2e-5")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument(
        "--store", metavar="URI", help="folder, s3://bucket/prefix or gs://bucket/prefix (default: the recipe's)"
    )
    parser.add_argument("--name", help="name of the run (default: the recipe's, with a digest where it is overridden)")
    parser.add_argument(
        "--step-time", action="append", default=[], metavar="[STAGE=]SECONDS[@GPUS]",
        help="of an optimizer step, for the estimated time (default: an earlier run's in the store); @GPUS with --plan",
    )  # fmt: skip
    parser.add_argument(
        "--gpu-memory", type=positive, default=0.0, metavar="GIB", help="of GPUs that are not there yet"
    )
    parser.add_argument(
        "--samples", action="append", default=[], metavar="N",
        help="real samples shown of each stage (default: 2); with --plan [STAGE=]N, samples of its data",
    )  # fmt: skip
    add_arguments(parser)
    return parser


if __name__ == "__main__":
    code = main()
    from dpa_ray.leaving import leave

    leave(code)
