"""The report of gpu_check.py as Markdown. Imports nothing that may be missing."""

from __future__ import annotations

from typing import Any


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def markdown(report: dict[str, Any]) -> str:
    """Everything that was found, failures first."""
    about, rates = report.get("about", {}), report.get("rates")
    lines = [f"# GPU checks and the step's speed, {about.get('gpu', 'no GPU')}, {report['date']}", ""]
    lines += [f"`{report['command'].strip()}`", ""]
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    lines += [f"Commit {about.get('commit')}; Python {about.get('python')}, CUDA {about.get('cuda')}, {versions}."]
    if about.get("driver"):
        lines += [f"Driver, clock, power limit: {about['driver']}; {about['memory_gib']} GiB."]
    lines += ["", "| part | | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {entry['status']} | {entry.get('seconds')} |" for name, entry in report["parts"].items()]
    for name, entry in report["parts"].items():
        if entry["status"] != "passed":
            lines += ["", f"**{name} failed**", "", "```", str(entry.get("error")), "```"]
    if rates:
        lines += ["", f"Rates measured here, for the floors: {rates['tflops']:.0f} TFLOP/s (bf16 product, n 8,192), "]
        lines[-1] += f"{rates['terabytes_per_second']:.2f} TB/s (copy)."
    for name, entry in report["parts"].items():
        result = entry.get("result")
        if name.startswith("speed") and result:
            lines += ["", *_speed(name.removeprefix("speed "), result)]
        elif name.startswith("equality") and result:
            worst = max(result, key=result.get)
            lines += ["", f"{name}: {len(result)} comparisons, largest relative error {result[worst]:.1e} ({worst})."]
        elif name in ("tests", "fit", "sync") and result:
            lines += ["", f"{name}: {result}"]
    return "\n".join(lines) + "\n"


def _speed(name: str, result: dict[str, Any]) -> list[str]:
    shape = result["shape"]
    lines = [
        f"## Shape {name}: d {shape['d']}, d_sae {shape['d_sae']}, k {shape['k']}, batch {shape['batch']}, bf16",
        "",
        f"Step {result['step_ms']:.3f} ms, {result['tokens_per_second']:,.0f} tokens/s; floor of its parts "
        f"{_number(result['floor_ms'])} ms; as a CUDA graph: {_number(result['graph_ms'])} ms; "
        f"sparsify: {_number(result['sparsify_ms'])} ms; peak {_number(result.get('peak_gib'))} GiB.",
        "",
        "| kernel | ms | a step | floor, ms | floor / ms |",
        "|---|---|---|---|---|",
    ]
    for kernel, entry in result["kernels"].items():
        cells = [entry["ms"], entry["calls"], entry["floor_ms"], entry.get("floor_over_ms")]
        lines.append(f"| {kernel} | {' | '.join(map(_number, cells))} |")
    return lines
