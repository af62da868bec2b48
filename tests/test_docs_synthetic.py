"""docs/synthetic.md: its Python runs, its numbers are those of the presets, its measures are all there are."""

from __future__ import annotations

import re
import subprocess
import sys

from saeforge.benchmark.protocol import L0, PROTOCOLS
from saeforge.cli.bench_synthetic import make_parser
from saeforge.data.synthetic import PRESETS
from saeforge.evaluation.ground_truth import GroundTruth
from tests.readme import ROOT

TEXT = (ROOT / "docs" / "synthetic.md").read_text()


def test_the_python_works() -> None:
    (source,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
    shorter = source.replace("200_000", "30_000")
    assert shorter != source
    done = subprocess.run([sys.executable, "-c", shorter], capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^F1 0\.\d+, MCC 0\.\d+, L0 8\.0 of 1[01]\.\d$", done.stdout, flags=re.M)


def test_the_table_of_presets() -> None:
    columns = [(PRESETS[name], PROTOCOLS[name], L0[name]) for name in ("small", "16k")]
    assert row("features, of which in trees") == [f"{law.features:,}, {law.in_trees:,}" for law, _, _ in columns]
    assert row("d_in") == [f"{law.d_in}" for law, _, _ in columns]
    assert row("latents trained, batch") == [f"{run.d_sae:,}, {run.batch_size:,}" for _, run, _ in columns]
    assert row("rows of a run") == [f"{run.samples // 10**6} million" for _, run, _ in columns]
    assert row("L0") == [f"{high:g} and {low:g}" for _, _, (high, low) in columns]


def row(name: str) -> list[str]:
    found = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", TEXT, flags=re.M)
    assert found, name
    return [cell.strip() for cell in found[1].split("|")]


def test_every_measure_is_defined() -> None:
    part = TEXT.partition("## The measures")[2].partition("## Equal L0")[0]
    assert set(GroundTruth.__dataclass_fields__) - {"rows"} == set(re.findall(r"`(\w+)`", part)) - {"sae_lens"}


def test_options_that_the_page_names_exist() -> None:
    options = {action.dest for action in make_parser()._actions}
    assert set(re.findall(r"--(\w+)[ =]", TEXT)) <= options
