"""What a step cannot take less than: the time of its encoder product alone, measured on the run's own device."""

from __future__ import annotations

import time

import torch

# A piece of the product is timed and scaled up: as large as keeps a device at its full rate, small enough for a CPU.
_ROWS, _CPU_ROWS, _LATENTS = 8192, 256, 16_384
_REPEATS, _SECONDS = 4, 0.5


@torch.no_grad()
def product_seconds(rows: int, d_in: int, d_sae: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of (rows, d_in) times (d_in, d_sae): the best of a few, after a first one."""
    n = min(rows, _CPU_ROWS if device.type == "cpu" else _ROWS)
    f = min(d_sae, _LATENTS)
    # Of its own: the run's random numbers stay what they are. Random values, as a GPU is faster on zeros.
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (torch.empty(size, d_in, device=device).normal_(generator=generator).to(dtype) for size in (n, f))
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) <= _REPEATS and (len(taken) < 2 or time.perf_counter() - begin < _SECONDS):
        start = _now(device)
        torch.mm(x, weight.T)
        taken.append(_now(device) - start)
    return min(taken[1:]) * (rows / n) * (d_sae / f)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
