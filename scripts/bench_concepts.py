"""Does a latent know French from its sisters, and Python from other code? For SAEs of all variants, beside controls.

Train one SAE per variant on the demo model, and one on the same architecture with fresh weights:
    saeforge harvest --model demo --sites '[resid_post.3]' --out acts --text TEXT --context_length 256
    saeforge fit --config FIT.yaml --data.path acts --run runs/topk        # and runs/l1_relu, runs/gated
    python scripts/bench_concepts.py --make-random-model demo-random
    saeforge harvest --model ./demo-random --sites '[resid_post.3]' --out acts-random --text TEXT --context_length 256
    saeforge fit --config FIT.yaml --data.path acts-random --run runs/random
The benchmark (a few minutes on two cores):
    python scripts/bench_concepts.py runs/topk runs/l1_relu runs/gated --control runs/random \
        --out docs/benchmarks/DATE-concepts-demo-cpu

Latents are chosen on the train passages by their token AUROC, all figures are of the held-out passages. Writes
OUT.md and OUT.json; what they say is measured, failed claims included.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench_quality_judge import machine

from saeforge.errors import SaeforgeError
from saeforge.features.concepts import CLAIMS, CONVENTIONS, Concept, ConceptTable, concept_table
from saeforge.features.concepts.score import Score
from saeforge.lm.fresh import save_fresh_model
from saeforge.sae import load

AGAINST = ("french=spanish,italian,portuguese", "python=c,html,json")


def score_row(name: str, what: str, score: Score) -> str:
    """One line of a Markdown table."""
    ceiling = (1 + score.active_on_label) / 2 if score.active_on_label < 1 else None
    cells = [
        name,
        what,
        str(score.token_auroc),
        "" if ceiling is None else f"{ceiling:.3f}",
        str(score.document_auroc),
        f"{score.document_average_precision:.3f}",
        f"{score.document_f1:.3f}",
        f"{score.token_average_precision:.3f}",
        f"{score.token_f1:.3f}",
        f"{score.active_on_label:.3f}",
        f"{score.active_on_others:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def concept_rows(name: str, concept: Concept) -> list[str]:
    """The SAE's latent and the random latents of its density, which each run has its own of."""
    density = f"{concept.top[0].density:.3f}"
    return [
        score_row(f"**{name}**", f"latent {concept.latent}, density {density}", concept.sae),
        score_row(name, f"best random latents, {len(concept.random_draws)} draws", concept.random),
    ]


