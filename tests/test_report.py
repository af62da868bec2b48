"""`saeforge report`: what a page says, what it says of what is missing, and that no text can do anything in it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import saeforge
from saeforge.cli.main import main
from saeforge.errors import CheckpointError, ConfigError, DatasetError
from saeforge.features import FeatureStore
from saeforge.pages.charts import Series, lines
from saeforge.pages.curves import read_curves, thinned
from saeforge.pages.frame import Axes
from saeforge.pages.latents import choose
from saeforge.pages.markup import Markup, data, number, percent, tag, text
from saeforge.pages.scales import Scale
from tests import run_folders
from tests.run_folders import write_features, write_json, write_log, write_run, write_sweep

DASH = "\N{EN DASH}"
HOSTILE = "</script><img src=x onerror=alert(1)>\"'&\u202eevil\u2066\x00\x1b[31m\x85\ud800\uffff<!--"


class Reader(HTMLParser):
    """Elements with their attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if name not in ("meta", "link", "br"):
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name, f"</{name}> closes another element"

    def handle_data(self, words: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(words)


def page_of(*runs: Path, **options: Any) -> str:
    return saeforge.report(*runs, **options).read_text(encoding="utf-8")


def words(html: str) -> str:
    return " ".join(" ".join(Reader(html).words).split())


# What a page says ---------------------------------------------------------------------------------------------------


def test_a_run_is_told_from_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "runs" / "mine")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/report.html\n"
    said = words((run / "report.html").read_text())
    assert "mine 512 latents of topk (k = 32), at layers.3:out of demo , 64 wide, trained on 409,600 tokens." in said
    assert "ΔCE +0.150 [0.140, 0.160] nats per token; the model alone has a loss of 2.400" in said
    assert "FVU 0.120" in said
    assert "their reconstruction 2.550 [2.300, 2.700] +0.150" in said
    assert "their mean (control) 18.00" in said  # the controls stand beside it
    assert "zeros (control) 10.00" in said
    assert "sum |r|^2 / sum |x - mu|^2" in said  # the conventions too
    assert "dead latents 3" in said
    assert "speed 9,000 tokens/s (median)" in said
    assert "in less than 5% of documents" in said
    assert "Labelled (1)" in said
    assert "#7 golden_gate_bridge 0.930" in said
    assert "python *" in said  # a claim that fails is marked, and explained
    assert "more than 0.05 below the difference of means" in said
    assert "sample/english/0001 · english · token 5" in said


def test_every_link_inside_a_page_leads_somewhere(tmp_path: Path) -> None:
    for html in (page_of(write_run(tmp_path / "one"), latents=4), page_of(write_sweep(tmp_path / "eight"))):
        elements = Reader(html).elements
        anchors = [attributes["id"] for _, attributes in elements if "id" in attributes]
        assert len(anchors) == len(set(anchors))
        links = {attributes["href"] for name, attributes in elements if name == "a"}
        assert links <= {f"#{anchor}" for anchor in anchors}


def test_the_token_that_an_example_is_about_is_marked_by_its_strength(tmp_path: Path) -> None:
    html = page_of(write_run(tmp_path / "run"))
    assert '<mark class="h8 centre" title="8.00">Golden</mark>' in html
    assert '<mark class="h3" title="3.00">' in html
    assert '<span class="unknown">The </span>' in html  # nothing is known of it, which is not the same as silence


def test_histograms_show_every_token_and_every_latent_that_fired(tmp_path: Path) -> None:
    html = page_of(write_run(tmp_path / "run"))
    charts = [json.loads(block) for block in re.findall(r'<script type="application/json">(.*?)</script>', html)]
    counts = {chart["items"][0]["rows"][0][0]: chart["items"] for chart in charts if chart["kind"] == "bars"}
    assert sum(item["y"] for item in counts["tokens"]) == 8192
    assert sum(item["y"] for item in counts["latents"]) == 509
    assert counts["tokens"][0]["title"] == "L0 29"


