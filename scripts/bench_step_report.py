"""The report of bench_step.py: ratios round by round, the promises beside them, the table."""

from __future__ import annotations

import datetime
import statistics
from dataclasses import dataclass
from typing import Any

OURS = {"fp32": "ours, fp32", "bf16": "ours, bf16"}
PRODUCT = {"fp32": "encoder product, fp32", "bf16": "encoder product, bf16"}
DENSE = {"fp32": "dense twin, fp32", "bf16": "dense twin, bf16"}
#: Largest relative difference of the first losses that counts as equal.
LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Promise:
    """A ratio of two contenders' times that is promised: `slow` takes `bound` times as long as `fast`.

    Attributes:
        says: in words.
        slow: numerator. fast: denominator.
        bound: the promise.
        at_most: whether the ratio may be at most that, instead of at least.
    """

    says: str
    slow: str
    fast: str
    bound: float
    at_most: bool = False

    def verdict(self, ratio: float) -> str:
        """`met`, or `missed by so many percent`."""
        short = ratio / self.bound - 1 if self.at_most else 1 - ratio / self.bound
        return "met" if short <= 0 else f"missed by {short:.0%}"


#: The promises of the design at d 768, d_sae 12,288, k 32, batch 2,048; at other sizes the same figures orient.
PROMISES: dict[str, list[Promise]] = {
    "topk": [
        Promise("fp32 beside sparsify, same optimizer", "sparsify, fused Adam, fp32", OURS["fp32"], 1.5),
        Promise("bf16 beside sparsify under autocast, same optimizer", "sparsify, fused Adam, bf16", OURS["bf16"], 2.0),
        Promise("beside sparsify as shipped", "sparsify, as shipped, fp32", OURS["bf16"], 4.5),
        Promise("beside SAELens as shipped, with its autocast", "saelens, as shipped, bf16", OURS["bf16"], 8.0),
        Promise("beside dictionary_learning as shipped", "dictionary_learning, as shipped, fp32", OURS["bf16"], 12.0),
        Promise("over its own encoder product, fp32", OURS["fp32"], PRODUCT["fp32"], 1.3, at_most=True),
        Promise("over its own encoder product, bf16", OURS["bf16"], PRODUCT["bf16"], 1.8, at_most=True),
    ],
    **{
        name: [
            Promise("beside its dense twin, fp32", DENSE["fp32"], OURS["fp32"], 3.0),
            Promise("beside its dense twin, bf16", DENSE["bf16"], OURS["bf16"], 2.5),
        ]
        for name in ("l1_relu", "gated", "jumprelu", "batchtopk", "matryoshka")
    },
}


def ratios(measured: dict[str, Any], slow: str, fast: str) -> list[float]:
    """Time of `slow` over that of `fast`, round by round; empty if one of them was not measured."""
    if slow not in measured or fast not in measured:
        return []
    return [a / b for a, b in zip(measured[slow]["seconds"], measured[fast]["seconds"], strict=True)]


def promises(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each promise with its median ratio and verdict; `ratio` is None where it was not measured."""
    found = []
    for promise in PROMISES[result["setting"]["variant"]]:
        rounds = ratios(result["contenders"], promise.slow, promise.fast)
        ratio = statistics.median(rounds) if rounds else None
        found.append(
            {
                "says": promise.says,
                "goal": f"{'at most' if promise.at_most else 'at least'} {promise.bound:g}",
                "ratio": ratio,
                "range": [min(rounds), max(rounds)] if rounds else None,
                "verdict": "not measured" if ratio is None else promise.verdict(ratio),
            }
        )
    return found


def loss_difference(first: list[float], second: list[float]) -> float:
    """The largest relative difference of two sequences of losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(first, second, strict=True))


