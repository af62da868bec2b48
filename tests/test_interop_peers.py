"""What was exported here, in the tools it is for; what they made, here; and an SAE in their models. Slow.

The tools live in environments of their own, FOLDER/saelens, FOLDER/sparsify and FOLDER/dictionary_learning, made by
`bash scripts/interop_environments.sh FOLDER`; the variable SAEFORGE_PEERS names FOLDER, without it .venv-peers in the
repository. An environment that is not there is made (gigabytes, from the package index); where that fails, the test is
skipped with the reason. SAEFORGE_PEERS_DATA names a dataset of activations, without it one of the demo model is made.
With `-s` the figures are printed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.readme import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ENVIRONMENTS = Path(os.environ.get("SAEFORGE_PEERS", ROOT / ".venv-peers"))
#: Beside our own variants: what each tool makes itself, by the names of tests/golden.
THEIRS = {tool: sorted(path.name for path in (ROOT / "tests" / "golden" / tool).iterdir()) for tool in (
    "saelens", "sparsify", "dictionary_learning"
)}  # fmt: skip
EXPORTED = {
    "saelens": ["topk", "l1_relu", "gated", "transcoder", "skip_threshold"],
    "sparsify": ["topk", "skip_transcoder"],
    "dictionary_learning": ["topk", "l1_relu", "gated"],
}
HOOKS = {"saelens": "transformer_lens", "dictionary_learning": "nnsight"}


def interpreter(tool: str) -> Path:
    """Of the environment with a tool; skips where there is none and none can be made."""
    python = ENVIRONMENTS / tool / "bin" / "python"
    if not python.exists():
        command = ["bash", str(ROOT / "scripts" / "interop_environments.sh"), str(ENVIRONMENTS), tool]
        given = {"PYTHON": sys.executable, **os.environ}
        made = subprocess.run(command, capture_output=True, text=True, check=False, env=given)
        if made.returncode != 0:
            reason = (made.stderr.strip() or made.stdout.strip() or "no message").splitlines()[-1]
            pytest.skip(f"no environment with {tool} in {ENVIRONMENTS}, and none can be made: {reason}")
    return python


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Activations of the demo model: enough to train on, and 4,096 held-out ones."""
    if given := os.environ.get("SAEFORGE_PEERS_DATA"):
        return given
    import saeforge

    out = tmp_path_factory.mktemp("peers") / "data"
    options = {"model": "demo", "sites": ["resid_post.3"], "text": "demo", "validation_share": 0.2, "seed": 0}
    saeforge.harvest(out=str(out), n_tokens=60_000, **options)  # type: ignore[arg-type]
    return str(out)


@pytest.mark.parametrize("tool", THEIRS)
def test_both_directions_agree_on_real_activations(tool: str, data: str) -> None:
    """The same latents in at least 99.9% of 4,096 rows and a relative error of at most 1e-5, for every SAE."""
    command = [sys.executable, str(ROOT / "scripts" / "check_interop.py"), "--data", data]
    done = subprocess.run(
        [*command, "--peer-python", f"{tool}={interpreter(tool)}"], capture_output=True, text=True, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all passed" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(tool)]
    found = {(row[1], row[2]) for row in rows if len(row) >= 6 and row[2] in ("export", "import")}
    wanted = {(name, "export") for name in EXPORTED[tool]} | {(name, "import") for name in THEIRS[tool]}
    assert wanted - found == set(), done.stdout


@pytest.mark.parametrize("tool", HOOKS)
def test_an_sae_attached_to_their_models_computes_what_it_does_in_transformers(tool: str) -> None:
    done = subprocess.run(
        [str(interpreter(tool)), str(ROOT / "scripts" / "check_hooks_peer.py"), HOOKS[tool]],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("attached:") == 4
