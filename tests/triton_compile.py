"""Compiles every Triton kernel for an NVIDIA H100 as its callers would, without a GPU, and prints what each takes.

    python -m tests.triton_compile

The callers run on CPU tensors; in place of a launch, the kernel is compiled for the types of its arguments.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from saeforge.ops import SparseCode, triton_kernels

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
seen: set[Any] = set()


def resources(cubin: bytes) -> str:
    """Registers, stack (spills) and shared memory, from cuobjdump where there is one."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    return " ".join(re.findall(r"(?:REG|STACK|SHARED):\d+", text))


def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, num_warps: int = 4, **kwargs: Any) -> None:
    given = dict(zip(self.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for at, parameter in enumerate(self.params):
        value = given[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(at,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(at,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and value and not parameter.do_not_specialize:
                attributes[(at,)] = [["tt.divisibility", 16]]
    key = (self.fn.__name__, tuple(signature.items()), tuple(constants.items()), str(attributes), num_warps)
    if key in seen:
        return
    seen.add(key)
    source = ASTSource(self, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    sizes = {name: value for (at,), value in constants.items() for name in [self.arg_names[at]]}
    print(f"{self.fn.__name__:15} {num_warps:2} warps  {resources(built.asm['cubin'])}  {sizes}", flush=True)


def main(d: int = 4096, n: int = 65536, k: int = 100) -> None:
    """Calls every wrapper once for each type of table."""
    JITFunction.run = compile_instead
    code = SparseCode(torch.zeros(2 * 512), torch.arange(512).repeat(2), torch.tensor([0, 512, 1024]), n, 512)
    for dtype in (torch.bfloat16, torch.float32):
        rows, table = torch.zeros(2, d), torch.zeros(600, d, dtype=dtype)
        triton_kernels.gather_sum(code, code.values, table)
        triton_kernels.row_dots(code, rows, table)
        narrow = SparseCode(code.values, code.indices, code.offsets, 600, 512)
        triton_kernels.scatter_outer(narrow, code.values, rows.to(dtype))
        pre = torch.zeros(2, n, dtype=dtype)
        triton_kernels.top_k(pre, k)
        triton_kernels.top_k(pre[:, :1000], k)
        triton_kernels.top_k(pre, 4096)
        nnz = torch.Tensor.__int__
        torch.Tensor.__int__ = lambda self: 5  # type: ignore[method-assign]
        triton_kernels.above(pre, torch.zeros(1))
        triton_kernels.above(pre, torch.zeros(n))
        torch.Tensor.__int__ = nnz  # type: ignore[method-assign]
    for shape, constrained in (((3, d), True), ((3, 2304), True), ((3, d), False)):
        p = torch.zeros(shape)
        squares = torch.zeros(triton_kernels.programs(p, constrained))
        dots = triton_kernels.row_norms(p, p, constrained, squares)
        step, total = torch.zeros(()), torch.zeros((), dtype=torch.float64)
        numbers = triton_kernels.scalars(step, total, lr=0.1, betas=(0.9, 0.999), max_grad_norm=1.0)
        triton_kernels.scalars(step, total, lr=step, betas=(0.9, 0.999), max_grad_norm=1.0)
        for rounded in (None, p.bfloat16()):
            triton_kernels.row_adam(p, p, p, p, dots, numbers, betas=(0.9, 0.999), eps=1e-8, rounded=rounded)


if __name__ == "__main__":
    main()