@pytest.mark.parametrize(
    ("lacks", "told"),
    [
        ("evaluation.json", "saeforge evaluate {run}"),
        ("features.sqlite", "saeforge features build {run}"),
        ("concepts.json", "saeforge features concepts {run} --texts demo"),
        ("csv/version_0/metrics.csv", "This run has no CSV log"),
        ("sae/sae.json", "saeforge fit --config {run}/config.yaml --ckpt_path last"),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path: Path, lacks: str, told: str) -> None:
    run = write_run(tmp_path / "run")
    told = told.format(run=run)
    assert told not in words(page_of(run))
    (run / lacks).unlink()
    assert told in words(page_of(run))


def test_an_effect_that_was_not_measured_says_why(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", features=False)
    write_json(run / "evaluation.json", run_folders.evaluation(l0=32, fvu=0.1, delta=None))
    said = words(page_of(run))
    assert "The effect on the model was not measured: no model here." in said
    assert "their reconstruction" not in said


def test_probing_perturbation_and_unknown_parts_of_an_evaluation_are_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", features=False)
    content = json.loads((run / "evaluation.json").read_text())
    score = {"accuracy": {"value": 0.9, "low": 0.8, "high": 0.95}, "auroc": {"value": 0.97, "low": 0.9, "high": 0.99}}
    scores = {"latents": {"1": score}, "residual_top": {"1": score}, "residual": score, "difference_of_means": score}
    label = {"chosen_latents": [7], "chosen_dimensions": [1], "scores": scores}
    content["probing"] = {"mean": scores, "by_label": {"french": label}, "conventions": {"accuracy": "balanced"}}
    drop = {"value": 0.2, "low": 0.1, "high": 0.3}
    content["tpp"] = {"mean": {"2": {"score": drop, "intended": drop, "unintended": drop, "ablated": 2.0}}}
    control = run_folders.evaluation(l0=30, fvu=0.7, delta=4.0) | {"probing": content["probing"]}
    content["controls"] = {"random_sae": {"definition": "random decoder rows", **control}}
    content["novelty"] = {"depth": {"mean": 0.123}, "conventions": {"depth mean": "as measured"}}
    write_json(run / "evaluation.json", content)
    said = words(page_of(run))
    assert "1 latent 0.900 [0.800, 0.950] 0.970 [0.900, 0.990]" in said
    assert "all dimensions (control) 0.900" in said
    assert "2 +0.200 [+0.100, +0.300]" in said
    assert "this SAE 32.2 0.120 +0.150 [+0.140, +0.160]" in said
    assert "random sae 30.2 0.700 +4.00 [+3.99, +4.01] 4.00 0.800 0.900" in said
    assert "random_sae random decoder rows" in said
    assert "novelty figure value depth mean 0.1230 as measured" in said


# Several runs -------------------------------------------------------------------------------------------------------


def test_a_sweep_is_a_frontier_a_table_and_what_differs(tmp_path: Path) -> None:
    run = write_sweep(tmp_path / "eight")
    html = page_of(run)
    points = [json.loads(block) for block in re.findall(r'<script type="application/json">(.*?)</script>', html)]
    fvu, ce = [chart["items"] for chart in points if chart["kind"] == "points"]
    assert len(fvu) == len(ce) == 7
    by_name = {item["title"]: item for item in fvu}
    assert by_name["topk-16"]["x"] == [16.25]
    assert by_name["topk-16"]["y"] == pytest.approx(0.9 / 4)
    assert by_name["gated-32"]["series"] == "gated"
    said = words(html)
    assert "8 autoencoders: topk, gated, l1_relu, at layers.3:out of demo , trained on 409,600 tokens each." in said
    assert f"Not judged yet (1): saeforge evaluate {run}/l1_relu-64" in said
    assert "run variant k model.target_l0 topk-16 topk 16" in said
    assert "gated-32 gated" in said
    assert f"topk-32: to see its latents in their contexts: saeforge features build {run}/topk-32" in said


def test_a_member_of_a_sweep_has_its_own_curves(tmp_path: Path) -> None:
    run = write_sweep(tmp_path / "eight")
    assert "Training This run has no CSV log" not in words(page_of(run / "topk-64"))
    alone = read_curves(run, ["topk-16", "topk-64"])
    assert alone["topk-16"].points["train/fvu"] != alone["topk-64"].points["train/fvu"]
    assert alone["topk-16"].tokens_per_step == alone["topk-64"].tokens_per_step == 1024


def test_several_runs_go_to_the_folder_that_holds_them_and_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / part / "run", features=False) for part in ("a", "b")]
    path = saeforge.report(*runs)
    assert path.resolve() == tmp_path / "report.html"
    said = words(path.read_text())
    assert "a/run" in said
    assert "b/run" in said
    assert "In nothing that is recorded." in said
    assert saeforge.report(runs[0], out=tmp_path / "x" / "y.html") == tmp_path / "x" / "y.html"


