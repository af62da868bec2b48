"""The step benchmark: fair contenders, a protocol that says why it fails, a report that says what is missed."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saeforge.errors import ConfigError, SaeforgeError
from saeforge.variants import Batch
from tests import oracle

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def script(name: str) -> Any:
    return importlib.import_module(name)


def tiny(**changes: Any) -> Any:
    setting = script("bench_step").Setting(
        d_in=16, d_sae=96, k=4, l0=6.0, batch=64, n_batches=8, threads=1, rounds=2, steps=2, warmup=1, losses=5
    )
    return replace(setting, **changes)


def rows_of(setting: Any, folder: Path) -> Tensor:
    path = folder / "rows.bin"
    script("bench_step").write_data(path, setting.batch * setting.n_batches, setting.d_in, 0)
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.bfloat16).view(-1, setting.d_in)


def build(setting: Any, rows: Tensor, precision: str = "fp32") -> Any:
    return script("bench_step_worker").build({**vars(setting), "precision": precision}, rows)


# Contenders ----------------------------------------------------------------------------------------------------------


def test_the_data_has_unit_scale_and_a_falling_spectrum(tmp_path: Path) -> None:
    rows = rows_of(tiny(batch=512), tmp_path).float()
    assert rows.square().mean() == pytest.approx(1.0, rel=0.25)
    spectrum = torch.linalg.svdvals(rows - rows.mean(0))
    assert spectrum[0] > 2.5 * spectrum[-1]


@pytest.mark.parametrize("variant", ["topk", "l1_relu", "gated"])
def test_the_dense_twin_is_the_papers_formula(variant: str, tmp_path: Path) -> None:
    setting = tiny(variant=variant)
    rows = rows_of(setting, tmp_path)
    sae = build(setting, rows).variant.double()
    x = rows[:64].double() * sae.scale
    parameters = {name: value.detach().clone().requires_grad_() for name, value in sae.named_parameters()}
    if variant == "topk":
        none = torch.zeros(setting.d_sae, dtype=torch.bool)
        terms, latents = oracle.topk(
            parameters, x, x, k=4, mse_of_mean=float(sae.mse_of_mean), aux=0.0, k_aux=1, dead=none
        )
    else:
        terms, latents = getattr(oracle, variant)(parameters, x, x, l1=0.3)
    expected = torch.stack(list(terms.values())).sum()
    expected.backward()
    loss, found = script("bench_step_dense").dense_forward(sae, rows[:64], {"l1": 0.3})
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # the gated product may sum in another order
    assert torch.equal(found > 0, latents > 0)
    for name, value in sae.named_parameters():
        reference = parameters[name].grad
        assert reference is not None
        assert (value.grad - reference).norm() <= 1e-6 * reference.norm(), name


@pytest.mark.parametrize("variant", ["jumprelu", "batchtopk", "matryoshka"])
def test_the_dense_twin_of_a_plugin_has_our_loss_and_gradients(variant: str, tmp_path: Path) -> None:
    pytest.importorskip(f"saeforge_{variant}", reason="a plugin")
    setting = tiny(variant=variant)
    rows = rows_of(setting, tmp_path)
    sae = build(setting, rows).variant.double()
    if variant == "jumprelu":
        sae.bandwidth = 0.2  # many entries near their thresholds
    gradients = []
    for dense in (False, True):
        if dense:
            loss, latents = script("bench_step_dense").dense_forward(sae, rows[:64], {"sparsity": 0.3})
        else:
            out = sae.step(Batch(rows[:64], rows[:64]), {"sparsity": 0.3})
            loss, latents = torch.stack(list(out.terms.values())).sum(), out.code.to_dense()
        sae.zero_grad()
        loss.backward()
        gradients.append([loss.detach(), (latents > 0).double(), *(value.grad for value in sae.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # products in fp32


@pytest.mark.parametrize("variant", ["l1_relu", "gated", "jumprelu"])
def test_biases_bring_l0_to_where_it_is_wanted(variant: str, tmp_path: Path) -> None:
    if variant == "jumprelu":
        pytest.importorskip("saeforge_jumprelu", reason="a plugin")
    setting = tiny(variant=variant, batch=256)
    rows = rows_of(setting, tmp_path)
    member = build(setting, rows)
    code = member.variant.step(Batch(rows, rows), {"l1": 0.0, "sparsity": 0.0}).code
    # Of gated, a few entries pass the gate with a magnitude of 0: where the bias of the gate came out positive.
    assert code.l0().double().mean() == pytest.approx(setting.l0, rel=0.04)


def test_an_optimizer_made_fused_steps_as_one_born_fused() -> None:
    fuse = script("bench_step_peer").fuse
    ends = []
    for born in (True, False):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 64))
        adam = torch.optim.Adam([weight], lr=0.1, fused=born)
        if not born:
            fuse(adam)
        for step in range(1, 4):
            weight.grad = torch.sin(step * weight.detach())
            adam.step()
        assert adam.state[weight]["step"].item() == 3
        ends.append(weight.detach().clone())
    assert torch.equal(*ends)  # the plain kernel differs from the fused one in the last digits
    with pytest.raises(AssertionError):
        fuse(adam)  # too late: it has stepped


# Measuring -----------------------------------------------------------------------------------------------------------


def test_ours_and_the_dense_twin_in_processes_of_their_own_have_equal_losses(tmp_path: Path) -> None:
    bench = script("bench_step")
    result = bench.bench(tiny(), {}, "ours, fp32|dense twin, fp32", "command")
    assert list(result["contenders"]) == ["ours, fp32", "dense twin, fp32"]
    for entry in result["contenders"].values():
        assert len(entry["seconds"]) == 2
        assert all(0 < seconds < 60 for seconds in entry["seconds"])
        assert entry["peak_mib"] > 0
        assert entry["l0"] == pytest.approx(4.0, abs=0.1)
        assert entry["dead"] == 0
    first, second = (result["losses"][name] for name in result["contenders"])
    assert 0 <= result["others"][0] <= result["others"][1] <= 1
    assert len(first) == 5
    assert len(set(first)) == 5  # it trains, on different batches
    assert script("bench_step_report").loss_difference(first, second) <= 1e-6
    assert "not measured" in script("bench_step_report").report(result)


def test_a_contender_that_fails_says_why(tmp_path: Path) -> None:
    bench = script("bench_step")
    broken = tmp_path / "broken.py"
    broken.write_text("import sys\nsys.exit('no such kernel')\n")
    worker = bench.Worker(bench.Contender("mine", (sys.executable, str(broken)), {}), tiny(), tmp_path, tmp_path)
    with pytest.raises(SaeforgeError, match=r"mine: its process ended with code 1(.|\n)*no such kernel"):
        worker.ready()
    worker.close()


def test_peers_are_known_by_name_and_run_for_topk_in_both_forms() -> None:
    bench = script("bench_step")
    assert bench.parse_peers([f"sparsify={sys.executable}"]) == {"sparsify": sys.executable}
    with pytest.raises(ConfigError, match="expected NAME=PATH"):
        bench.parse_peers([f"another={sys.executable}"])
    with pytest.raises(ConfigError, match="no interpreter there"):
        bench.parse_peers(["sparsify=/nowhere/python"])
    named = {contender.name for contender in bench.contenders(tiny(), {name: "python" for name in bench.PEERS})}
    promised = {
        name for promise in script("bench_step_report").PROMISES["topk"] for name in (promise.slow, promise.fast)
    }
    assert promised <= named  # or a promise could never be measured
    assert [c.name for c in bench.contenders(tiny(), {}, "^ours")] == ["ours, fp32", "ours, bf16"]


# Reports -------------------------------------------------------------------------------------------------------------


def canned(variant: str = "topk", **seconds: list[float]) -> dict[str, Any]:
    return {
        "setting": vars(tiny(variant=variant, batch=2048)),
        "machine": {"cpu": ["a CPU"], "cores": 2, "python": "3.11", "versions": {"torch": "2.13"}},
        "command": "python scripts/bench_step.py",
        "contenders": {
            name.replace("__", ", ").replace("_", " "): {
                "seconds": values,
                "peak_mib": 100.0,
                "versions": {"torch": "2.13", "peer": "1.0"},
            }
            for name, values in seconds.items()
        },
        "losses": {"ours, fp32": [1.0, 0.5], "dense twin, fp32": [1.0, 0.5004]},
        "others": [0.015, 0.2],
    }


def test_ratios_are_formed_inside_rounds() -> None:
    report = script("bench_step_report")
    # The second round was slow for everybody: medians of times would say 1.0 / 0.2.
    result = canned(dense_twin__fp32=[0.4, 4.0, 1.0], ours__fp32=[0.1, 1.0, 0.2], encoder_product__fp32=[0.1, 0.7, 0.2])
    assert report.ratios(result["contenders"], "dense twin, fp32", "ours, fp32") == pytest.approx([4.0, 4.0, 5.0])
    assert report.ratios(result["contenders"], "dense twin, bf16", "ours, fp32") == []
    by_name = {entry["says"]: entry for entry in report.promises(result)}
    over = by_name["over its own encoder product, fp32"]
    assert over["ratio"] == pytest.approx(1.0)
    assert over["range"] == pytest.approx([1.0, 1 / 0.7])
    assert over["verdict"] == "met"
    assert by_name["over its own encoder product, bf16"]["verdict"] == "not measured"


@pytest.mark.parametrize(
    ("bound", "at_most", "ratio", "verdict"),
    [
        (3.0, False, 3.0, "met"),
        (3.0, False, 2.4, "missed by 20%"),
        (1.3, True, 1.3, "met"),
        (1.3, True, 1.56, "missed by 20%"),
    ],
)
def test_a_promise_is_met_or_missed_by_a_share_of_it(bound: float, at_most: bool, ratio: float, verdict: str) -> None:
    assert script("bench_step_report").Promise("", "", "", bound, at_most).verdict(ratio) == verdict


def test_the_report_says_figures_misses_and_unequal_losses() -> None:
    text = script("bench_step_report").report(
        canned("l1_relu", ours__fp32=[0.2, 0.25, 0.3], dense_twin__fp32=[0.4, 0.5, 0.6])
    )
    assert "| ours, fp32 | 250 | 200 to 300 | 8,192 | 100 | 1.00 |  |" in text
    assert "| dense twin, fp32 | 500 | 400 to 600 | 4,096 | 100 | 2.00 |  |" in text
    assert "| beside its dense twin, fp32 | at least 3 | 2.00 | 2.00 to 2.00 | missed by 33% |" in text
    assert "| beside its dense twin, bf16 | at least 2.5 |  |  | not measured |" in text
    assert "NOT equal within 0.0001 relative (at most 8.0e-04)" in text
    assert "peer 1.0" in text
    assert "used 2% of the machine's cores (median; at most 20%)" in text


def test_the_fit_report_compares_runs_round_by_round() -> None:
    rest = {"logging": 0.001, "checkpoint": 0.5, "with_checkpoints": 0.2}
    fits = [{"seconds": s, "median_step": s, **rest} for s in (0.11, 0.3, 0.13)]
    result = {
        **canned(),
        "precisions": {"fp32": {"bare": [0.1, 0.24, 0.1], "fit": fits}},
        "others": [0.01, 0.5],
        "run_steps": 9,
        "skip": 1,
    }
    text = script("bench_fit").report(result)
    assert "| 0.800 | 0.769 to 0.909 | goal at least 0.9: missed by 11% |" in text
    assert "logging takes 1.000 ms a step, 0.77% of it" in text
    assert "a checkpoint takes 0.50 s: with those of this run a step is 200 ms" in text


def test_a_sweep_shows_every_value_and_leaves_gaps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need it; the dev extra has it")
    sweep = script("bench_step_sweep")
    both = {name: {"seconds": [0.1, 0.2]} for name in ("ours, fp32", "dense twin, fp32")}
    points = [{"value": 512, "contenders": both}, {"value": 1024, "contenders": {"ours, fp32": both["ours, fp32"]}}]
    result = {**canned(), "axis": "d_sae", "points": points}
    text = sweep.report(result, "plot.svg")
    assert "| 512 | 150 | 150 |" in text
    assert "| 1,024 | 150 |  |" in text
    sweep.picture(result, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().count("<svg") == 1
    assert sweep.dense_bytes(tiny(d_in=768, d_sae=131_072, batch=2048)) > 9e9
    with pytest.raises(ConfigError, match="only topk has a k"):
        sweep.sweep(tiny(variant="gated"), "k", "", "", None)


# Profile -------------------------------------------------------------------------------------------------------------


@dataclass
class Event:
    name: str
    cpu_parent: Event | None = None
    self_cpu_time_total: float = 1.0


def test_the_innermost_mark_says_the_part() -> None:
    part_of = script("profile_step").part_of
    forward = Event("part: forward")
    assert part_of(Event("aten::addmm", Event("_Encode", forward))) == "encoder product"
    assert part_of(Event("aten::embedding_bag", forward)) == "decode"
    assert part_of(Event("aten::embedding_bag", Event("part: backward"))) == "weight gradients"
    assert part_of(Event("aten::addmm", Event("part: select", forward))) == "select"
    assert part_of(Event("aten::pow", forward)) == "forward, the rest"
    assert part_of(Event("aten::pow")) == "outside"


def test_a_profile_accounts_for_every_part_of_a_step(tmp_path: Path) -> None:
    profiling = script("profile_step")
    setting = tiny(d_sae=512)
    take = profiling.steps_of(setting, "fp32", rows_of(setting, tmp_path))
    take(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        take(2)
    parts = profiling.by_part(profiler.events())
    assert {"encoder product", "optimizer", "bookkeeping"} <= parts.keys()
    assert all(value >= 0 for value in parts.values())
    assert "outside" not in parts or parts["outside"] < 0.2 * sum(parts.values())
    assert sum(profiling.by_operator(profiler.events()).values()) == pytest.approx(sum(parts.values()))
