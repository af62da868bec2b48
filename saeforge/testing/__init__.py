"""The conformance kit: what saeforge asks of every variant, as named checks (docs/conformance.md).

A plugin's tests need three lines:

    from my_package import Mine
    from saeforge.testing import conformance_test
    test_conformance = conformance_test(Mine, k=4)
"""

from saeforge.testing.kit import CHECKS, QUICK, conformance, conformance_test
from saeforge.testing.outcome import MARK, CheckFailed, Outcome, Report
from saeforge.testing.waits import NoWaiting

__all__ = [
    "CHECKS",
    "MARK",
    "QUICK",
    "CheckFailed",
    "NoWaiting",
    "Outcome",
    "Report",
    "conformance",
    "conformance_test",
]
