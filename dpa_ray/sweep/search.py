"""Which point does trial number N try? Grid, random or Optuna's TPE; the answer follows from seed, number and results.

Nothing is kept between two questions, so that a sweep that was killed asks for the next trial as if it had not been.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from dpa_ray.recipe import RecipeError
from dpa_ray.recipe_stages import BOUNDS_ORDER
from dpa_ray.sweep.space import MAX_DRAWS, Domain, Point, Space, breaks_bounds, grid_points

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Tried:
    """What a search knows of an earlier trial; `value` is None where it failed, was stopped or is not over."""

    number: int
    point: Point
    value: float | None


class Search(Protocol):
    """`num_trials`: how many there are in all."""

    num_trials: int

    def propose(self, number: int, tried: Sequence[Tried]) -> Point:
        """The point of trial `number` (from 0), after what was tried."""


class Grid:
    """Every combination once."""

    def __init__(self, space: Space, num_trials: int | None = None):
        """Raises: RecipeError, as `grid_points`, or for domains that are no lists."""
        wrong = {key: domain.kind for key, domain in space.domains.items() if domain.kind != "grid"}
        if wrong:
            expected = "expected a grid (a list), as grid search tries every value"
            raise RecipeError(
                [
                    (key, f"{expected}, found {kind}; search random or optuna draws from it")
                    for key, kind in wrong.items()
                ],
                "space",
            )
        points, self.left_out = grid_points(space)
        assert not (space.points and self.left_out), "a comparison compares all that it names"
        self.points = points[:num_trials]
        self.num_trials = len(self.points)

    def propose(self, number: int, tried: Sequence[Tried]) -> Point:
        del tried
        return dict(self.points[number])


class Random:
    """Each point drawn on its own."""

    def __init__(self, space: Space, num_trials: int, seed: int = 0):
        """Raises: RecipeError where lower > upper everywhere."""
        self.space, self.num_trials, self.seed = space, num_trials, seed
        self.propose(0, [])

    def propose(self, number: int, tried: Sequence[Tried]) -> Point:
        del tried
        return self.space.draw(np.random.default_rng([self.seed, number]))


class Optuna:
    """Optuna's TPE (Bergstra et al. 2011): draws where the better trials are dense and the others are not."""

    def __init__(self, space: Space, num_trials: int, seed: int = 0, mode: Mode = "min"):
        """Raises: RecipeError where lower > upper everywhere."""
        self.space, self.num_trials, self.seed, self.mode = space, num_trials, seed, mode
        Random(space, num_trials, seed)
        self.distributions = {key: _distribution(domain) for key, domain in space.domains.items()}

    def propose(self, number: int, tried: Sequence[Tried]) -> Point:
        """Trials without a value count as running: the search keeps away from them, and learns nothing of them."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            digest = hashlib.sha256(f"{self.seed} {number}".encode()).digest()
            sampler = optuna.samplers.TPESampler(
                seed=int.from_bytes(digest[:4], "big"), multivariate=True, constant_liar=True
            )
        study = optuna.create_study(direction="maximize" if self.mode == "max" else "minimize", sampler=sampler)
        for trial in tried:
            study.add_trial(self._told(trial))
        for _ in range(MAX_DRAWS):
            asked = study.ask(self.distributions)
            point = {key: self._value(key, asked.params[key]) for key in self.distributions}
            if not breaks_bounds(self.space.recipe, point):
                return point
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
        raise RecipeError([("cmo", f"{BOUNDS_ORDER}, found lower > upper in each of {MAX_DRAWS} draws")], "space")

    def _told(self, trial: Tried) -> Any:
        import optuna

        states = optuna.trial.TrialState
        return optuna.trial.create_trial(
            state=states.RUNNING if trial.value is None else states.COMPLETE,
            value=trial.value,
            params={key: self._code(key, trial.point[key]) for key in self.distributions},
            distributions=self.distributions,
        )

    def _value(self, key: str, code: Any) -> Any:
        domain = self.space.domains[key]
        return domain.values[code] if domain.kind in ("grid", "choice") else code

    def _code(self, key: str, value: Any) -> Any:
        domain = self.space.domains[key]
        return domain.values.index(value) if domain.kind in ("grid", "choice") else value


def _distribution(domain: Domain) -> Any:
    """Values of a list go by their place in it: Optuna takes text and numbers only, and a list may hold lists."""
    from optuna import distributions

    if domain.kind in ("grid", "choice"):
        return distributions.CategoricalDistribution(list(range(len(domain.values))))
    low, high = domain.values
    if domain.kind == "randint":
        return distributions.IntDistribution(low, high)
    return distributions.FloatDistribution(float(low), float(high), log=domain.kind == "loguniform")
