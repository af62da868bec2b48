"""Schedules are pure functions of the step: their values at the corners and in between."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeforge.schedules import ramp, warmup_then_decay


def test_ramp_rises_linearly_from_zero_and_stays_at_one() -> None:
    assert [ramp(step, 4) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert [ramp(step, 0) for step in range(3)] == [1.0, 1.0, 1.0]


def test_warmup_learns_from_its_first_step_and_decay_to_its_last() -> None:
    factors = [warmup_then_decay(step, 10, warmup_steps=4, decay_steps=3) for step in range(10)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 2 / 3, 1 / 3])


def test_without_warmup_or_decay_the_rate_is_constant() -> None:
    assert {warmup_then_decay(step, 7) for step in range(7)} == {1.0}


def test_after_the_run_the_rate_is_zero_not_negative() -> None:
    assert warmup_then_decay(10, 10, decay_steps=3) == 0.0
    assert warmup_then_decay(99, 10, decay_steps=3) == 0.0


@given(total=st.integers(1, 500), warmup=st.integers(0, 600), decay=st.integers(0, 600), step=st.integers(0, 499))
def test_the_factor_is_in_range_positive_during_the_run_and_the_smaller_of_its_two_ramps(
    total: int, warmup: int, decay: int, step: int
) -> None:
    step = min(step, total - 1)
    factor = warmup_then_decay(step, total, warmup_steps=warmup, decay_steps=decay)
    assert 0 < factor <= 1
    rising = (step + 1) / warmup if warmup else 1.0
    falling = (total - step) / decay if decay else 1.0
    assert factor == pytest.approx(min(1.0, rising, falling))
