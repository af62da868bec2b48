"""`conformance`: runs the checks on a variant. `conformance_test`: the same as a test for pytest."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from saeforge.errors import ConfigError, PluginError
from saeforge.registry import VARIANTS, PluginRecord
from saeforge.testing import contract, gradients, latents, learning, numbers, pseudo, ranks, repeats, waits
from saeforge.testing.case import Case
from saeforge.testing.outcome import CheckFailed, LeftOut, Outcome, Report
from saeforge.variants import Variant

#: name -> check, in the order in which they run: a variant that fails an early one often fails the later ones for it.
CHECKS: dict[str, Callable[[Case], None]] = {
    "shapes": contract.shapes,
    "initialise": contract.initialise,
    "config": contract.config,
    "sparse_dense": gradients.sparse_dense,
    "finite_diff": gradients.finite_differences,
    "pseudo_grad": pseudo.pseudo_gradients,
    "fold": numbers.fold,
    "scale": numbers.scale,
    "row_weights": numbers.row_weights,
    "bf16": numbers.bf16,
    "host_waits": waits.host_waits,
    "determinism": repeats.determinism,
    "save_load": repeats.save_load,
    "ranks": ranks.ranks,
    "latents": latents.latents,
    "processes": ranks.processes,
    "learning": learning.learning,
}
#: Those that start no process and train nothing: together about a second for a variant.
QUICK = tuple(name for name in CHECKS if name not in ("processes", "learning"))


def conformance(
    variant: str | type[Variant],
    *,
    checks: Collection[str] = tuple(CHECKS),
    exempt: Mapping[str, str] | None = None,
    **options: Any,
) -> Report:
    """Runs the checks on a variant.

    Args:
        variant: entry-point name, class path, or class.
        checks: names of those to run, of `CHECKS`; `QUICK` are the cheap ones.
        exempt: check -> why this variant does not hold it; it is reported as left out. A class says the same for good
            in `exempt_checks`.
        options: of the variant, e.g. `k=4`; `d_sae` is 64 and `k` 4 unless given.

    Returns:
        The outcomes; nothing is raised for a check that fails, see `Report.raise_first`.

    Raises:
        ConfigError: unknown checks, or an exemption without a reason.
    """
    try:
        cls: type[Variant] = VARIANTS.load(variant) if isinstance(variant, str) else variant
    except PluginError as error:
        return Report(str(variant), "", (Outcome("load", "failed", str(error), 0.0, error),))
    exempt = {**cls.exempt_checks, **(exempt or {})}
    for name in (*checks, *exempt):
        if name not in CHECKS:
            raise ConfigError(f"unknown check {name!r}; there are {', '.join(CHECKS)}")
    if empty := [name for name, reason in exempt.items() if not reason.strip()]:
        raise ConfigError(f"check {empty[0]!r} is exempt without a reason; say why")
    record = VARIANTS.name_of(cls)
    outcomes = [Outcome("load", "passed")]
    try:
        case = Case(cls, dict(options), record)
    except Exception as error:  # a stranger's constructor, in any state
        message = f"{_who(record)}: it cannot be built: {_described(error)}; give options that fit d_sae = 64"
        return Report(record.name, record.origin, (*outcomes, Outcome("shapes", "failed", message, 0.0, error)))
    for name, check in CHECKS.items():
        if name in exempt:
            outcomes.append(Outcome(name, "left out", f"exempt: {exempt[name]}"))
        elif name in checks:
            outcomes.append(_run(name, check, case))
    return Report(record.name, record.origin, tuple(outcomes))


def _run(name: str, check: Callable[[Case], None], case: Case) -> Outcome:
    start = time.perf_counter()
    try:
        check(case)
    except LeftOut as reason:
        return Outcome(name, "left out", str(reason), time.perf_counter() - start)
    except CheckFailed as error:
        message = f"{_who(case.record)}: {name}: {error}"
        return Outcome(name, "failed", message, time.perf_counter() - start, error)
    except Exception as error:  # whatever a stranger's code raises is that variant's failure, not the kit's
        message = (
            f"{_who(case.record)}: {name}: it raised {_described(error)}; mend that; conformance_test shows all of it"
        )
        return Outcome(name, "failed", message, time.perf_counter() - start, error)
    return Outcome(name, "passed", "", time.perf_counter() - start)


def _who(record: PluginRecord) -> str:
    return f"variant {record.name!r} of {record.origin}"


def _described(error: Exception) -> str:
    """Type, message and the last line of code that is not torch's."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "torch" not in Path(frame.filename).parts]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def conformance_test(
    variant: str | type[Variant],
    *,
    checks: Collection[str] = tuple(CHECKS),
    exempt: Mapping[str, str] | None = None,
    **options: Any,
) -> Callable[[str], None]:
    """A test for pytest, one item for each check: `test_conformance = conformance_test(Mine, k=4)`.

    Arguments are those of `conformance`. A check that does not apply is reported as skipped, with the reason.
    """
    import pytest

    @pytest.mark.parametrize("check", [name for name in CHECKS if name in checks])
    def test(check: str) -> None:
        report = conformance(variant, checks=(check,), exempt=exempt, **options)
        report.raise_first()
        if report[check].status == "left out":
            pytest.skip(report[check].message)

    return test
