"""Every installed variant passes the conformance kit, and variants that are wrong in one way each are caught."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from saeforge.cli import variants
from saeforge.errors import ConfigError
from saeforge.registry import VARIANTS, PluginGroup
from saeforge.testing import CHECKS, QUICK, CheckFailed, NoWaiting, conformance, conformance_test
from saeforge.testing.case import Case
from tests import broken_variants
from tests.broken_variants import Right, RightJump

HEAVY = tuple(name for name in CHECKS if name not in QUICK)
#: Further options, of variants whose defaults leave half of them unread.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "topk": [
        {"aux": 0.5, "k_aux": 3, "multi_k": 2, "pre_bias": False},
        {"k_start": 8, "input_scale": "sqrt_d"},
        {"decoder_norm": "free", "aux": 0.5},
    ],
    "gated": [{"pre_bias": False, "l1_warmup_share": 0.9}],
    "l1_relu": [{"input_scale": "none"}, {"pre_bias": True}],
    "batchtopk": [{"k": 3.5, "aux": 0.5, "k_start": 8, "pre_bias": False}, {"decoder_norm": "free"}],
    "matryoshka": [{"selection": "topk", "aux": 0.5}, {"random_prefixes": 3}, {"decoder_norm": "free"}],
    "crosscoder": [{"sparsity": "l1", "source_loss": "scale"}, {"selection_weight": "none", "input_scale": "rms"}],
    "jumprelu": [
        {"loss": "tanh", "aux": 0.1},
        {"loss": "quadratic", "l0_target": 4.0, "bandwidth": 0.02, "threshold_parameter": "linear"},
    ],
}
CASES = [(name, options) for name in VARIANTS.names() for options in ({}, *OPTIONS.get(name, []))]


def named(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *case[1]])


@pytest.mark.parametrize("case", CASES, ids=named)
def test_every_installed_variant_passes_the_quick_checks(case: tuple[str, dict[str, Any]]) -> None:
    report = conformance(case[0], checks=QUICK, **case[1])
    assert report.ok, str(report)
    # What was left out is known: nothing is exempt but a choice over the batch, and units on purpose.
    reasons = {outcome.message.partition(",")[0] for outcome in report.outcomes if outcome.status == "left out"}
    none = "input_scale none leaves the units of the data to the loss on purpose"
    assert reasons <= {"it has no pseudo-gradients", "it selects over the batch", none}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", VARIANTS.names())
def test_every_installed_variant_learns_and_agrees_between_processes(name: str) -> None:
    report = conformance(name, checks=HEAVY)
    assert report.ok, str(report)


test_the_door_for_pytest = conformance_test(Right, checks=QUICK, exempt={"pseudo_grad": "it has none"})


def test_a_right_pseudo_gradient_passes() -> None:
    report = conformance(RightJump, checks=QUICK)
    assert report.ok, str(report)
    assert report["pseudo_grad"].status == "passed"


# What is wrong is caught ---------------------------------------------------------------------------------------------

#: class -> check that must catch it, and what its message says.
BROKEN = {
    "WrongGradient": ("finite_diff", "the gradient of .* along a direction is .* mend the backward pass, or mark"),
    "HostWait": ("host_waits", r"_local_scalar_dense at broken_variants.py:\d+, .* use torch.where"),
    "RawUnits": ("scale", r"with all activations times 4 the .* work on self.scaled\(batch\) only"),
    "LongRows": ("shapes", "declares W_dec unit_norm, but after initialise a row has norm .* random_unit_rows"),
    "OtherFold": ("fold", "the folded SAE's squared error on raw rows is .* fold decoder and bias by self.folded"),
    "OtherLatents": ("fold", "the folded SAE has other active latents than the step in .* pre-encoder bias"),
    "Noisy": ("determinism", r"has other bits when run again; draw .* seeded by self.observed\(\)"),
    "GlobalSeed": ("initialise", "another b_enc under another global seed; draw from its `generator` alone"),
    "Forgetful": ("save_load", "after save and load term mse differs; .* registered buffer"),
    "OwnMean": ("row_weights", r"rows of weight 0 change term mse; take means with self.mean_rows"),
    "OwnWeights": ("ranks", "the loss over two ranks is not that of the whole batch; .* self.run.group"),
    "OwnSum": (
        "latents",
        "term l1 over two ranks that share out the latents is .* self.mean_entries or self.sum_latents",
    ),
    "OwnRows": ("latents", "the start of W_dec over two ranks .* draw rows by random_rows"),
    "OwnProduct": ("sparse_dense", "latents under SAEFORGE_OPS=.* differ from dense products; compute on code.values"),
    "Untrained": ("shapes", "param_groups leaves out b_enc, which would never be trained; add them"),
    "WrongType": ("config", "rate"),
    "Overflowing": ("bf16", "bfloat16 products .* fp32"),
    "HalfJump": ("pseudo_grad", "half a window along log_threshold the loss changes by .* -theta K"),
    "NoWindow": ("pseudo_grad", "pseudo-gradients but no attribute `bandwidth`, the width of their window; set it"),
}


class Broken:
    """A distribution on sys.path with entry points of the real group."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, name: str, entries: dict[str, str]) -> None:
        info = self.folder / f"{name.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        lines = [f"{key} = {value}" for key, value in entries.items()]
        (info / "entry_points.txt").write_text("[saeforge.variants]\n" + "\n".join(lines) + "\n")
        VARIANTS.refresh()


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Broken]:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Broken(tmp_path)
    monkeypatch.undo()
    VARIANTS.refresh()


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_variant_is_caught_with_its_distribution_and_the_fix(name: str, broken: Broken) -> None:
    broken.install("sae-broken", {name.lower(): f"tests.broken_variants:{name}"})
    check, message = BROKEN[name]
    report = conformance(name.lower(), checks=(check,))
    (outcome,) = report.failed
    origin = rf"variant '{name.lower()}' of sae-broken 1\.2 \(tests\.broken_variants:{name}\): {check}: "
    with pytest.raises(CheckFailed, match=f"^{origin}.*{message}"):
        report.raise_first()
    assert "\n" not in outcome.message


