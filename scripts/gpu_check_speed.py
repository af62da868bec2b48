"""Steps and kernels on the clock, beside their floors and beside sparsify; part of gpu_check.py.

A floor is what the arithmetic and the memory traffic of speed 2.1 take at the rates measured on the same device: a
product at the rate of a large bf16 product, everything else at the rate of a copy. Every gather is charged to memory,
so a table that fits in the cache can beat it.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_check_equality import SHAPES, Shape
from torch import Tensor, nn

from saeforge.data.batch import Batch
from saeforge.ops import SparseCode, gpu
from saeforge.optim import RowAdam
from saeforge.variants import TopK
from saeforge.variants.contract import RunSettings

ROUNDS = 7


def milliseconds(call: Callable[[], Any], device: str, inner: int = 5, rounds: int = ROUNDS) -> float:
    """Median over rounds of the mean of `inner` calls, after two to warm up; on the CPU, of one call."""
    if device != "cuda":
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)
    for _ in range(2):
        call()
    found = []
    for _ in range(rounds):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(inner):
            call()
        stop.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(stop) / inner)
    return statistics.median(found)


def rates(device: str) -> dict[str, float]:
    """TFLOP/s of a large bf16 product and TB/s of a copy, read and written bytes counted."""
    n = 8192 if device == "cuda" else 128
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    product = milliseconds(lambda: a @ b, device)
    source = torch.zeros((1 << 30) if device == "cuda" else 1 << 16, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), device)
    return {"tflops": 2 * n**3 / product / 1e9, "terabytes_per_second": 2 * source.numel() / copy / 1e9}


class Step:
    """A TopK step on fixed data: everything that training does but reading."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape = shape
        with torch.device(device):
            self.variant = TopK(shape.d, shape.d, d_sae=shape.d_sae, k=shape.k, aux=0.0)
            with torch.no_grad():
                self.variant.W_dec.normal_()
                self.variant.W_dec.div_(self.variant.W_dec.norm(dim=1, keepdim=True))
                self.variant.W_enc.copy_(self.variant.W_dec)
                self.variant.b_dec.zero_()
            self.x = torch.randn(shape.batch, shape.d).bfloat16()
        self.variant.bind(RunSettings(compute_dtype=torch.bfloat16))
        self.optimizer = RowAdam(self.variant.param_groups(), lr=1e-4)

    def __call__(self) -> None:
        out = self.variant.step(Batch(self.x, self.x), {})
        self.optimizer.zero_grad()
        sum(out.terms.values(), self.variant.b_dec.new_zeros(())).backward()
        self.optimizer.step()
        self.variant.observe(out.code)


def check_sync(name: str, device: str) -> str:
    """A step must not wait for the device."""
    step = Step(SHAPES[name], device)
    step()
    if device != "cuda":
        step()
        return "not checked: no GPU"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no wait"


def measure(name: str, device: str, measured: dict[str, float] | None) -> dict[str, Any]:
    """Milliseconds of the step, of its graph, of sparsify's, and of each kernel beside its floor."""
    shape = SHAPES[name]
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = Step(shape, device)
    found: dict[str, Any] = {"shape": shape._asdict(), "step_ms": milliseconds(step, device)}
    if device == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    found["tokens_per_second"] = 1e3 * shape.batch / found["step_ms"]
    found["kernels"] = _kernels(step, device, measured)
    x = step.x
    del step
    for key, function in (("sparsify_ms", _sparsify), ("graph_ms", _graph)):
        if device == "cuda":
            torch.cuda.empty_cache()
        try:
            found[key] = function(shape, x, device)
        except Exception as error:  # another package, or a feature that is not promised: said, not failed
            found[key] = f"not measured: {type(error).__name__}: {error}"[:300]
    with contextlib.suppress(TypeError):
        found["over_sparsify"] = found["sparsify_ms"] / found["step_ms"]
    floors = [entry["floor_ms"] * entry["calls"] for entry in found["kernels"].values() if entry["floor_ms"]]
    found["floor_ms"] = sum(floors) or None
    return found


def _kernels(step: Step, device: str, measured: dict[str, float] | None) -> dict[str, dict[str, Any]]:
    kernels, (d, d_sae, k, batch) = gpu.kernels(), step.shape
    weight, bias = step.variant.W_enc.detach().bfloat16(), step.variant.b_enc.detach().bfloat16()
    grad = torch.randn(batch, d, device=device)
    low = grad.bfloat16()
    pre = F.linear(step.x, weight, bias)
    values, indices = kernels.top_k(pre, k)
    offsets = torch.arange(batch + 1, device=device) * k

    def code() -> SparseCode:
        return SparseCode(values.flatten(), indices.flatten(), offsets, d_sae, k)

    sorted_code = code()
    flat = sorted_code.values
    optimizer = step.optimizer
    gather, weights = 2 * batch * k * d, 2 * d_sae * d
    # name: call, FLOP, bytes, calls a step
    jobs: dict[str, tuple[Callable[[], Any], float, float, int]] = {
        "encoder product": (lambda: F.linear(step.x, weight, bias), 2.0 * batch * d_sae * d, 0, 1),
        "top_k": (lambda: kernels.top_k(pre, k), 0, 2 * batch * d_sae, 1),
        "sort by latent": (lambda: code().by_latent(), 0, 0, 1),
        "gather_sum": (lambda: kernels.gather_sum(sorted_code, flat, weight), 0, gather, 1),
        "row_dots": (lambda: kernels.row_dots(sorted_code, grad, weight), 0, gather, 1),
        "scatter_outer": (lambda: kernels.scatter_outer(sorted_code, flat, low), 0, gather + 2 * weights, 2),
        # Norms read all gradients and the decoder; Adam reads p, g, m, v and writes p, m, v and two bfloat16.
        "RowAdam": (optimizer.step, 0, (4 + 2 + 28 + 2) * weights, 1),
    }
    found = {}
    for name, (call, flop, traffic, calls) in jobs.items():
        entry: dict[str, Any] = {"ms": milliseconds(call, device), "calls": calls, "floor_ms": None}
        if measured:
            floor = flop / measured["tflops"] / 1e9 + traffic / measured["terabytes_per_second"] / 1e9
            entry["floor_ms"] = floor or None
            entry["floor_over_ms"] = floor / entry["ms"] if floor else None
        found[name] = entry
    return found


def _graph(shape: Shape, x: Tensor, device: str) -> float:
    """The whole step as a CUDA graph."""
    if device != "cuda":
        raise RuntimeError("no GPU")
    step = Step(shape, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    found = milliseconds(graph.replay, device)
    if not all(bool(p.isfinite().all()) for p in step.variant.parameters()):
        raise AssertionError("weights are not finite after replays")
    return found


def _sparsify(shape: Shape, x: Tensor, device: str) -> float:
    """EleutherAI's sparsify on the same data: bf16 autocast, its care of the decoder, and torch's fused Adam."""
    import sparsify

    coder: nn.Module = sparsify.SparseCoder(
        shape.d, sparsify.SaeConfig(num_latents=shape.d_sae, k=shape.k), device=device
    )
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-4, fused=True)

    def call() -> None:
        coder.set_decoder_norm_to_unit_norm()
        with torch.autocast(device, torch.bfloat16):
            out = coder(x)
        optimizer.zero_grad()
        out.fvu.backward()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()

    return milliseconds(call, device)
