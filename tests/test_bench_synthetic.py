"""The synthetic benchmark: equal L0 by search and interpolation, runs that are saved one by one, the command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import saeforge
from saeforge.benchmark import protocol
from saeforge.benchmark.cells import Cells
from saeforge.benchmark.report import COLUMNS, summarise, table
from saeforge.benchmark.run import following
from saeforge.benchmark.search import TOLERANCE, WIDEST, Knob, between, found, next_value
from saeforge.cli import bench_synthetic as command
from saeforge.cli.main import main
from saeforge.data.synthetic import PRESETS, SyntheticConfig, SyntheticSource, write_rows
from saeforge.errors import ConfigError

TINY = SyntheticConfig(
    features=32, d_in=16, roots=2, branching=2, depth=2, max_rate=0.4, min_rate=0.05, correlation_rank=2
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset that trains in a second."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    small = protocol.Protocol(d_sae=16, samples=20_480, batch_size=512, lr=3e-3)
    monkeypatch.setitem(protocol.PROTOCOLS, "tiny", small)
    monkeypatch.setitem(protocol.L0, "tiny", (3.0,))


class TestSearch:
    @pytest.mark.parametrize(
        ("curve", "knob"),
        [
            (lambda value: 16 / value, Knob("l1", 20.0)),
            (lambda value: 126 * math.exp(-((value / 6) ** 2)), Knob("l1", 2.0)),
            (lambda value: 500 / (1 + value**3), Knob("l1", 0.04)),
            (lambda value: 1.07 * value + 0.3, Knob("target_l0", 8.0, rising=True)),
        ],
    )
    def test_ends_at_the_target_or_close_around_it(self, curve: Any, knob: Knob) -> None:
        points: list[tuple[float, float]] = []
        while (value := next_value(knob, points, 8.0, most=9)) is not None:
            points.append((value, curve(value)))
        pair = found(points, 8.0)
        assert pair is not None
        low, high = (points[number][1] for number in pair)
        assert (low == high and abs(low - 8) <= TOLERANCE) or (low < 8 < high and high - low <= WIDEST * 8)

    @pytest.mark.parametrize("rising", [True, False])
    def test_a_flat_curve_is_followed_by_its_own_slope(self, rising: bool) -> None:
        points: list[tuple[float, float]] = []
        knob = Knob("l0_target", 8.0, rising=rising)
        while (value := next_value(knob, points, 5.9)) is not None:
            points.append((value, 7.3 * (value / 8) ** (0.25 if rising else -0.25)))
        assert found(points, 5.9) is not None
        assert len(points) == 3  # with a slope of 1 it takes eight

    def test_no_setting_is_trained_twice_where_l0_does_not_follow(self) -> None:
        points: list[tuple[float, float]] = []
        while (value := next_value(Knob("l0_target", 8.0, rising=True), points, 8.0)) is not None:
            points.append((value, {8.0: 56.9, 1.08268: 46.0}.get(value, 48.3)))
        values = [value for value, _ in points]
        assert len(values) == len(set(values)) == 7

    def test_an_exact_option_needs_one_run(self) -> None:
        assert next_value(Knob("k", exact=True), [], 8.0) == 8.0
        assert next_value(Knob("k", exact=True), [(8.0, 7.8)], 8.0) is None

    def test_hints_come_first_and_runs_are_bounded(self) -> None:
        knob = Knob("l1", 1.0)
        assert next_value(knob, [], 8.0, hints=[3.0, 4.0]) == 3.0
        assert next_value(knob, [(3.0, 9.0)], 8.0, hints=[3.0, 4.0]) == 4.0
        assert next_value(knob, [(3.0, 90.0), (4.0, 80.0)], 8.0, most=2) is None

    def test_a_curve_on_one_side_only_is_not_interpolated(self) -> None:
        assert found([(1.0, 9.0), (2.0, 8.5)], 8.0) is None
        assert found([(1.0, 9.5), (2.0, 7.0)], 8.0) is None
        assert found([(1.0, 9.0), (2.0, 7.5), (3.0, 20.0)], 8.0) == (1, 0)

    def test_two_around_the_target_come_before_one_beside_it(self) -> None:
        assert found([(1.0, 8.05)], 8.0) == (0, 0)
        assert found([(1.0, 8.05), (2.0, 7.5)], 8.0) == (1, 0)
        assert found([(1.0, 8.05), (2.0, 5.9)], 8.0) == (0, 0)
        assert found([(1.0, 8.0), (2.0, 7.5)], 8.0) == (0, 0)

    def test_numbers_between_two_runs(self) -> None:
        low = {"l0": 7.0, "f1": 0.5, "absorption": None, "dead": 0, "variant": "a"}
        high = {"l0": 9.0, "f1": 0.7, "absorption": 0.2, "dead": 4, "variant": "a"}
        assert between(low, high, 7.5) == pytest.approx({"l0": 7.5, "f1": 0.55, "dead": 1.0})
        assert between(low, low, 7.05) == low

    @pytest.mark.parametrize(
        ("text", "knob"),
        [
            ("k", Knob("k", exact=True, rising=True)),
            ("l1:0.5", Knob("l1", 0.5)),
            ("target_l0:8:rising", Knob("target_l0", 8.0, rising=True)),
        ],
    )
    def test_knobs_are_read(self, text: str, knob: Knob) -> None:
        assert Knob.parse(text) == knob

    @pytest.mark.parametrize("text", ["l1:many", "l1:1:falling", "a:1:rising:2"])
    def test_other_knobs_are_refused(self, text: str) -> None:
        with pytest.raises(ConfigError, match="expected OPTION"):
            Knob.parse(text)


class TestCells:
    def test_come_back_and_refuse_another_setting(self, tmp_path: Path) -> None:
        cells = Cells(tmp_path / "a" / "cells.json", {"lr": 1.0})
        cells.add({"variant": "topk", "seed": 0})
        cells.add({"variant": "topk", "seed": 1})
        again = Cells(cells.path, {"lr": 1.0})
        assert again.of(variant="topk", seed=1) == [{"variant": "topk", "seed": 1}]
        with pytest.raises(ConfigError, match=r"lr = 1\.0, this one has 2\.0"):
            Cells(cells.path, {"lr": 2.0})
        cells.path.write_text("{")
        with pytest.raises(ConfigError, match="is damaged"):
            Cells(cells.path, {"lr": 1.0})

    def test_a_second_l0_uses_the_runs_of_the_first(self, tmp_path: Path) -> None:
        cells = Cells(tmp_path / "cells.json", {})
        knob = Knob("l1", 1.0)
        for value, l0 in ((1.0, 12.0), (2.0, 6.0)):
            cells.add({"variant": "v", "side": "ours", "seed": 0, "target": 12.0, "value": value, "l0": l0})
        assert following(cells, "v", "ours", knob, 12.0, 0) is None
        assert following(cells, "v", "ours", knob, 6.0, 0) is None
        assert following(cells, "v", "ours", knob, 6.0, 1) == 2.0

    def test_summaries_are_means_over_seeds_at_the_target(self, tmp_path: Path) -> None:
        cells = Cells(tmp_path / "cells.json", {})
        common = {"variant": "v", "side": "ours", "exact": False, "seconds": 1.0, "absorption": None}
        for seed, value, l0, f1 in ((0, 1.0, 9.0, 0.4), (0, 2.0, 7.0, 0.6), (1, 2.0, 8.05, 0.7), (2, 1.0, 20.0, 0.1)):
            cells.add({**common, "seed": seed, "value": value, "l0": l0, "f1": f1})
        summary = summarise(cells, "v", 8.0)
        assert summary.values("f1") == pytest.approx([0.5, 0.7])
        assert summary.mean("f1") == pytest.approx(0.6)
        assert summary.deviation("f1") == pytest.approx(math.sqrt(0.02))
        assert summary.missing == (2,)
        heading, row = table([summary])
        assert row[heading.index("F1")] == "0.6000 ± 0.1414"
        assert row[heading.index("absorption")] == "-"
        assert len(heading) == 3 + len(COLUMNS)


@pytest.mark.usefixtures("tiny")
class TestTheBenchmark:
    def test_goes_on_where_it_was_and_learns_something(self, tmp_path: Path) -> None:
        runs: list[dict[str, Any]] = []
        given: dict[str, Any] = {"preset": "tiny", "out": tmp_path, "seeds": 2, "on_run": runs.append}
        (summary,) = saeforge.bench_synthetic(["topk"], **given)
        assert [run["seed"] for run in runs] == [0, 1]
        assert summary.mean("l0") == pytest.approx(3, abs=TOLERANCE)
        # Forty steps: a random dictionary of 16 rows has MCC 0.5 here.
        assert summary.mean("mcc") > 0.55
        again = saeforge.bench_synthetic(["topk"], **given)
        assert len(runs) == 2
        assert again == [summary]
        assert "| topk | 3 | 2 |" in (tmp_path / "report.md").read_text()
        assert "<svg" in (tmp_path / "plot.svg").read_text()
        with pytest.raises(ConfigError, match=r"with options \{\}, these are \{'aux': 0\}"):
            saeforge.bench_synthetic(["topk"], options={"topk": {"aux": 0}}, **given)

    def test_rows_from_disk_are_the_rows_that_are_made(self, tmp_path: Path) -> None:
        write_rows(SyntheticSource(TINY, rows=20_480), tmp_path / "rows")
        made = saeforge.bench_synthetic(["topk"], preset="tiny", out=tmp_path / "a", seeds=1)
        read = saeforge.bench_synthetic(["topk"], preset="tiny", out=tmp_path / "b", seeds=1, data=tmp_path / "rows")
        assert made[0].mean("f1") == read[0].mean("f1")

    def test_penalties_are_searched(self, tmp_path: Path) -> None:
        (summary,) = saeforge.bench_synthetic(["l1_relu"], preset="tiny", out=tmp_path, seeds=1)
        assert summary.missing == ()
        assert summary.mean("l0") == pytest.approx(3, abs=TOLERANCE)

    def test_the_command(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        argv = ["bench-synthetic", "--preset", "tiny", "--seeds", "1", "--out", str(tmp_path)]
        assert main([*argv, "--variants", "[topk]", "--set", "topk.aux=0", "--set=topk.pre_bias=false"]) == 0
        printed = capsys.readouterr().out
        assert "topk         seed 0  setting 3  L0 3.00" in printed
        assert "report.md" in printed
        (cell,) = json.loads((tmp_path / "results.json").read_text())["cells"]
        assert cell["options"] == {"aux": 0, "pre_bias": False}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--preset", "huge"], "preset 'huge'"),
            (["--seeds", "0"], "seeds = 0"),
            (["--set", "topk=1"], "expected VARIANT.OPTION=VALUE"),
            (["--set"], "--set needs a value"),
            (["--knob", "topk"], "expected VARIANT=OPTION"),
            (["--variants", "[topk]", "--set", "gated.l1=1"], "options of 'gated'"),
            (["--variants", "[topk]", "--set", "topk.colour=1"], "colour"),
            (["--variants", "[topkk]"], "topk"),
            (["--seed", "1"], "did you mean 'seeds'"),
        ],
    )
    def test_mistakes_are_one_line(
        self, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["bench-synthetic", "--preset", "tiny", "--out", str(tmp_path / "x"), *arguments]) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1


def test_what_sets_the_l0_of_a_variant() -> None:
    assert protocol.knob_of("topk", {}, {}, 8.0) == Knob("k", exact=True, rising=True)
    assert protocol.knob_of("l1_relu", {}, {}, 8.0) == Knob("l1", 5.0)
    assert protocol.knob_of("l1_relu", {}, {"l1": 3.0}, 8.0) == Knob("l1", 3.0)
    assert protocol.knob_of("gated", {"gated": "l1:3"}, {}, 8.0) == Knob("l1", 3.0)


def test_arguments_that_repeat_become_one_list() -> None:
    gathered = command._gathered(["--set", "a.b=1", "--seeds", "1", "--set=a.c=[1, 2]", "--knob", "a=k"])
    assert gathered == ["--seeds", "1", '--set=["a.b=1", "a.c=[1, 2]"]', '--knob=["a=k"]']


def test_the_peers_script_imports_nothing_of_saeforge() -> None:
    script = Path(__file__).parents[1] / "scripts" / "bench_synthetic_peer.py"
    code = f"import sys; sys.path.insert(0, {str(script.parent)!r}); import bench_synthetic_peer; "
    code += "sys.exit(any(name.startswith('saeforge') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)