@pytest.mark.slow
def test_what_does_not_learn_is_caught() -> None:
    report = conformance(broken_variants.Unlearning, checks=("learning",))
    assert "the mean cosine with the true directions" in report["learning"].message


@pytest.mark.slow
def test_a_mean_over_own_rows_is_caught_between_processes() -> None:
    assert (
        "over two ranks is not that" in conformance(broken_variants.OwnWeights, checks=("processes",)).failed[0].message
    )
    assert conformance(Right, checks=("processes",)).ok


def test_what_cannot_be_loaded_is_named_with_the_fix_and_stops_nothing_else(
    broken: Broken, capsys: pytest.CaptureFixture[str]
) -> None:
    broken.install("sae-base", {"wrong_base": "tests.broken_variants:WrongBase"})
    broken.install("sae-gone", {"missing": "nowhere_at_all:Missing"})
    broken.install("sae-loose", {"untyped": "tests.broken_variants:Untyped"})
    broken.install("sae-thief", {"topk": "tests.broken_variants:Right"})
    broken.install("sae-right", {"right": "tests.broken_variants:Right"})
    names = ["wrong_base", "missing", "untyped", "topk", "right"]
    assert variants.run(["--check", *names]) == 1
    out = capsys.readouterr().out
    for distribution, fix in {
        "sae-base 1.2 (tests.broken_variants:WrongBase)": "expected a subclass of saeforge.variants.base.Variant",
        "sae-gone 1.2 (nowhere_at_all:Missing)": "No module named 'nowhere_at_all'; mend or uninstall sae-gone",
        "sae-loose 1.2 (tests.broken_variants:Untyped)": "argument 'k' has no type annotation",
        "sae-thief 1.2 (tests.broken_variants:Right)": "give the full class path",
    }.items():
        (line, *_) = [line for line in out.splitlines() if distribution in line and fix in line]
        assert line
    (row,) = [line for line in out.splitlines() if line.startswith("right ") and "✓" in line]
    assert "✗" not in row
    assert "wrong_base" in conformance("wrong_base")["load"].message


