"""sae-probes on SAEs that SAELens made, on our exports of them, and on the object for SAEBench: the same AUC.

    python -m venv peer && peer/bin/pip install torch==2.13.0 sae-lens==6.54.12 'transformer-lens<4' sae-probes==0.4.2
    peer/bin/pip install --no-deps sae-bench==0.6.0 && peer/bin/pip install collectibles openai tabulate
    python scripts/check_sae_probes.py --peer-python peer/bin/python --out docs/benchmarks/DATE-sae-probes-demo-cpu

Its labelled sets come with its wheel. The activations of their prompts at one layer of the demo model (the last
token's, as it takes them) are read here and put where it keeps its own, so that TransformerLens loads nothing; rows of
all their tokens train two SAEs with SAELens's own classes. Each is probed in four ways: as SAELens loads what it wrote;
imported here, exported and loaded by SAELens again; imported here and wrapped by `for_saebench`; and that through
SAEBench's own evaluation. Passed: mean test AUC within 0.01 of the first for every k.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
SETS = ("22_headline_isobama", "24_headline_isiran", "96_spam_is", "118_us_state_CA", "95_toxic_is")
SAES = ("batchtopk", "topk")
WAYS = ("SAELens", "our export", "our object", "SAEBench")
LAYER, CONTEXT, KS, ROWS = 3, 256, (1, 16), 16_384
HOOK = f"blocks.{LAYER}.hook_resid_post"
LIMIT = 0.01


def main() -> int:
    """Prints a table, writes OUT.md and OUT.json; 1 if a row fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, metavar="PYTHON", help="of an environment with sae-probes")
    parser.add_argument("--sets", nargs="*", default=SETS, help="labelled sets of sae-probes")
    parser.add_argument("--out", type=Path, help="report, without its ending")
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        call(given.peer_python, "texts", work, *given.sets)
        activations(work, given.sets)
        call(given.peer_python, "probe", work, *given.sets)
        results: dict[str, Any] = json.loads((work / "results.json").read_text())
    rows, failed = table(results["auc"])
    print("\n".join(rows))
    print(f"\n{failed} failed" if failed else "\nall passed")
    if given.out:
        report(given.out, results, rows, given.sets, time.monotonic() - started)
    return int(failed > 0)


