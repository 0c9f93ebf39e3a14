"""What did each check find? Every one goes on although another failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from dpa_ray.credentials import without_credentials
from dpa_ray.errors import UserError
from dpa_ray.recipe import RecipeError

Status = Literal["ok", "warn", "fail", "skipped"]
WORST_FIRST: tuple[Status, ...] = ("fail", "warn", "ok", "skipped")


@dataclass
class Check:
    """One check. Notes are facts; what is wrong says what was expected, what was found and what to do. Of no text is a
    user or password in an address kept."""

    name: str
    status: Status = "ok"
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)  # plain JSON, for programs

    def note(self, text: str) -> None:
        self.notes.append(without_credentials(text))

    def warn(self, text: str) -> None:
        """Something is at risk."""
        self.warnings.append(without_credentials(text))
        if self.status != "fail":
            self.status = "warn"

    def fail(self, text: str) -> None:
        """Something will fail."""
        self.failures.append(without_credentials(text))
        self.status = "fail"

    def skip(self, text: str) -> None:
        """It could not be looked at; `text` says why."""
        self.note(text)
        self.status = "skipped"

    @property
    def detail(self) -> str:
        """All that was found, the worst first."""
        return "\n".join([*self.failures, *self.warnings, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "status": self.status, "detail": self.detail, **self.values}


@dataclass
class Findings:
    """All checks in their order, and what is known of each stage by name."""

    checks: list[Check] = field(default_factory=list)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @contextmanager
    def check(self, name: str) -> Iterator[Check]:
        """A check under way; an error that the block raises for the user is what it found, and does not leave it."""
        check = Check(name)
        self.checks.append(check)
        try:
            yield check
        except (UserError, RecipeError) as err:
            check.fail(str(err))
        except Exception as err:  # of transformers, say: whoever asked wants to know what else there is
            first = (str(err).strip().splitlines() or [""])[0]
            check.fail(f"{name}: expected no error, found one that nobody foresaw, {type(err).__name__}: {first}")

    def skip(self, name: str, why: str) -> None:
        self.checks.append(Check(name))
        self.checks[-1].skip(why)

    def stage(self, name: str) -> dict[str, Any]:
        """The values of a stage, to be added to."""
        return self.stages.setdefault(name, {"stage": name})

    @property
    def exit_code(self) -> int:
        """0 where all is well, 1 where something will fail or is at risk."""
        return int(any(check.status in ("fail", "warn") for check in self.checks))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"checks": [check.to_dict() for check in self.checks], "stages": list(self.stages.values())}


def number(count: int, noun: str) -> str:
    """`1 step`, `2,000 steps`."""
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"