def report(result: dict[str, Any]) -> str:
    """The whole report in Markdown."""
    setting, host, measured = result["setting"], result["machine"], result["contenders"]
    size = f"k {setting['k']}" if setting["variant"] == "topk" else f"L0 about {setting['l0']:g}"
    rounds = len(next(iter(measured.values()))["seconds"])
    versions = {name: version for entry in measured.values() for name, version in entry["versions"].items()}
    packages = {**host["versions"], **{name: v for name, v in versions.items() if name not in host["versions"]}}
    lines = [
        f"# One training step of {setting['variant']} on CPU, {datetime.date.today():%Y-%m-%d}",
        "",
        f"`{result['command']}`",
        "",
        f"d {setting['d_in']:,}, d_sae {setting['d_sae']:,}, {size}, batch {setting['batch']:,}; "
        f"{setting['threads']} threads; {rounds} rounds",
        f"of one measurement each ({setting['steps']} steps, their mean), in rotating order, after warm-up. Each",
        "contender is a process of its own (idle ones sleep, OMP_WAIT_POLICY=passive for all) and reads the same bf16",
        "batches; times and ratios are medians over the rounds, ratios formed inside each round. Peak memory is what",
        "the process has while it steps, less what its imports take.",
        f"Machine: {', '.join(host['cpu'])}, {host['cores']} cores, Python {host['python']}, "
        f"{', '.join(f'{name} {version}' for name, version in packages.items())}.",
        "",
        "| contender | ms a step | range | tokens/s | peak MiB | times ours, fp32 | times ours, bf16 |",
        "|---|---|---|---|---|---|---|",
        *(_row(name, measured, setting["batch"]) for name in measured),
        "",
        "| promise | goal | ratio | range | |",
        "|---|---|---|---|---|",
    ]
    for entry in promises(result):
        ratio = "" if entry["ratio"] is None else f"{entry['ratio']:.2f}"
        spread = "" if entry["range"] is None else f"{entry['range'][0]:.2f} to {entry['range'][1]:.2f}"
        lines.append(f"| {entry['says']} | {entry['goal']} | {ratio} | {spread} | {entry['verdict']} |")
    return "\n".join([*lines, "", *_notes(result), ""])


def milliseconds(seconds: float) -> str:
    """Three digits of it."""
    return f"{1000 * seconds:,.0f}" if seconds >= 0.1 else f"{1000 * seconds:.3g}"


def _row(name: str, measured: dict[str, Any], batch: int) -> str:
    entry = measured[name]
    seconds = entry["seconds"]
    cells = [
        name,
        milliseconds(statistics.median(seconds)),
        f"{milliseconds(min(seconds))} to {milliseconds(max(seconds))}",
        f"{batch / statistics.median(seconds):,.0f}",
        f"{entry['peak_mib']:,.0f}",
    ]
    for ours in OURS.values():
        against = ratios(measured, name, ours)
        cells.append(f"{statistics.median(against):.2f}" if against else "")
    return f"| {' | '.join(cells)} |"


def _notes(result: dict[str, Any]) -> list[str]:
    losses, measured = result["losses"], result["contenders"]
    notes = []
    if "ours, fp32" in losses and "dense twin, fp32" in losses:
        found = loss_difference(losses["ours, fp32"], losses["dense twin, fp32"])
        verdict = "equal" if found <= LOSS_TOLERANCE else "NOT equal"
        notes.append(
            f"* First {len(losses['ours, fp32'])} losses, ours and dense autograd, both fp32, same start: {verdict} "
            f"within {LOSS_TOLERANCE:g} relative (at most {found:.1e})."
        )
    if "ours, bf16" in losses and "ours, fp32" in losses:
        found = loss_difference(losses["ours, bf16"], losses["ours, fp32"])
        notes.append(f"* Ours in bf16 from ours in fp32: at most {found:.1e}.")
    found_l0 = {name: entry["l0"] for name, entry in measured.items() if "l0" in entry}
    if result["setting"]["variant"] != "topk" and found_l0:
        notes.append("* Mean L0: " + ", ".join(f"{name} {value:.1f}" for name, value in found_l0.items()) + ".")
    middle, most = result["others"]
    notes += [
        f"* While we measured, other processes used {middle:.0%} of the machine's cores (median; at most {most:.0%}).",
        "* The dense twin is plain autograd over whole (batch, d_sae) matrices with our RowAdam; bf16 is autocast.",
        "* The encoder product is one F.linear of the same sizes, its weights already in the compute type.",
    ]
    if any(name.split(",")[0] in ("sparsify", "saelens", "dictionary_learning") for name in measured):
        notes += [
            "* Peers run their own training code with their defaults (see scripts/bench_step_peer.py); as shipped is",
            "  their default optimizer (sparsify: schedule-free signum), bf16 the CPU's autocast around their forward,",
            "  which SAELens offers itself. No latent is dead so early, so nobody's auxiliary loss acts.",
        ]
    return notes