def report(tables: dict[str, ConceptTable], command: str, about: dict[str, Any]) -> str:
    """The Markdown: one table per concept, then the claims."""
    first = next(iter(tables.values()))
    halves = first.about["documents"]
    counts = ", ".join(f"{label} {half['train']}/{half['test']}" for label, half in halves.items())
    tokens = first.about["tokens"]
    machine_line = f"{', '.join(about['machine']['cpu'])}, {about['machine']['cores']} cores"
    lines = [
        f"# Concepts of the demo model's latents, {about['date']}",
        "",
        "Latents chosen on train passages, all figures held out; brackets are 95% percentile intervals over documents "
        f"({first.about['resamples']:,} resamples).",
        "",
        f"* Texts: {first.about['texts']}, documents train/test: {counts}; {tokens['train']:,} train and "
        f"{tokens['test']:,} test tokens. Site {first.about['site']}. Chosen by {first.about['choose_by']} AUROC.",
        f"* Machine: {machine_line}; " + ", ".join(f"{k} {v}" for k, v in about["machine"]["versions"].items()) + ".",
        "* Ceiling: the token AUROC that a latent as silent on the label's tokens as this one can reach at most, "
        "(1 + active on label) / 2.",
        "",
        "```bash",
        command,
        "```",
        "",
        "| run | variant | d_sae | L0 on the train passages | training tokens |",
        "|---|---|---|---|---|",
    ]
    for name, run in about["runs"].items():
        l0 = "" if name not in tables else f"{tables[name].about['l0']:.1f}"
        lines.append(f"| {name} | {run['variant']} | {run['d_sae']:,} | {l0} | {run['tokens']} |")
    for i, concept in enumerate(first.concepts):
        lines += [
            "",
            f"## {concept.label} against {', '.join(concept.against)}",
            "",
            "| run | what | token AUROC | ceiling | document AUROC | doc AP | doc F1 | token AP | token F1 | active on "
            "label | active on others |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name, table in tables.items():
            lines += concept_rows(name, table.concepts[i])
        lines.append(score_row("", "difference of means", concept.difference_of_means))
        if concept.probe is not None:
            lines.append(score_row("", "logistic probe", concept.probe))
        if concept.control is not None:
            lines.append(score_row("", "re-initialised model's best latent", concept.control))
    lines += ["", "## Claims", "", f"| claim (token AUROC) | {' | '.join(tables)} |", f"|---{'|---' * len(tables)}|"]
    for label_index, concept in enumerate(first.concepts):
        for claim, words in CLAIMS.items():
            if claim == "control" and concept.control is None:
                continue
            cells = [claim_cell(table.concepts[label_index], claim) for table in tables.values()]
            lines.append(f"| {concept.label}: {words} | {' | '.join(cells)} |")
    notes = sorted({note for table in tables.values() for note in table.notes if "converge" in note or "probe" in note})
    return "\n".join([*lines, "", *(f"Note: {note}." for note in notes)]).rstrip() + "\n"


def claim_cell(concept: Concept, claim: str) -> str:
    """Whether a claim holds, with the figures if it does not."""
    for failure in concept.failures:
        if failure.claim == claim:
            return f"**fails**: {failure.found:.3f} <= {failure.needed:.3f}"
    return "holds"


def describe(run: Path) -> dict[str, Any]:
    """What a run is, from its SAE."""
    sae = load(run)
    training = sae.meta.get("training") or {}
    return {
        "variant": (sae.meta.get("variant") or {}).get("name"),
        "d_sae": sae.d_sae,
        "tokens": training.get("tokens", ""),
        "model": (sae.meta.get("model") or {}).get("name"),
        "dataset": sae.meta.get("dataset"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--control", type=Path, help="RUN of an SAE of the re-initialised model")
    parser.add_argument("--against", nargs="+", default=AGAINST)
    parser.add_argument("--random_draws", type=int, default=5)
    parser.add_argument("--choose_by", choices=("token", "document"), default="token")
    parser.add_argument("--out", type=Path, help="OUT.md and OUT.json are written")
    parser.add_argument("--make-random-model", type=Path, metavar="FOLDER")
    given = parser.parse_args(argv)
    try:
        return _run(given, parser)
    except SaeforgeError as error:
        print(f"bench_concepts.py: error: {error}", file=sys.stderr)
        return 2


def _run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if given.make_random_model is not None:
        save_fresh_model("demo", given.make_random_model)
        return 0
    if not given.runs or given.out is None:
        parser.error("give RUN folders and --out (or --make-random-model)")
    names = [run.name for run in given.runs]
    if len(set(names)) != len(names):
        parser.error(f"two runs have one name: {', '.join(names)}")
    start = time.monotonic()
    tables = {}
    for run in given.runs:
        # The loaded SAE, not the folder: RUN/concepts.json is that of `saeforge features concepts` and stays.
        tables[run.name] = concept_table(
            load(run),
            "demo",
            control=given.control,
            against=given.against,
            choose_by=given.choose_by,
            random_draws=given.random_draws,
        )
        print(f"{run.name}: done after {time.monotonic() - start:.0f} s", file=sys.stderr)
    runs = {run.name: describe(run) for run in [*given.runs, *([given.control] if given.control else [])]}
    about = {"date": datetime.date.today().isoformat(), "machine": machine(), "runs": runs}
    command = shlex.join(["python", "scripts/bench_concepts.py", *sys.argv[1:]])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    text = report(tables, command, about)
    given.out.with_name(f"{given.out.name}.md").write_text(text)
    results = {
        name: {**table.about, "concepts": [{"latent": row.latent, **asdict(row)} for row in table.concepts]}
        for name, table in tables.items()
    }
    data = {**about, "command": command, "conventions": CONVENTIONS, "claims": CLAIMS, "results": results}
    given.out.with_name(f"{given.out.name}.json").write_text(json.dumps(data, indent=1) + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