def call(python: str, what: str, work: Path, *sets: str) -> None:
    """Runs the other half in the environment of sae-probes, which can import saeforge without its dependencies."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1"}
    command = [python, __file__, "--peer", what, str(work), *sets]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def activations(work: Path, sets: tuple[str, ...]) -> None:
    """The cache that sae-probes reads, and rows to train on."""
    from safetensors.torch import save_file

    from saeforge.lm.capture import Capture, TokenBatch
    from saeforge.lm.load import load_model, load_tokenizer

    loaded, tokenizer = load_model("demo", [f"resid_post.{LAYER}"]), load_tokenizer("demo", None)
    tokenizer.truncation_side, tokenizer.padding_side = "left", "right"  # as sae-probes has them
    cache = work / "cache" / "model_activations_demo"
    cache.mkdir(parents=True)
    found: list[torch.Tensor] = []
    with Capture(loaded.model, loaded.sites) as capture:
        for name in sets:
            texts = json.loads((work / f"{name}.json").read_text())
            last = []
            for start in range(0, len(texts), 64):
                part = texts[start : start + 64]
                batch = tokenizer(part, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt")
                x = capture(TokenBatch(batch.input_ids, batch.attention_mask))[loaded.sites[0].id].float()
                lengths = batch.attention_mask.sum(1)
                last.append(x[torch.arange(len(x)), lengths - 1].clone())
                found.append(x[batch.attention_mask.bool()].clone())
            torch.save(torch.cat(last), cache / f"{name}_{HOOK}.pt")
    rows = torch.cat(found)
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:ROWS]
    save_file({"x": rows[chosen].contiguous()}, work / "rows.safetensors")


def table(auc: dict[str, dict[str, dict[str, dict[str, float]]]]) -> tuple[list[str], int]:
    """Rows of mean test AUC over the labelled sets, and how many are off by more than the limit."""
    rows = ["| SAE | by way of | " + " | ".join(f"k = {k}" for k in KS) + " | largest difference |"]
    rows.append("|---" * (len(KS) + 3) + "|")
    failed = 0
    for name, ways in auc.items():
        means = {
            way: {k: sum(found[str(k)] for found in sets.values()) / len(sets) for k in KS}
            for way, sets in ways.items()
        }
        for way, mean in means.items():
            off = max(abs(mean[k] - means[WAYS[0]][k]) for k in KS)
            failed += off > LIMIT
            fails = ", FAILS" if off > LIMIT else ""
            cells = " | ".join(f"{mean[k]:.4f}" for k in KS)
            rows.append(f"| {name} | {way} | {cells} | {off:.5f}{fails} |")
    return rows, failed


def report(out: Path, results: dict[str, Any], rows: list[str], sets: tuple[str, ...], seconds: float) -> None:
    """OUT.md and OUT.json."""
    out.with_name(out.name + ".json").write_text(json.dumps(results, indent=1) + "\n")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    text = [
        f"# sae-probes on SAEs of SAELens and on our exports of them, {out.name[:10]}",
        "",
        f"`python scripts/check_sae_probes.py --peer-python PEER/bin/python --out docs/benchmarks/{out.name}`",
        "",
        f"Mean test AUC over {len(sets)} labelled sets of sae-probes ({', '.join(sets)}),",
        f"setting normal, l2, k latents by difference of means. Layer {LAYER} of the demo model, d 256, 512 latents,",
        "trained by SAELens's own classes for 200 steps; the activations of the prompts are ours, in its cache.",
        "`our object` is `for_saebench(sae)` given to sae-probes, `SAEBench` the same object in SAEBench's own",
        "evaluation `sparse_probing_sae_probes`.",
        "",
        *rows,
        "",
        f"* Differences are to `SAELens`, the first way; the promise is at most {LIMIT} for every k.",
        f"* {', '.join(results['versions'])}, Python {platform.python_version()}.",
        f"* {seconds:.0f} s in all, on {os.cpu_count()} cores, load averages at the end {load}: other work was",
        "  running. Nothing here is a measurement of time.",
    ]
    out.with_name(out.name + ".md").write_text("\n".join(text) + "\n")


def peer(what: str, work: Path, sets: list[str]) -> None:
    """In the environment of sae-probes."""
    if what == "texts":
        import pandas as pd

        spec = find_spec("sae_probes")  # to import it reads all its labelled sets
        assert spec is not None
        assert spec.origin is not None
        for name in sets:
            frame = pd.read_csv(Path(spec.origin).parent / "data/cleaned_data" / f"{name}.csv.zst", compression="zstd")
            (work / f"{name}.json").write_text(json.dumps(frame["prompt"].tolist()))
        return
    from importlib.metadata import version

    from sae_lens import SAE
    from safetensors.torch import load_file

    from saeforge.formats.saebench import for_saebench
    from saeforge.formats.saelens import SAELens

    sys.path.insert(0, str(HERE))
    from check_interop_peer import trained

    trained(work, load_file(work / "rows.safetensors")["x"], SAES)
    results: dict[str, Any] = {"auc": {}}
    for name in SAES:
        theirs, exported = work / f"trained_{name}", work / f"exported_{name}"
        exported.mkdir()
        own = SAELens().read(theirs)
        SAELens().write(own, exported)
        wrapped = for_saebench(own, model_name="demo", hook_name=HOOK)
        saes = {
            WAYS[0]: SAE.load_from_disk(str(theirs), device="cpu"),
            WAYS[1]: SAE.load_from_disk(str(exported), device="cpu"),
            WAYS[2]: wrapped,
        }
        results["auc"][name] = {way: probed(sae, work / "probed" / name / way, work, sets) for way, sae in saes.items()}
        results["auc"][name][WAYS[3]] = by_saebench(wrapped, work / "probed" / name / "bench", work, sets)
    packages = ("sae-probes", "sae-lens", "sae-bench", "transformer-lens", "scikit-learn", "torch")
    results["versions"] = [f"{package} {version(package)}" for package in packages]
    (work / "results.json").write_text(json.dumps(results))


def probed(sae: Any, out: Path, work: Path, sets: list[str]) -> dict[str, dict[int, float]]:
    """Test AUC by labelled set and k."""
    from sae_probes.run_sae_evals import run_sae_evals

    run_sae_evals(
        sae,
        model_name="demo",
        hook_name=HOOK,
        reg_type="l2",
        setting="normal",
        ks=list(KS),
        results_path=out,
        model_cache_path=work / "cache",
        datasets=sets,
        device="cpu",
    )
    return collected(out, sets)


def by_saebench(sae: Any, out: Path, work: Path, sets: list[str]) -> dict[str, dict[int, float]]:
    """The same by SAEBench's evaluation, without its baseline of the model."""
    from sae_bench.evals.sparse_probing_sae_probes.eval_config import SparseProbingSaeProbesEvalConfig
    from sae_bench.evals.sparse_probing_sae_probes.main import run_eval

    config = SparseProbingSaeProbesEvalConfig(
        model_name="demo",
        dataset_names=sets,
        reg_type="l2",
        ks=list(KS),
        results_path=str(out),
        model_cache_path=str(work / "cache"),
        include_llm_baseline=False,
    )
    run_eval(config, [("saeforge", sae)], "cpu", str(out / "output"))
    return collected(next(out.glob("saeforge_*")), sets)


def collected(out: Path, sets: list[str]) -> dict[str, dict[int, float]]:
    """What it wrote."""
    found = {}
    for name in sets:
        place = out / "sae_probes_demo" / "normal_setting" / f"{name}_{HOOK}_l2.json"
        found[name] = {entry["k"]: entry["test_auc"] for entry in json.loads(place.read_text())}
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        peer(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
        sys.exit(0)
    sys.exit(main())