# The command ---------------------------------------------------------------------------------------------------------


def test_check_fails_and_prints_the_first_failure_of_each_variant(
    broken: Broken, capsys: pytest.CaptureFixture[str]
) -> None:
    broken.install(
        "sae-broken", {"otherfold": "tests.broken_variants:OtherFold", "right": "tests.broken_variants:Right"}
    )
    assert variants.run(["right", "--check"]) == 0
    capsys.readouterr()
    assert variants.run(["otherfold", "right", "--check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.startswith("variant"))
    assert header.split()[1:] == ["load", *QUICK]
    marks = {line.split()[0]: line.split()[1:] for line in lines if "✓" in line}
    fold = ["load", *QUICK].index("fold")
    assert (marks["otherfold"][fold], marks["right"][fold]) == ("✗", "✓")
    assert sum(line.startswith("✗ variant 'otherfold' of sae-broken 1.2") for line in lines) == 1
    assert "pseudo_grad: it has no pseudo-gradients (otherfold, right)" in lines[-1]

    assert variants.run(["otherfold", "--check", "--json"]) == 1
    (told,) = json.loads(capsys.readouterr().out)["variants"]
    assert {check["check"]: check["status"] for check in told["checks"]}["fold"] == "failed"
    with pytest.raises(ConfigError, match="unknown variant 'nobody'"):
        variants.run(["nobody"])


def test_a_variant_that_cannot_be_built_says_so() -> None:
    report = conformance(Right, checks=QUICK, k=1000)
    assert "initialise" in report.failed[0].message or "shapes" in report.failed[0].message
    report = conformance(Right, nonsense=1)
    assert "cannot be built: TypeError" in report.failed[0].message
    with pytest.raises(CheckFailed) as raised:
        report.raise_first()
    assert isinstance(raised.value.__cause__, TypeError)  # so that pytest shows where


def test_listing_variants_loads_no_torch() -> None:
    code = "import sys; from saeforge.cli import variants; variants.run([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


# The kit itself ------------------------------------------------------------------------------------------------------


def test_exemptions_need_a_reason_and_checks_a_name() -> None:
    with pytest.raises(ConfigError, match="exempt without a reason"):
        conformance(Right, exempt={"fold": " "})
    with pytest.raises(ConfigError, match="unknown check 'folds'"):
        conformance(Right, checks=("folds",))
    report = conformance(broken_variants.OtherFold, checks=("fold", "shapes"), exempt={"fold": "on purpose"})
    assert report.ok
    assert report["fold"].message == "exempt: on purpose"
    with pytest.raises(ConfigError, match="check 'bf16' was not run"):
        report["bf16"]
    assert "– fold" in str(report)  # noqa: RUF001


def test_the_case_has_dead_latents_groups_and_gradients_everywhere() -> None:
    case = Case(Right, {}, VARIANTS.name_of(Right))
    variant, batch = case.variant(), case.batch()
    assert len(variant.dead_latents()) == variant.d_sae // 4
    assert batch.group is not None
    assert batch.group.tolist()[:4] == [0, 0, 1, 1]
    assert all(bool(gradient.any()) for gradient in case.evaluated(variant, batch).gradients.values())
    assert not case.selects_over_the_batch


@pytest.mark.parametrize(
    "operation", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: bool(x.any())]
)
def test_the_proxy_notices_what_would_wait(operation: Any) -> None:
    with pytest.raises(AssertionError, match=r"test_conformance\.py:\d+ reads from the device"), NoWaiting():
        operation(torch.randn(5))


def test_a_group_of_another_base_is_loaded_and_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    group = PluginGroup("test.other", "tests.broken_variants:WrongBase", {"other": "tests.broken_variants:WrongBase"})
    assert variants.run(["--check"], group) == 0
    assert "✓" not in capsys.readouterr().out
