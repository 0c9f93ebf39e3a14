"""The `--plan` of jobs/doctor.py: from what it is told to what it prints."""

from __future__ import annotations

import json

from dpa_ray.doctor.plan import control, estimate, options, screen
from dpa_ray.recipe import Recipe

COSTS = control.Costs(
    board_call_s=310e-6,
    poll_s=170e-6,
    gcs_task_s=17e-6,
    origin="measured on a machine with 2 busy cores; --measure does it here",
)


def run(recipe: Recipe, stages: tuple[str, ...], given: options.PlanOptions, *, measure: bool, as_json: bool) -> None:
    """Make the plan and print it. Raises: UserError."""
    costs = COSTS
    if measure:
        from dpa_ray.doctor.plan.measure import measure as measured  # starts Ray

        costs = measured()
    plan = estimate.make_plan(recipe, stages, given, costs)
    if as_json:
        print(json.dumps(plan.to_dict(), indent=1, ensure_ascii=False))
    else:
        screen.show(plan)
