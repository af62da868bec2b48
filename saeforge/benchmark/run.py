"""`bench_synthetic()`: variants on synthetic activations, at the same L0, over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from saeforge.benchmark.cells import Cells
from saeforge.benchmark.protocol import L0, PROTOCOLS, Protocol, judge, knob_of, train_one
from saeforge.benchmark.report import Summary, markdown, plot, summarise, table
from saeforge.benchmark.search import Knob, found, next_value
from saeforge.data.synthetic import PRESETS, SyntheticFiles, SyntheticSource
from saeforge.data.synthetic.source import BLOCK_ROWS
from saeforge.errors import ConfigError
from saeforge.evaluation.ground_truth import CONVENTIONS
from saeforge.registry import VARIANTS

#: Runs per variant, L0 and seed, at most: what is not at its L0 by then is reported as missing.
MOST_RUNS = 8


def bench_synthetic(
    variants: Sequence[str] | None = None,
    *,
    preset: str = "small",
    out: str | Path = "bench-synthetic",
    l0: Sequence[float] | None = None,
    seeds: int = 3,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    knobs: Mapping[str, str] | None = None,
    data: str | Path | None = None,
    samples: int | None = None,
    batch_size: int | None = None,
    d_sae: int | None = None,
    lr: float | None = None,
    precision: str | None = None,
    progress: bool = False,
    on_run: Callable[[dict[str, Any]], None] | None = None,
) -> list[Summary]:
    """Trains variants on activations with known features and judges them by these, at equal L0.

    Writes OUT/results.json after every run (the same call goes on where it was), then OUT/report.md and OUT/plot.svg.

    Args:
        variants: entry-point names; default: all that are installed and whole.
        preset: "small" (2,048 features, for two CPU cores) or "16k" (SynthSAEBench-16k, for a GPU).
        out: folder.
        l0: wanted L0 of the saved SAEs; default: the preset's.
        seeds: runs of everything, with seeds 0, 1, ...
        options: of variants, by name: `{"topk": {"aux": 0}}`.
        knobs: the option that sets a variant's L0, by name, as `Knob.parse` reads it; known ones may be left out.
        data: folder of `write_rows`; default: rows are made while training.
        samples: rows of a run. batch_size: rows of a step. d_sae: latents. lr: constant learning rate. precision:
            "32-true" or "bf16-mixed". Default: the preset's.
        progress: show a progress bar for every run.
        on_run: called with the record of every run that is done.

    Returns:
        One summary per variant and L0.

    Raises:
        ConfigError: an unknown preset or option, or OUT holds another benchmark. PluginError: an unknown variant.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
    if seeds < 1:
        raise ConfigError(f"seeds = {seeds}: expected at least 1")
    names = list(variants or [record.name for record in VARIANTS.records() if record.status in ("ok", "unloaded")])
    given = {"samples": samples, "batch_size": batch_size, "d_sae": d_sae, "lr": lr, "precision": precision}
    chosen = {key: value for key, value in given.items() if value is not None}
    protocol = Protocol(**{**PROTOCOLS[preset].to_json(), **chosen})
    targets = tuple(l0 or L0[preset])
    every = {name: dict((options or {}).get(name, {})) for name in names}
    for kind, stray in (
        ("options", (options or {}).keys() - every.keys()),
        ("knob", (knobs or {}).keys() - every.keys()),
    ):
        if stray:
            raise ConfigError(f"{kind} of {sorted(stray)[0]!r}, which is not among the variants: {', '.join(names)}")
    levers = {name: knob_of(name, knobs or {}, every[name], targets[0]) for name in names}
    source: SyntheticFiles | SyntheticSource
    if data is None:
        # A run shorter than a block of each lane reads the first rows of them.
        source = SyntheticSource(PRESETS[preset], rows=max(protocol.samples, 8 * BLOCK_ROWS))
    else:
        source = SyntheticFiles(data, rows=protocol.samples)
    out = Path(out)
    header = {"preset": preset, "protocol": protocol.to_json(), "data": source.fingerprint, "conventions": CONVENTIONS}
    cells = Cells(out / "results.json", header)
    for name in names:
        held = cells.of(variant=name)
        if held and held[0]["options"] != every[name]:
            raise ConfigError(
                f"{out} holds runs of {name} with options {held[0]['options']}, these are {every[name]}; "
                "remove it or give another folder"
            )
    for seed in range(seeds):
        for target in targets:
            for name in names:
                while (value := following(cells, name, "ours", levers[name], target, seed)) is not None:
                    knob = levers[name]
                    setting = {knob.option: int(value) if knob.exact else value}
                    sae, seconds = train_one(
                        source, protocol, name, {**every[name], **setting}, seed, progress=progress
                    )
                    about = {
                        "variant": name,
                        "side": "ours",
                        "seed": seed,
                        "target": target,
                        "value": value,
                        "exact": knob.exact,
                    }
                    record = {**about, "options": every[name], "seconds": seconds, **judge(sae, source)}
                    cells.add(record)
                    if on_run is not None:
                        on_run(record)
    summaries = [summarise(cells, name, target) for name in names for target in targets]
    write_report(cells, summaries, names, out)
    return summaries


def following(cells: Cells, variant: str, side: str, knob: Knob, target: float, seed: int) -> float | None:
    """The setting to train next for one side; other seeds begin with the first one's last neighbours."""
    runs = cells.of(variant=variant, side=side, seed=seed)
    if knob.exact:
        return None if any(run["value"] == target for run in runs) else target
    hints: list[float] = []
    if seed:
        first = [(run["value"], run["l0"]) for run in cells.of(variant=variant, side=side, seed=0)]
        pair = found(first, target)
        hints = [] if pair is None else [first[number][0] for number in dict.fromkeys(pair)]
    # Runs that were made for another L0 serve this one too, and do not count against it.
    points = [(run["value"], run["l0"]) for run in runs]
    made = sum(run.get("target", target) == target for run in runs)
    return next_value(knob, points, target, hints=hints, most=MOST_RUNS + len(points) - made)


def write_report(cells: Cells, summaries: Sequence[Summary], variants: Sequence[str], out: Path) -> None:
    """OUT/report.md and OUT/plot.svg."""
    header = cells.content["header"]
    protocol = header["protocol"]
    lines = [
        f"# Known features: {', '.join(variants)}",
        "",
        f"Preset `{header['preset']}`, {protocol['d_sae']:,} latents, {protocol['samples']:,} rows in batches of "
        f"{protocol['batch_size']:,}, lr {protocol['lr']:g}, {protocol['precision']}. Mean ± standard deviation over "
        "seeds. L0 is that of the saved SAE on held-out rows; where a penalty sets it, measures are interpolated "
        "linearly between the two runs around the wanted L0.",
        "",
        markdown(table(summaries)),
        *(f"* {name}: {meaning}." for name, meaning in CONVENTIONS.items()),
    ]
    for summary in summaries:
        for seed in summary.missing:
            lines.append(
                f"\n{summary.variant}, seed {seed}: no run near L0 {summary.target:g} within {MOST_RUNS} runs."
            )
    (out / "report.md").write_text("\n".join(lines) + "\n")
    plot(cells, variants, out / "plot.svg")
