"""The grammar of edits, and the sizes of latents that its units are measured in."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import pytest

from saeforge.errors import ConfigError, DatasetError
from saeforge.features.schema import FORMAT, FORMAT_VERSION, create
from saeforge.features.store import STORE_FILE, sae_digest
from saeforge.sae import SAE
from saeforge.steering import (
    Add,
    Clamp,
    Edit,
    LatentScales,
    Scale,
    format_edits,
    parse_edit,
    parse_edits,
    read_scales,
)
from tests.causal_models import make_sae


@pytest.mark.parametrize(
    ("text", "latent", "edit"),
    [
        ("123=clamp:0", 123, Clamp(0)),
        ("456=scale:4", 456, Scale(4)),
        ("789=add:0.5p99", 789, Add(0.5, "p99")),
        ("123=clamp:-2max", 123, Clamp(-2, "max")),
        ("123=clamp:0:active", 123, Clamp(0, when_active=True)),
        ("0=clamp:-1.5p99:active", 0, Clamp(-1.5, "p99", when_active=True)),
        ("7=clamp:3abs", 7, Clamp(3)),
        ("7=scale:-.5", 7, Scale(-0.5)),
        ("7=add:1e-3max", 7, Add(0.001, "max")),
        (" 7 = add:+2. ", 7, Add(2)),
    ],
)
def test_texts_of_the_grammar(text: str, latent: int, edit: Edit) -> None:
    assert parse_edit(text) == (latent, edit)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "LATENT=EDIT"),
        ("clamp:0", "LATENT=EDIT"),
        ("-1=clamp:0", "LATENT=EDIT"),
        ("1.5=clamp:0", "LATENT=EDIT"),
        ("²=clamp:0", "LATENT=EDIT"),
        ("1=clamp", "clamp:VALUE"),
        ("1=clamp:", "clamp:VALUE"),
        ("1=clamp:nan", "clamp:VALUE"),
        ("1=clamp:2p98", "clamp:VALUE"),
        ("1=clamp:0:always", "clamp:VALUE"),
        ("1=mul:2", "unknown kind 'mul'"),
        ("1=scale:2max", "without max"),
        ("1=scale:2:active", "only clamp takes :active"),
        ("1=add:2:active", "only clamp takes :active"),
        ("1=add:1e999", "finite"),
    ],
)
def test_what_is_not_of_the_grammar_is_one_line_with_the_text(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_edit(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_edits_and_their_texts_are_each_others_inverse() -> None:
    rng = random.Random(0)
    edits: dict[int, Edit] = {}
    for latent in range(300):
        value = rng.choice([0, -1, 1, 3.5, rng.gauss(0, 1), 10 ** rng.uniform(-30, 30)])
        unit = rng.choice(["abs", "max", "p99"])
        kinds: list[Edit] = [Clamp(value, unit, rng.random() < 0.5), Scale(value), Add(value, unit)]  # type: ignore[arg-type]
        edits[latent] = rng.choice(kinds)
    assert parse_edits(format_edits(edits)) == edits
    assert format_edits({123: Clamp(0), 4: Add(0.5, "p99")}) == ["123=clamp:0", "4=add:0.5p99"]


def test_one_latent_takes_one_edit() -> None:
    with pytest.raises(ConfigError, match=r"latent 5 is edited twice \(clamp:0 and scale:2\)"):
        parse_edits(["5=clamp:0", "6=scale:2", "5=scale:2"])


@pytest.mark.parametrize("edits", [{"5": Clamp(0)}, {5: 0.0}, {True: Clamp(0)}, [5], [("5", Clamp(0))]])
def test_other_objects_are_refused(edits: object) -> None:
    with pytest.raises(ConfigError, match="edits:"):
        parse_edits(edits)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "2", True])
def test_values_are_finite_numbers(value: float) -> None:
    for make in (Clamp, Scale, Add):
        with pytest.raises(ConfigError, match="finite number"):
            make(value)
    with pytest.raises(ConfigError, match="unit is 'mean'"):
        Clamp(1, "mean")  # type: ignore[arg-type]


def write_store(run: Path, sae: SAE) -> Path:
    """A RUN folder with an SAE and features: latent 0 fires, all others never do."""
    sae.save(run / "sae")
    meta = {"format": FORMAT, "format_version": FORMAT_VERSION, "d_sae": sae.d_sae, "sae_digest": sae_digest(run)}
    rows = [(n, 0, 0.0, 0.0, 0.0, 0.0, 0, "{}") for n in range(1, sae.d_sae)]
    with contextlib.closing(create(run / STORE_FILE)) as store, store:
        store.executemany("INSERT INTO latents VALUES (?, ?, ?, ?, ?, ?, ?, ?)", [FIRES, *rows])
        store.executemany("INSERT INTO meta VALUES (?, ?)", [(key, json.dumps(value)) for key, value in meta.items()])
    return run


FIRES = (0, 9, 0.1, 1.0, 8.0, 4.0, 2, "{}")  # latent, count, density, mean, max, p99, documents, histogram


def test_sizes_come_from_the_features_of_the_run(tmp_path: Path) -> None:
    run = write_store(tmp_path / "run", make_sae("topk"))
    expected = LatentScales({0: 8.0}, {0: 4.0})
    assert read_scales(run, [0]) == expected
    assert read_scales(run, [0, 3]) == expected
    assert read_scales(run / "sae", [0]) == expected
    assert (expected.size(0, "max"), expected.size(0, "p99")) == (8.0, 4.0)


def test_sizes_that_are_not_known_are_one_line(tmp_path: Path) -> None:
    run = write_store(tmp_path / "run", make_sae("topk"))
    with pytest.raises(ConfigError, match="latent 3: its p99 is not known"):
        read_scales(run, [3]).size(3, "p99")
    with pytest.raises(ConfigError, match="latent 4: its max is 0, expected above 0"):
        LatentScales({4: 0.0}).size(4, "max")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"saeforge features build .*empty"):
        read_scales(tmp_path / "empty", [0])
    make_sae("topk", seed=1).save(run / "sae")
    with pytest.raises(DatasetError, match="another SAE"):
        read_scales(run, [0])
