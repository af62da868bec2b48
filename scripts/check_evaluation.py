"""`saeforge evaluate` beside SAELens's own evaluation of the same SAEs, exported, on the same tokens.

    python -m venv peer && peer/bin/pip install torch==2.13.0 sae-lens==6.54.12 'transformer-lens<4'
    python scripts/check_evaluation.py runs/quickstart --peer-python peer/bin/python --out docs/benchmarks/NAME

Every RUN is an SAE of the residual stream of the demo model, or of another LlamaForCausalLM in a folder;
TransformerLens gets its weights by its own conversion. `run_evals` judges the exports in three ways: on the held-out
texts one by one, as they were harvested; on these packed by SAELens's own loader; and so with special tokens included.
Passed: where the definition is the same, what `evaluate` reports is within 0.01% of SAELens's number (it reads stored
bf16 activations); and everywhere SAELens's definition, written out here (scripts/saelens_definitions.py), gives its
number within 0.001%.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from check_evaluation_rows import DEFINED, REASONS, ROWS, SAME, SETTINGS, Judged, judge, miscounted
from saelens_definitions import defined
from safetensors.torch import load_file, save_file
from torch import Tensor

import saeforge
from saeforge import formats
from saeforge.errors import ConfigError
from saeforge.evaluation.held_out import HeldOutTexts
from saeforge.evaluation.opening import open_dataset, open_effect
from saeforge.lm.origin import origin_of
from saeforge.sae import SAE

HERE = Path(__file__).parent

CONTEXTS = 8


def main() -> int:
    """Prints tables, writes OUT.md and OUT.json; 1 if a row fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="SAEs of one dataset")
    parser.add_argument("--peer-python", required=True, metavar="PYTHON", help="of an environment with SAELens")
    parser.add_argument("--data", help="their dataset, if it moved")
    parser.add_argument("--tokens", type=int, default=20_000, help="predictions to take the loss on")
    parser.add_argument("--out", type=Path, help="report, without its ending")
    given = parser.parse_args()
    started = time.monotonic()
    saes = {Path(run).resolve().name: saeforge.load(run) for run in given.runs}
    if len(saes) < len(given.runs):
        parser.error("two RUNs of one name; rename a folder")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokens = prepare(work, saes, given.data, given.tokens)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        command = [given.peer_python, str(HERE / "check_evaluation_peer.py"), str(work)]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        found = json.loads((work / "found.json").read_text())
        tokens["packed"] = tokens["special"] = numbered(load_file(work / "packed.safetensors"), "packed")
    results: dict[str, Any] = {"versions": found["versions"], "saes": {}}
    lines: list[str] = []
    reasons: set[str] = set()
    failed = 0
    for name, sae in saes.items():
        own, here = measured(sae, given.data, given.tokens, tokens)
        unit = bool((sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-5)
        judged = {
            setting: judge(own, found["saes"][name][setting], here[setting], setting, unit_decoder=unit)
            for setting in SETTINGS
        }
        failed += sum(row.fails for rows in judged.values() for row in rows)
        failed += miscounted(own, here["alone"], block=tokens["block"])
        reasons |= {reason for rows in judged.values() for row in rows for reason in row.why}
        lines += table(name, sae, own, here, judged)
        results["saes"][name] = {"evaluate": own, "saelens": found["saes"][name], "defined": here}
    print("\n".join(lines))
    print(f"{failed} failed" if failed else "all passed")
    if given.out:
        report(given.out, results, lines, reasons, failed, time.monotonic() - started, given.tokens)
    return int(failed > 0)


def prepare(work: Path, saes: dict[str, SAE], data: str | None, budget: int) -> dict[str, Any]:
    """Exports, texts and model for the other half; the batches of texts one by one, and how many the loss is on."""
    for name, sae in saes.items():
        if sae.meta.get("target") is not None:
            raise ConfigError(f"{name} is a transcoder: SAELens's evaluation would put its output at its input site")
        formats.write(sae, work / f"export-{name}", "saelens")
    sae = next(iter(saes.values()))
    root, source = open_dataset(sae, data, "validation")
    texts = HeldOutTexts(root, source.manifest, "validation", budget=budget)
    model = origin_of(sae).load_causal().model
    if type(model).__name__ != "LlamaForCausalLM":
        raise ConfigError(f"{type(model).__name__}: this script can give TransformerLens a LlamaForCausalLM only")
    shutil.copytree(model.config._name_or_path, work / "model")
    documents, scored = segments(texts)
    first, rest = of_one_length(documents[:scored]), of_one_length(documents[scored:])
    tensors = {f"document.{i}": text for i, text in enumerate(documents)}
    tensors |= {f"alone.{i}": batch for i, batch in enumerate(first + rest)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, work / "tokens.safetensors")
    context = source.manifest.packing["context_length"]
    if sum(map(len, documents)) < context * CONTEXTS:
        raise ConfigError(f"{root}: fewer than {CONTEXTS} contexts of {context} validation tokens; harvest more text")
    packed = -(-sum(map(len, documents[:scored])) // (context * CONTEXTS))
    ask = {"context": context, "contexts": CONTEXTS, "alone": len(first), "packed": packed}
    means = [row.theirs for row in ROWS if row.of == "weights"]
    (work / "ask.json").write_text(json.dumps({**ask, "means": means}))
    counts = {"alone": len(first), "packed": packed, "special": packed}
    return {"alone": first + rest, "scored": counts, "block": source.block_rows("validation")}


def segments(texts: HeldOutTexts) -> tuple[list[Tensor], int]:
    """The texts of the split, special tokens included, and how many of them are in the contexts within the budget."""
    ids = np.asarray(texts.contexts.arrays["tokens"]).astype(np.int64)
    starts = np.flatnonzero(np.asarray(texts.contexts.arrays["within"]) == 0)  # no text goes on in the next context
    scored = int(np.searchsorted(starts, texts.contexts.offsets[texts.n_contexts]))
    return [torch.from_numpy(part) for part in np.split(ids, starts[1:])], scored


def of_one_length(texts: list[Tensor]) -> list[Tensor]:
    """Batches without padding, which SAELens does not know: equally long texts, at most `CONTEXTS` together."""
    groups: dict[int, list[Tensor]] = {}
    for text in texts:
        groups.setdefault(len(text), []).append(text)
    return [
        torch.stack(group[i : i + CONTEXTS])
        for _, group in sorted(groups.items())
        for i in range(0, len(group), CONTEXTS)
    ]


def numbered(tensors: dict[str, Tensor], name: str) -> list[Tensor]:
    """`name.0`, `name.1`, ... in order."""
    return [tensors[f"{name}.{i}"] for i in range(len(tensors))]


def measured(
    sae: SAE, data: str | None, budget: int, tokens: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """What `saeforge evaluate` writes, and what SAELens's definitions give here in each setting."""
    own = saeforge.evaluate(sae, data=data, effect=True, effect_tokens=budget, probe=False, device="cpu").to_json()
    root, source = open_dataset(sae, data, "validation")
    origin = origin_of(sae)
    spliced, _ = open_effect(sae, origin, root, source, "validation", budget=budget, device="cpu")
    base = origin.load_base(dtype="float32")
    special = set(source.manifest.packing["special_tokens"]["dropped"])
    here = {
        setting: defined(
            base, spliced, sae, tokens[setting], tokens["scored"][setting], set() if setting == "special" else special
        )
        for setting in SETTINGS
    }
    return own, here


def table(
    name: str, sae: SAE, own: dict[str, Any], here: dict[str, dict[str, float]], judged: dict[str, list[Judged]]
) -> list[str]:
    """Of one SAE: the texts one by one, then both packed settings side by side."""
    tokens, predictions = (
        {setting: f"{found[what]:,.0f}" for setting, found in here.items()} for what in ("tokens", "predictions")
    )
    lines = [
        f"## {name}",
        "",
        f"`{sae}`, variant {(sae.meta.get('variant') or {}).get('name')}, trained on "
        f"{(sae.meta.get('training') or {}).get('tokens', 0):,} tokens.",
        "",
        f"{SETTINGS['alone'].capitalize()}: {own['metrics']['tokens']:,} tokens here and {tokens['alone']} there,",
        f"{own['effect']['overall']['tokens']:,} predictions here and {predictions['alone']} there.",
        "",
        "| `run_evals` | SAELens | `saeforge evaluate` | | apart | its definition here | why |",
        "|---" * 7 + "|",
    ]
    for row in judged["alone"]:
        verdict = ", ".join(row.why) if row.why else "not reported" if row.ours is None else "the same"
        cells = (
            short(row),
            number(row.theirs),
            shown_path(row.row.ours),
            number(row.ours),
            number(row.apart, ".1e"),
            number(row.off, ".1e"),
            verdict + ", FAILS" * row.fails,
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Texts {SETTINGS['packed']}: {tokens['packed']} tokens, {predictions['packed']} predictions. With",
        f"{SETTINGS['special']}: {tokens['special']} tokens, {predictions['special']} predictions.",
        "",
        "| `run_evals` | `saeforge evaluate` | SAELens, packed | its definition here | SAELens, special "
        "| its definition here | why |",
        "|---" * 7 + "|",
    ]
    for packed, special in zip(judged["packed"], judged["special"], strict=True):
        if packed.row.of == "weights":
            continue
        cells = (
            short(packed),
            number(packed.ours),
            number(packed.theirs),
            number(packed.off, ".1e"),
            number(special.theirs),
            number(special.off, ".1e"),
            ", ".join(special.why) + ", FAILS" * (packed.fails or special.fails),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def short(row: Judged) -> str:
    """SAELens's name without its group."""
    return f"`{row.row.theirs.rpartition('.')[2]}`"


def shown_path(path: str | None) -> str:
    """The last part of where a figure of ours is."""
    if path is None:
        return ""
    before = "1 - " if path.startswith("1 - ") else ""
    return f"{before}`{path.removesuffix('.mean').rpartition('.')[2]}`"


def number(value: float | None, form: str = ".6g") -> str:
    """A cell."""
    return "" if value is None else format(value, form)


def report(
    out: Path,
    results: dict[str, Any],
    lines: list[str],
    reasons: set[str],
    failed: int,
    seconds: float,
    budget: int,
) -> None:
    """OUT.md and OUT.json."""
    out.with_name(out.name + ".json").write_text(json.dumps(results, indent=1) + "\n")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    runs = " ".join(f"runs/{name}" for name in results["saes"]) + f" --tokens {budget}"
    text = [
        f"# `saeforge evaluate` beside SAELens's evaluation of our exports, {out.name[:10]}",
        "",
        f"`python scripts/check_evaluation.py {runs} --peer-python PEER/bin/python --out docs/benchmarks/{out.name}`",
        "",
        f"{failed} rows fail." if failed else "All rows pass.",
        f"Promised: where the definition is the same, the two are within {SAME:.2%} of each other (`evaluate` reads",
        "activations stored in bf16); and SAELens's definition, written out in saeforge's terms",
        f"(`scripts/saelens_definitions.py`, fp32 activations), gives SAELens's number within {DEFINED:.3%} in every",
        "row, also where the definition is another one. `apart` and `its definition here` are relative differences to",
        "SAELens's number. All are of the same held-out texts, CE and KL of the first of them. A dataset holds whole",
        "blocks: the last rows of a split may be missing in what `evaluate` reads.",
        "",
        "Why a number is another one:",
        "",
        "| | in SAELens |",
        "|---|---|",
        *(f"| {reason} | {meaning} |" for reason, meaning in REASONS.items() if reason in reasons),
        "",
        *lines,
        f"* saeforge {saeforge.__version__}; {', '.join(results['versions'])}; Python {platform.python_version()}.",
        f"* {seconds:.0f} s in all, on {os.cpu_count()} cores, load averages at the end {load}: other work was",
        "  running. Nothing here is a measurement of time.",
    ]
    out.with_name(out.name + ".md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    sys.exit(main())
