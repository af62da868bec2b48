"""What a check says of a variant: passed, failed with a message, or left out with a reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from saeforge.errors import ConfigError

Status = Literal["passed", "failed", "left out"]
MARK: dict[Status, str] = {"passed": "✓", "failed": "✗", "left out": "–"}  # noqa: RUF001


class CheckFailed(AssertionError):
    """A variant does not hold what a check asks: what is wrong, where, and how to mend it, in one line."""


class LeftOut(Exception):
    """A check that says nothing about this variant, with the reason in one line."""


@dataclass(frozen=True)
class Outcome:
    """The result of one check.

    Attributes:
        check: its name.
        status: how it went.
        message: of a failed one, who (variant, distribution, class), what, and how to mend it; of one that was left
            out, why; else "".
        seconds: that it took.
        error: what was raised, of a failed one.
    """

    check: str
    status: Status
    message: str = ""
    seconds: float = 0.0
    error: Exception | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Report:
    """All outcomes of one variant.

    Attributes:
        variant: its name.
        origin: who ships it: `distribution version (module:Class)`.
        outcomes: in the order of the checks.
    """

    variant: str
    origin: str
    outcomes: tuple[Outcome, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """Those that failed."""
        return tuple(outcome for outcome in self.outcomes if outcome.status == "failed")

    def __getitem__(self, check: str) -> Outcome:
        for outcome in self.outcomes:
            if outcome.check == check:
                return outcome
        raise ConfigError(f"check {check!r} was not run; run were {', '.join(o.check for o in self.outcomes)}")

    def raise_first(self) -> None:
        """Raises what failed first, if something did.

        Raises:
            CheckFailed: with its message.
        """
        if self.failed:
            raise CheckFailed(self.failed[0].message) from self.failed[0].error

    def __str__(self) -> str:
        """One line for each check, with the messages."""
        lines = [f"{self.variant}, {self.origin}"]
        for outcome in self.outcomes:
            detail = f"  {outcome.message}" if outcome.message else ""
            lines.append(f"  {MARK[outcome.status]} {outcome.check:<17}{outcome.seconds:6.2f} s{detail}")
        return "\n".join(lines)
