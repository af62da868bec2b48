"""The C++ kernels of this folder, compiled once for this machine and cached, as torch.compile does with its own.

Environment: CXX (else c++, g++, clang++), SAEFORGE_CACHE (else $XDG_CACHE_HOME/saeforge, ~/.cache/saeforge).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

log = logging.getLogger("saeforge.ops")

SOURCES = ("products.cpp", "residual.cpp", "select.cpp", "screen.cpp", "row_adam.cpp")
_HEADERS = ("rows.h", "order.h")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")


class BuildError(Exception):
    """Why there is no library: no compiler, or what it said."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, said once in the log, where they cannot be compiled."""
    try:
        return load()
    except BuildError as error:
        log.warning("%s; steps on the CPU run on stock PyTorch operations, which takes about twice as long", error)
        return None


def load() -> ctypes.CDLL:
    """Compiles if this machine has not yet, and loads.

    Raises:
        BuildError: with the reason.
    """
    folder = Path(__file__).parent
    compiler = next((found for name in _compilers() if (found := shutil.which(name))), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler ({', '.join(_compilers())}): install g++ or set CXX")
    digest = hashlib.sha256()
    for name in (*SOURCES, *_HEADERS):
        digest.update((folder / name).read_bytes())
    openmp = _openmp()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest.update(" ".join([compiler, version, _processor(), *_FLAGS, *openmp]).encode())
    path = _intact(digest.hexdigest()[:24])
    if path is None:
        command = [compiler, *_FLAGS, *(str(folder / name) for name in SOURCES), *openmp]
        path = _compile(command, digest.hexdigest()[:24])
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the CPU kernels {path} do not load ({error}): remove the file") from error


def _compilers() -> tuple[str, ...]:
    chosen = os.environ.get("CXX")
    return (chosen,) if chosen else ("c++", "g++", "clang++")


def _cache() -> Path:
    home = os.environ.get("SAEFORGE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(home) if home else Path(base) / "saeforge") / "native"


def _openmp() -> list[str]:
    """torch's own OpenMP library, if it brings one: a second pool of threads would fight with the first for cores."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return ["-Wl,--as-needed", *map(str, found[:1])]


def _processor() -> str:
    """What -march=native depends on; homes may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags")))[:20_000]


def _intact(digest: str) -> Path | None:
    """The library made before. Its name ends in a digest of its bytes: a damaged one would end the process."""
    try:
        found = [path for path in _cache().glob(f"kernels-{digest}-*.so") if path.name == _name(digest, path)]
    except OSError:
        return None
    return found[0] if found else None


def _name(digest: str, made: Path) -> str:
    return f"kernels-{digest}-{hashlib.sha256(made.read_bytes()).hexdigest()[:16]}.so"


def _compile(command: list[str], digest: str) -> Path:
    log.info("compiling the CPU kernels (a few seconds, once): %s", " ".join(command))
    try:
        _cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_cache()) as folder:
            made = Path(folder) / "kernels.so"
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False, timeout=300)
            if done.returncode:
                first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
                raise BuildError(f"the CPU kernels do not compile ({command[0]}: {first.strip()})")
            return made.replace(_cache() / _name(digest, made))  # atomic: another process may be doing the same
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the CPU kernels could not be compiled ({error}): set SAEFORGE_CACHE to a folder") from error
