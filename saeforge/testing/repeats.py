"""The same run again, in the same process or from what was saved, is the same to the bit."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from saeforge.optim import RowAdam
from saeforge.registry import VARIANTS
from saeforge.sae import SAE
from saeforge.testing.case import Case
from saeforge.testing.outcome import CheckFailed
from saeforge.variants import Variant

STEPS = 4
ROWS = 256
THREADS = (1, 3)  # not a divisor of the rows


def determinism(case: Case) -> None:
    """Two runs of the same steps have the same bits, under any global seed and number of threads."""
    first = _trained(case, seed=1, threads=THREADS[0]).state_dict()
    for seed, threads in ((1, THREADS[0]), (2, THREADS[0]), *((1, threads) for threads in THREADS[1:])):
        again = _trained(case, seed=seed, threads=threads).state_dict()
        for name, value in first.items():
            if not torch.equal(value, again[name]):
                cause = (
                    "when run again; draw random numbers from a generator seeded by self.observed(), in a fixed order"
                )
                if threads != THREADS[0]:
                    cause = f"with {threads} threads instead of one; sum in an order that does not depend on them"
                raise CheckFailed(f"after {STEPS} equal steps {name} has other bits {cause}")


def save_load(case: Case) -> None:
    """A loaded variant goes on to the bit, and its folded SAE saves and loads to the bit."""
    variant = _trained(case, seed=1, threads=None)
    buffer = io.BytesIO()
    torch.save(variant.state_dict(), buffer)
    buffer.seek(0)
    loaded = case.cls(variant.d_in, variant.d_out, **case.options)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    loaded.bind(variant.run)
    batch = case.batch(dtype=torch.float32)
    one, other = (case.evaluated(each, batch, step=STEPS) for each in (variant, loaded))
    for kind, a, b in (("term", one.terms, other.terms), ("the gradient of", one.gradients, other.gradients)):
        for name in a:
            if not torch.equal(a[name], b[name]):
                raise CheckFailed(
                    f"after save and load {kind} {name} differs; what `step` remembers must be a parameter or a "
                    "registered buffer (register_buffer), not a plain attribute"
                )
    with _named(case), tempfile.TemporaryDirectory() as folder:
        sae = variant.fold()
        again = SAE.load(sae.save(Path(folder) / "sae"))
        if not torch.equal(sae(batch.x), again(batch.x)):
            raise CheckFailed("the folded SAE reconstructs otherwise once saved and loaded; register what it needs")


def _named(case: Case) -> AbstractContextManager[object]:
    """A name for the class while it lasts: an SAE that keeps its variant is loaded by name."""
    known = any(record.class_path == case.record.class_path for record in VARIANTS.records())
    return nullcontext() if known else VARIANTS.register("conformance-case", case.cls)


def _trained(case: Case, *, seed: int, threads: int | None) -> Variant:
    """Some steps from the start, as in training, on one number of threads."""
    state = torch.get_rng_state()
    with _threads(threads):
        try:
            torch.manual_seed(seed)
            variant = case.initialised()
            optimizer = RowAdam(variant.param_groups(), lr=1e-3)
            for step in range(STEPS):
                optimizer.zero_grad()
                _loss(case, variant, step).backward()
                optimizer.step()
        finally:
            torch.set_rng_state(state)
    return variant


def _loss(case: Case, variant: Variant, step: int) -> Tensor:
    batch = case.batch(ROWS, seed=40 + step, dtype=torch.float32)
    out = variant.step(batch, case.schedule(variant, step))
    variant.observe(out.code)
    return torch.stack(list(out.terms.values())).sum()


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
