"""Where does the time of one training step go? A table by part of the step, and one by operator.

    python scripts/profile_step.py                                        (topk, bf16, the sizes of bench_step.py)
    python scripts/profile_step.py --variant gated --precision fp32 --d_in 384 --d_sae 6144

Own times of torch.profiler's events over `--steps` steps after a warm-up, at the step that bench_step.py measures. A
part is told from the operator and from where it ran (forward, backward, optimizer, bookkeeping); code that knows better
marks itself with `torch.profiler.record_function("part: NAME")`, and the innermost mark wins. Profiling itself costs
some microseconds an event; the last line compares with the same steps unprofiled.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from bench_step import Setting, write_data
from bench_step_worker import INITIAL_ROWS, build
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

MARK = "part: "
#: First match wins: where it ran, what the operator is called, the part.
PARTS: tuple[tuple[str, str, str], ...] = (
    ("forward", r"mm$|addmm|linear|mv$|matmul", "encoder product"),
    ("forward", r"embedding_bag", "decode"),
    ("forward", r"topk|sort|nonzero|gather|cumsum|cat$|bincount|repeat_interleave|scatter|gt$|ge$|select", "select"),
    ("forward", r"_to_copy|copy_|empty", "copies and casts"),
    ("backward", r"per_sample_weights_backward|row_dots", "backward values"),
    ("backward", r"embedding_bag|sort|bincount|cumsum|repeat_interleave|index$|scatter_outer", "weight gradients"),
)


class Event(Protocol):
    """What is needed of torch.profiler's FunctionEvent."""

    name: str
    cpu_parent: Event | None
    self_cpu_time_total: float


def part_of(event: Event) -> str:
    """The part of the step that an event's own time belongs to; "outside" if it is in no marked part."""
    mark, above = "", event
    while True:
        if above.name.startswith(MARK):
            mark = above.name.removeprefix(MARK)
            break
        if above.cpu_parent is None:
            return "outside"
        above = above.cpu_parent
    if mark not in ("forward", "backward"):
        return mark
    for where, pattern, part in PARTS:
        if where == mark and re.search(pattern, event.name):
            return part
    return f"{mark}, the rest"


def by_part(events: Iterable[Event]) -> dict[str, float]:
    """Microseconds of each part, longest first."""
    return _sums((part_of(event), event.self_cpu_time_total) for event in events)


def by_operator(events: Iterable[Event]) -> dict[str, float]:
    """Microseconds of each operator, with its part, longest first; marks count as Python between operators."""
    return _sums(
        (
            f"{'python' if event.name.startswith(MARK) else event.name} ({part_of(event)})",
            event.self_cpu_time_total,
        )
        for event in events
    )


def _sums(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for name, value in pairs:
        sums[name] += value
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function inside a mark."""

    def inner(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"{MARK}{name}"):
            return function(*args, **kwargs)

    return inner


def steps_of(setting: Setting, precision: str, data: Tensor) -> Callable[[int], None]:
    """A function that takes so many steps of ours, with its parts marked."""
    member = build({**asdict(setting), "precision": precision}, data[:INITIAL_ROWS])
    optimizer = member.make_optimizer()
    variant: Any = member.variant
    variant.step = marked("forward", variant.step)
    variant.observe = marked("bookkeeping", variant.observe)
    member.readout.add = marked("bookkeeping", member.readout.add)
    batches = data.split(setting.batch)
    done = 0

    def take(steps: int) -> None:
        nonlocal done
        for _ in range(steps):
            with record_function(f"{MARK}glue"):
                loss = member.step((batches[done % len(batches)],), done)
            with record_function(f"{MARK}optimizer"):
                optimizer.zero_grad()
            with record_function(f"{MARK}backward"):
                loss.backward()
            with record_function(f"{MARK}optimizer"):
                optimizer.step()
            done += 1

    return take


def table(title: str, times: dict[str, float], steps: int, most: int) -> str:
    """Milliseconds a step and shares, the longest first."""
    total = sum(times.values())
    lines = [f"{title:<60} {'ms a step':>10} {'share':>7}"]
    for name, value in list(times.items())[:most]:
        lines.append(f"{name[:60]:<60} {value / steps / 1000:>10.2f} {value / total:>7.1%}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=("topk", "l1_relu", "gated"), default="topk")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    for name in ("d_in", "d_sae", "k", "batch", "threads", "steps", "warmup"):
        parser.add_argument(f"--{name}", type=int, default={"steps": 10}.get(name, getattr(Setting(), name)))
    parser.add_argument("--l0", type=float, default=Setting.l0)
    parser.add_argument("--operators", type=int, default=25, help="rows of the second table")
    parser.add_argument("--trace", type=Path, help="also write a Chrome trace here")
    given = parser.parse_args()
    if "OMP_WAIT_POLICY" not in os.environ:  # as bench_step.py measures; read when torch loads, so once more
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_WAIT_POLICY": "passive"})
    options = {name: getattr(given, name) for name in asdict(Setting()) if hasattr(given, name)}
    setting = replace(Setting(), n_batches=16, **options)
    torch.set_num_threads(setting.threads)
    with tempfile.TemporaryDirectory(prefix="saeforge-profile-") as folder:
        path = Path(folder) / "rows.bin"
        write_data(path, setting.batch * setting.n_batches, setting.d_in, setting.seed)
        data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.bfloat16).view(-1, setting.d_in)
    take = steps_of(setting, given.precision, data)
    take(setting.warmup)
    start = time.perf_counter()
    take(setting.steps)
    plain = (time.perf_counter() - start) / setting.steps
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        start = time.perf_counter()
        take(setting.steps)
        profiled = (time.perf_counter() - start) / setting.steps
    if given.trace is not None:
        profiler.export_chrome_trace(str(given.trace))
    events: Any = profiler.events()
    print(json.dumps({**asdict(setting), "precision": given.precision, "torch": torch.__version__}))
    print(table("part", by_part(events), setting.steps, 99))
    print()
    print(table("operator (part)", by_operator(events), setting.steps, given.operators))
    print(f"\na step takes {1000 * plain:.1f} ms unprofiled, {1000 * profiled:.1f} ms profiled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