def test_the_same_run_twice_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", features=False)
    with pytest.raises(ConfigError, match="given twice"):
        saeforge.report(run, run / "sae")


# Hostile text -------------------------------------------------------------------------------------------------------


def test_no_text_becomes_markup_or_turns_the_page_round(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", features=False)
    write_features(run, tokens=[HOSTILE, HOSTILE, " plain", "<b>", "\n"])
    config = f"model: {{variant: {json.dumps('<script>alert(2)</script>')}}}\n"
    (run / "config.yaml").write_text(config)
    content = json.loads((run / "evaluation.json").read_text())
    content["effect"]["by_label"][HOSTILE] = content["effect"]["by_label"]["french"]
    content["conventions"]["</style>"] = HOSTILE
    write_json(run / "evaluation.json", content)
    card = run_folders.card("topk", k=32)
    card["model"]["name"] = HOSTILE
    write_json(run / "sae" / "sae.json", card)
    html = page_of(run)
    reader = Reader(html)
    names = {name for name, _ in reader.elements}
    assert "img" not in names
    assert "b" in names  # the bar's title alone
    assert [name for name, _ in reader.elements].count("b") == 1
    scripts = [attributes for name, attributes in reader.elements if name == "script"]
    assert [attributes.get("type") for attributes in scripts].count(None) == 1  # the page's own
    for name, attributes in reader.elements:
        assert not any(key.startswith("on") for key in attributes), name
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\uffff]", html)
    assert "⟦U+202E⟧" in "".join(reader.words).replace("\N{LEFT WHITE TORTOISE SHELL BRACKET}", "⟦").replace(
        "\N{RIGHT WHITE TORTOISE SHELL BRACKET}", "⟧"
    )


def test_a_page_of_several_runs_escapes_their_names(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>\"'&"
    runs = [write_run(tmp_path / part, features=False) for part in (name, "b")]
    reader = Reader(page_of(*runs))
    assert "img" not in {element for element, _ in reader.elements}
    assert name in " ".join(reader.words)


def test_a_page_loads_nothing_and_runs_one_script_by_its_digest(tmp_path: Path) -> None:
    for html in (page_of(write_run(tmp_path / "run")), page_of(write_sweep(tmp_path / "eight"))):
        reader = Reader(html)
        for name, attributes in reader.elements:
            for key in ("src", "href", "action", "srcset", "poster", "data", "xlink:href"):
                target = attributes.get(key)
                assert target is None or target.startswith(("#", "data:image/svg+xml,")), (name, target)
            assert name not in ("iframe", "object", "embed", "base", "form", "img")
            assert "style" not in attributes
        css = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
        script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
        assert css
        assert script
        assert not re.search(r"@import|url\(", css[1])
        assert not re.search(r"fetch\(|XMLHttpRequest|import\(|innerHTML|eval\(", script[1])
        (policy,) = [a["content"] for _, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy"]
        assert policy is not None
        assert policy.startswith("default-src 'none'; ")
        for source, content in (("style-src", css[1]), ("script-src", script[1])):
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"{source} 'sha256-{digest}'" in policy


def test_text_is_escaped_by_construction() -> None:
    assert tag("p", "<b>", tag("i", "&"), title='"x"') == '<p title="&quot;x&quot;">&lt;b&gt;<i>&amp;</i></p>'
    assert text(Markup("<b>")) == "<b>"
    written = data({"a": "</script><!--", "b": "\u2028\ud800"})
    inner = re.fullmatch(r'<script type="application/json">(.*)</script>', written)
    assert inner
    assert "<" not in inner[1]
    assert json.loads(inner[1]) == {"a": "</script><!--", "b": "\u2028\ud800"}
    with pytest.raises(ValueError, match="JSON"):
        data([math.nan])


# Damage and misuse --------------------------------------------------------------------------------------------------


def test_what_is_no_run_or_damaged_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for given, error, words_of in (
        (tmp_path / "no", ConfigError, "does not exist"),
        (tmp_path / "empty", ConfigError, "holds no run"),
        ("hf://a/b", ConfigError, "saeforge import hf://a/b"),
    ):
        with pytest.raises(error, match=words_of):
            saeforge.report(given)
    run = write_run(tmp_path / "run", features=False)
    for file, kind in (
        ("evaluation.json", DatasetError),
        ("concepts.json", DatasetError),
        ("sae/sae.json", CheckpointError),
    ):
        before = (run / file).read_text()
        (run / file).write_text(before[:50])
        with pytest.raises(kind, match=f"{file} is damaged"):
            saeforge.report(run)
        (run / file).write_text(before)
    write_json(run / "evaluation.json", {"sae": {}})
    with pytest.raises(DatasetError, match=r"no metrics in it"):
        saeforge.report(run)
    (run / "evaluation.json").unlink()
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged"):
        saeforge.report(run)
    assert not (run / "report.html").exists()


def test_bad_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(write_run(tmp_path / "run", features=False))
    assert main(["report", run, "--latents", "-1"]) == 2
    assert "latents = -1: expected at least 0" in capsys.readouterr().err
    assert main(["report", run, "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert main(["report", run, "--latents", "0"]) == 0
    assert "strongest contexts" not in words((tmp_path / "run" / "report.html").read_text())


# Curves and scales --------------------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_curve_that_a_run_without_interruption_has(tmp_path: Path) -> None:
    write_log(tmp_path / "whole")
    write_log(tmp_path / "resumed", steps=240)
    write_log(tmp_path / "resumed", version=1, first=210)  # from the checkpoint of step 200 on
    write_log(tmp_path / "resumed", version=10, first=310)  # after version 1, though not in the alphabet
    whole, resumed = read_curves(tmp_path / "whole")[""], read_curves(tmp_path / "resumed")[""]
    assert whole.points == resumed.points


def test_a_log_cut_off_in_its_last_line_is_read_up_to_there(tmp_path: Path) -> None:
    write_log(tmp_path)
    (file,) = tmp_path.glob("csv/*/metrics.csv")
    file.write_text(file.read_text()[:-30])
    steps, _ = read_curves(tmp_path)[""].points["train/fvu"]
    assert steps[-1] >= 390
    file.write_text("a,b\n1,2\n")
    with pytest.raises(DatasetError, match="no log of a run"):
        read_curves(tmp_path)


def test_a_thinned_curve_keeps_ends_and_spikes() -> None:
    x, y = [float(i) for i in range(100_000)], [math.sin(i / 9000) for i in range(100_000)]
    y[54_321], y[70_001], y[2] = 50.0, -50.0, math.nan
    thin_x, thin_y = thinned(x, y, 600)
    assert len(thin_x) <= 600
    assert (thin_x[0], thin_x[-1]) == (0.0, 99_999.0)
    assert {50.0, -50.0} <= set(thin_y)
    assert thin_x == sorted(thin_x)
    assert thinned([1.0, 2.0], [3.0, 4.0]) == ([1.0, 2.0], [3.0, 4.0])


def test_values_that_a_scale_cannot_show_break_the_line() -> None:
    chart = lines("x", [Series("a", [1, 2, 3, 4], [1.0, math.nan, 4.0, 8.0])], Axes("x", "y"), log=True)
    paths = re.findall(r' d="(M[^"]*)"', chart)
    assert all(path.count("M") == 2 for path in paths if path != "M1 7H17")
    assert "NaN" not in chart


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0.08, 0.33), (3e-7, 4e5), (16.0, 128.0), (5.0, 5.0), (1.0, 1.0001)])
def test_ticks_are_few_inside_and_distinct(low: float, high: float, log: bool) -> None:
    scale = Scale.of([low, high], 0, 100, log=log)
    ticks = scale.ticks(4)
    assert 2 <= len(ticks) <= 8
    assert all(scale.low <= tick <= scale.high for tick in ticks)
    assert len(set(ticks)) == len(ticks)
    assert 0 <= scale.at(low) <= scale.at(high) <= 100


def test_figures_are_written_for_people() -> None:
    assert [number(v) for v in (None, math.nan, 0, 0.0, 2048, 1234567, 0.1365, 18.391, -0.05, 1e-9)] == [
        DASH, DASH, "0", "0", "2,048", "1,234,567", "0.1365", "18.39", "\N{MINUS SIGN}0.05000", "1.00e\N{MINUS SIGN}9",
    ]  # fmt: skip
    assert number(0.136, 3, sign=True) == "+0.136"
    assert [percent(v) for v in (0, 1, 0.0213, 3e-5, None)] == ["0%", "100%", "2.13%", "0.0030%", DASH]


# The parts that it reads are the ones that are written ----------------------------------------------------------------


def test_the_folders_of_these_tests_have_the_names_of_real_ones() -> None:
    from saeforge.evaluation.effect import EffectMetrics
    from saeforge.evaluation.perturbation import Perturbation, Perturbed
    from saeforge.evaluation.probing import LabelProbes, ProbeScores, Probing
    from saeforge.metrics import Firing, Reconstruction

    mine = run_folders.evaluation(l0=32, fvu=0.1, delta=0.1)
    for kind, found in (
        (Reconstruction, mine["metrics"]),
        (Firing, mine["firing"]),
        (EffectMetrics, mine["effect"]["overall"]),
    ):
        assert set(found) - {"conventions"} == {field.name for field in dataclasses.fields(kind)}
    probing: list[tuple[type, set[str]]] = [
        (Probing, {"mean", "by_label"}),
        (ProbeScores, {"latents", "residual_top", "residual", "difference_of_means"}),
        (LabelProbes, {"chosen_latents", "scores"}),
        (Perturbation, {"mean"}),
        (Perturbed, {"score", "intended", "unintended", "ablated"}),
    ]
    for part, read in probing:
        assert read <= {field.name for field in dataclasses.fields(part)}


def test_a_run_that_was_trained_and_judged_just_now_has_its_figures_on_the_page(tmp_path: Path) -> None:
    from tests.test_fit import arguments
    from tests.toy import toy_dataset

    run = tmp_path / "run"
    logger = {"trainer.logger": "lightning.pytorch.loggers.WandbLogger", "trainer.logger.offline": "true"}
    assert main(arguments(toy_dataset(tmp_path / "acts"), run, **logger)) == 0
    assert main(["evaluate", str(run), "--device", "cpu"]) == 0
    said = words(page_of(run))
    figures = json.loads((run / "evaluation.json").read_text())["metrics"]
    assert f"FVU {number(figures['fvu'], 3)}" in said
    assert "This run has no CSV log" not in said  # wandb has the curves, and so has RUN
    assert "The effect on the model was not measured" in said


def test_a_run_that_is_overwritten_leaves_no_curve_and_no_page(tmp_path: Path) -> None:
    from saeforge.training.run_folder import clear

    run = write_run(tmp_path / "run", features=False)
    saeforge.report(run)
    clear(run)
    assert read_curves(run) == {}
    assert not (run / "report.html").exists()


def test_latents_are_chosen_by_label_then_peak_then_chance(tmp_path: Path) -> None:
    write_features(tmp_path)
    with FeatureStore.open(tmp_path) as store:
        groups = choose(store, 12)
        again = choose(store, 12)
        few = choose(store, 2)
    assert groups == again
    chosen = [latent for group in groups for latent in group.latents]
    assert len(chosen) == len(set(chosen)) == 12
    assert groups[0].latents == (7,)
    assert 0 not in chosen  # it never fired
    assert len(groups[-1].latents) == 3
    assert sum(len(group.latents) for group in few) == 2
