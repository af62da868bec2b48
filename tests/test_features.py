"""`saeforge features`: the store equals a dense computation, survives interruption, and is found and shown."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeforge.cli.main import main
from saeforge.data.imports import import_activations
from saeforge.data.shard_source import ShardSource
from saeforge.data.shards import ActivationDataset
from saeforge.data.writer import write_dataset
from saeforge.errors import ConfigError, DatasetError
from saeforge.features import FeatureStore, Label, build_features
from saeforge.features import build as build_module
from saeforge.features.aggregate import Aggregate
from saeforge.features.store import progress_file
from saeforge.features.terminal import histogram_bars, mark, render
from saeforge.harvest import harvest
from saeforge.lm.load import load_tokenizer
from saeforge.sae import SAE
from tests.tiny_models import D, make_documents, save_model, write_jsonl, write_text_folder

D_SAE = 96
RULES = ("topk", "threshold")


def make_sae(rule: str, meta: dict[str, Any], *, d_sae: int = D_SAE, seed: int = 0) -> SAE:
    """A random SAE with some latents that never fire and one that always does (for the threshold rule)."""
    generator = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(d_sae, D, generator=generator)
    b_enc = torch.randn(d_sae, generator=generator)
    b_enc[:3] = -1e6
    b_enc[3] = 50
    threshold = torch.full((d_sae,), 6.0) if rule == "threshold" else None
    k = 5 if rule == "topk" else None
    chosen: Any = rule
    return SAE(W_enc, b_enc, W_enc.clone(), torch.zeros(D), rule=chosen, threshold=threshold, k=k, meta=meta)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a dataset of about 5,000 rows, and a run of each rule."""
    home = tmp_path_factory.mktemp("features")
    save_model("llama", home / "llama")
    documents = make_documents(140, words=80)
    write_text_folder(home / "text", documents)
    harvest(
        model=str(home / "llama"),
        sites=["resid_post.1"],
        out=str(home / "acts"),
        text=str(home / "text"),
        n_tokens=11_000,
        context_length=64,
        batch_contexts=8,
        store_dtype="float32",
        validation_share=0.35,
        bucket_rows=2048,
        device="cpu",
    )
    meta = ShardSource(str(home / "acts"), input="resid_post.1").pairs[0].identity
    for rule in RULES:
        make_sae(rule, meta).save(home / rule / "sae")
        build_features(home / rule, device="cpu", unit_rows=1000)
    return home


def read_dense(path: Path, sae: SAE, splits: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """All latents of a dataset (rows, d_sae), from one product, and the provenance."""
    dataset = ActivationDataset.open(path)
    blocks = [(split, i) for split in splits for i in range(dataset.n_blocks(split))]
    x = torch.cat([dataset.read_block(*block) for block in blocks]).float()
    return sae.encode(x).to_dense().numpy(), np.concatenate([dataset.read_rows(*block) for block in blocks])


def document_tokens(path: Path) -> dict[int, np.ndarray]:
    """Token ids of each document (a document that is cut at the budget only as far as it was cut)."""
    found: dict[int, dict[int, int]] = {}
    for split in ("train", "validation"):
        arrays = [np.load(path / "tokens" / f"{split}.{name}.npy") for name in ("documents", "positions", "tokens")]
        for document, position, token in zip(*(array.tolist() for array in arrays), strict=True):
            if position != 0xFFFFFFFF:
                found.setdefault(document, {})[position] = token
    return {d: np.array([places[p] for p in range(len(places))]) for d, places in found.items()}


def check_store(run: Path, dense: np.ndarray, rows: np.ndarray, room: int, latents: range | list[int]) -> None:
    """Statistics and strongest contexts of some latents against the dense matrix."""
    with FeatureStore.open(run) as store:
        names = dict(store._db.execute("SELECT id, name FROM documents").fetchall())
        for latent in latents:
            column = dense[:, latent]
            active = np.flatnonzero(column)
            feature = store.latent(latent)
            assert feature.count == len(active)
            assert feature.density == pytest.approx(len(active) / len(dense), rel=1e-12)
            assert feature.documents == len(np.unique(rows[active, 0]))
            assert feature.max == pytest.approx(column.max(), rel=1e-5)
            assert sum(feature.histogram.values()) == feature.count
            if len(active) == 0:
                assert store.top(latent) == []
                assert not any(store.samples(latent))
                continue
            values = np.sort(column[active])
            assert feature.mean == pytest.approx(values.astype(np.float64).mean(), rel=1e-5)
            assert feature.p99 == pytest.approx(values[math.ceil(0.99 * len(values)) - 1], rel=1 / 32)
            best: dict[tuple[int, int], tuple[float, int, int]] = {}
            for row in active:
                document, position = map(int, rows[row, :2])
                entry = (-float(column[row]), document, position)
                segment = (document, position // room)
                best[segment] = min(best.get(segment, entry), entry)
            expected = sorted(best.values())[:20]
            top = store.top(latent)
            assert [example.value for example in top] == pytest.approx([-value for value, _, _ in expected], rel=1e-5)
            # Values that agree to the last bits may change places between two products of other shapes.
            gaps = np.diff([value for value, _, _ in sorted(best.values())[:21]])
            if len(gaps) == 0 or gaps.min() > 1e-4:
                assert [(e.document, e.position) for e in top] == [(names[d], p) for _, d, p in expected]
            octave = math.floor(math.log2(column.max()))
            counts = np.zeros(5, dtype=int)
            for value in values:
                counts[min(octave - math.floor(math.log2(value)), 4)] += 1
            found = store.samples(latent)
            assert [len(part) for part in found] == [min(count, 5) for count in counts]
            for which, part in enumerate(found):
                assert all(min(octave - math.floor(math.log2(e.value)), 4) == which for e in part)


@pytest.mark.parametrize("rule", RULES)
def test_the_store_equals_a_dense_computation(home: Path, rule: str) -> None:
    sae = SAE.load(home / rule / "sae")
    dense, rows = read_dense(home / "acts", sae, ("train", "validation"))
    assert 4000 < len(dense)
    assert (dense[:, :3] == 0).all()
    check_store(home / rule, dense, rows, 63, range(D_SAE))


@pytest.mark.parametrize("rule", RULES)
def test_windows_hold_the_right_tokens_and_values(home: Path, rule: str) -> None:
    sae = SAE.load(home / rule / "sae")
    dense, rows = read_dense(home / "acts", sae, ("train", "validation"))
    row_of = {(int(d), int(p)): number for number, (d, p) in enumerate(rows[:, :2])}
    tokens = document_tokens(home / "acts")
    tokenizer = load_tokenizer(str(home / "llama"))
    unknown = 0
    with FeatureStore.open(home / rule) as store:
        ids = {name: number for number, name in store._db.execute("SELECT id, name FROM documents")}
        for latent in range(D_SAE):
            for example in [*store.top(latent), *(e for part in store.samples(latent) for e in part)]:
                document, centre = ids[example.document], example.position
                start = centre - centre % 63
                first = max(start, centre - 24)
                last = min(start + 63, centre + 25, len(tokens[document]))
                assert "".join(example.tokens) == tokenizer.decode(tokens[document][first:last])
                assert len(example.tokens) == len(example.values) == last - first
                assert example.centre == centre - first
                assert example.values[example.centre] == pytest.approx(example.value, rel=1e-5)
                for position, value in zip(range(first, last), example.values, strict=True):
                    number = row_of.get((document, position))
                    if number is None:  # among the rows that did not fill a block, or behind the budget
                        assert value is None
                        unknown += 1
                    else:
                        assert value is not None
                        assert value == pytest.approx(dense[number, latent], rel=1e-5, abs=1e-6)
    assert unknown > 0


def contents(run: Path) -> dict[str, list[Any]]:
    """Every row of every table."""
    with contextlib.closing(sqlite3.connect(run / "features.sqlite")) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: connection.execute(f"SELECT * FROM {name}").fetchall() for name in sorted(tables)}


def copy_run(source: Path, target: Path) -> Path:
    SAE.load(source / "sae").save(target / "sae")
    return target


def test_the_result_does_not_depend_on_the_size_of_steps(home: Path, tmp_path: Path) -> None:
    run = copy_run(home / "threshold", tmp_path / "run")
    build_features(run, device="cpu", unit_rows=333)
    found, expected = contents(run), contents(home / "threshold")
    latents = np.array([row[:7] for row in found["latents"]])
    np.testing.assert_allclose(latents, np.array([row[:7] for row in expected["latents"]]), rtol=1e-5)
    with FeatureStore.open(run) as one, FeatureStore.open(home / "threshold") as other:
        for latent in range(D_SAE):
            samples = [(e.document, e.position) for part in one.samples(latent) for e in part]
            assert samples == [(e.document, e.position) for part in other.samples(latent) for e in part]


@pytest.mark.parametrize("stage", ["statistics", "windows", "writing"])
@pytest.mark.parametrize("rule", RULES)
def test_an_interrupted_build_goes_on_to_the_same_store(home: Path, tmp_path: Path, rule: str, stage: str) -> None:
    run = copy_run(home / rule, tmp_path / "run")

    def stop(now: str, done: int, total: int) -> None:
        if now == stage and done >= min(3, total):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_features(run, device="cpu", unit_rows=1000, save_seconds=0, on_progress=stop)
    assert not (run / "features.sqlite").exists()
    with pytest.raises(DatasetError, match="the same command goes on"):
        FeatureStore.open(run)
    seen: list[tuple[str, int]] = []
    built = build_features(run, device="cpu", unit_rows=1000, on_progress=lambda *args: seen.append(args[:2]))
    assert built.resumed
    assert ("statistics", 0) not in seen
    assert (("windows", 0) in seen) == (stage == "statistics")
    assert contents(run) == contents(home / rule)
    assert sorted(path.name for path in run.iterdir()) == ["features.sqlite", "sae"]


KILLED = """
import os, signal, sys
from saeforge.features import build_features
def stop(stage, done, total):
    if (stage, done) == ("windows", 2):
        os.kill(os.getpid(), signal.SIGKILL)
build_features(sys.argv[1], device="cpu", unit_rows=1000, save_seconds=0, on_progress=stop)
"""


def test_a_killed_build_goes_on_to_the_same_store(home: Path, tmp_path: Path) -> None:
    run = copy_run(home / "topk", tmp_path / "run")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(run)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    torch.set_num_threads(1)
    assert build_features(run, device="cpu", unit_rows=1000).resumed
    assert contents(run) == contents(home / "topk")


def test_an_interrupted_build_from_text_goes_on_to_the_same_store(home: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "texts.jsonl", make_documents(200, words=20, seed=6))
    options: dict[str, Any] = {"texts": str(tmp_path / "texts.jsonl"), "device": "cpu", "save_seconds": 0}
    whole, run = copy_run(home / "topk", tmp_path / "whole"), copy_run(home / "topk", tmp_path / "run")
    build_features(whole, **options)

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("windows", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_features(run, **options, on_progress=stop)
    assert build_features(run, **options).resumed
    assert contents(run) == contents(whole)


def test_a_store_is_shown_without_torch(home: Path) -> None:
    code = (
        "import sys; from saeforge.cli.main import main; "
        f"code = main(['features', 'show', {str(home / 'topk')!r}, '10']); "
        "print('torch' in sys.modules, 'transformers' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_a_finished_store_is_kept_and_other_options_need_overwrite(home: Path, tmp_path: Path) -> None:
    run = copy_run(home / "topk", tmp_path / "run")
    assert not build_features(run, device="cpu", split="validation").reused
    before = (run / "features.sqlite").stat().st_mtime_ns
    again = build_features(run, device="cpu", split="validation")
    assert again.reused
    with FeatureStore.open(run) as store:
        assert (again.tokens, again.latents) == (store.meta["tokens"], D_SAE)
    assert (run / "features.sqlite").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"another seed; .*--overwrite"):
        build_features(run, device="cpu", split="validation", seed=1)
    with FeatureStore.open(run) as store:
        store.add_labels("concepts", [(5, "french", 0.9)])
    assert not build_features(run, device="cpu", split="validation", seed=1, overwrite=True).reused
    with FeatureStore.open(run) as store:  # of the same SAE, so that they still hold
        assert [hit.latent for hit in store.search("french")] == [5]


def test_only_the_tokens_asked_for_are_read(home: Path, tmp_path: Path) -> None:
    run = copy_run(home / "threshold", tmp_path / "run")
    dataset = ActivationDataset.open(home / "acts")
    size = dataset.block_rows("train")
    built = build_features(run, device="cpu", split="train", max_tokens=5 * size + 1)
    assert built.tokens == 5 * size
    x = torch.cat([dataset.read_block("train", i) for i in range(5)]).float()
    counts = SAE.load(run / "sae").encode(x).active_counts()
    with FeatureStore.open(run) as store:
        np.testing.assert_array_equal(store.column("count"), counts.numpy())
        assert {row[0] for row in store._db.execute("SELECT DISTINCT split FROM documents")} == {"train"}


def test_features_of_text_equal_those_of_the_plain_model(home: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    run = copy_run(home / "threshold", tmp_path / "run")
    texts = make_documents(70, words=16, seed=5)
    write_jsonl(tmp_path / "texts.jsonl", texts)
    built = build_features(run, texts=str(tmp_path / "texts.jsonl"), device="cpu")
    sae, tokenizer = SAE.load(run / "sae"), load_tokenizer(str(home / "llama"))
    model = AutoModel.from_pretrained(home / "llama")
    parts, rows = [], []
    with torch.no_grad():
        for number, text in enumerate(texts):
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            hidden = model(ids, output_hidden_states=True).hidden_states[2][0, 1:]
            parts.append(sae.encode(hidden).to_dense().numpy())
            rows.append([(number, position, int(ids[0, position + 1]), 0) for position in range(len(hidden))])
    dense = np.concatenate(parts)
    assert built.tokens == len(dense)
    check_store(run, dense, np.concatenate([np.array(part) for part in rows]), 127, range(D_SAE))
    with FeatureStore.open(run) as store:
        example = store.top(10)[0]
        assert example.label in ("l0", "l1")
        assert None not in example.values


def test_search_finds_words_that_a_latent_fires_on_and_labels(home: Path) -> None:
    run = home / "threshold"
    with FeatureStore.open(run) as store:
        hits = store.search("mat", limit=D_SAE)
        assert hits
        for hit in hits:
            texts = ["".join(e.tokens) for e in store.top(hit.latent)]
            assert any("mat" in text.split() for text in texts)
            assert "⟦mat⟧" in hit.snippet
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        assert store.search("zebra") == []
        assert store.search('"mat zebra"') == []
        store.add_labels("hand", [Label(7, "Golden Gate zebra", None, {"by": "me"}), Label(0, "zebra mat", 0.5)])
        assert {hit.latent for hit in store.search("zebra")} == {0, 7}  # latent 0 never fires
        assert "⟦zebra⟧" in store.search("golden zebra")[0].snippet
        assert store.latent(0).labels[0]["label"] == "zebra mat"
        assert store.latent(7).labels == [
            {"source": "hand", "label": "Golden Gate zebra", "score": None, "detail": {"by": "me"}}
        ]
        store.add_labels("hand", [(8, "giraffe", 0.25)])
        assert store.search("zebra") == []
        assert [hit.latent for hit in store.search("GIRAFFE")] == [8]
        store.add_labels("hand", [])
        assert store.search("giraffe") == []
        with pytest.raises(ConfigError, match="no latent 96"):
            store.add_labels("hand", [(96, "x", None)])


@pytest.mark.parametrize(
    "query",
    [
        "def __init__",
        '"',
        '""',
        "a AND",
        "NOT",
        "mat*",
        "col:x",
        "^the",
        "(",
        "the -cat",
        "x'; DROP TABLE latents",
        "日本",
    ],
)
def test_any_query_is_an_answer_or_one_line(home: Path, query: str) -> None:
    with FeatureStore.open(home / "topk") as store:
        if any(char.isalnum() for char in query):
            assert isinstance(store.search(query), list)
        else:
            with pytest.raises(ConfigError, match="nothing to search for"):
                store.search(query)


@pytest.mark.parametrize("query", ["${mat}", "${run}", "\\${mat} [the] {red: mat}", "null mat", "a: ${mat"])
def test_the_command_line_takes_a_query_as_it_is(home: Path, query: str, capsys: pytest.CaptureFixture[str]) -> None:
    with FeatureStore.open(home / "topk") as store:
        expected = [hit.latent for hit in store.search(query, 5)]
    assert main(["features", "search", str(home / "topk"), query, "--limit", "5", "--json"]) == 0
    assert [hit["latent"] for hit in json.loads(capsys.readouterr().out)] == expected


def test_any_number_may_be_asked_for(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, many = str(home / "topk"), str(10**30)
    assert main(["features", "show", run, "10", "--top", many, "--around", many]) == 0
    assert main(["features", "list", run, "--limit", many]) == 0
    assert main(["features", "search", run, "mat", "--limit", many]) == 0


def test_show_search_and_list_print(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(home / "threshold")
    assert main(["features", "show", run, "10", "--top", "3"]) == 0
    shown = capsys.readouterr().out
    assert "latent 10 of 96: fired on" in shown
    assert "p99" in shown
    assert "⟦" in shown
    assert "samples: the octave of the maximum" in shown
    assert "\x1b" not in shown
    assert main(["features", "show", run, "0"]) == 0
    assert "never fired" in capsys.readouterr().out
    assert main(["features", "show", run, "10", "--json", "--top", "2"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert len(content["top"]) == 2
    assert main(["features", "search", run, "mat hills"]) == 0
    assert "⟦mat⟧" in capsys.readouterr().out
    assert main(["features", "list", run, "--sort", "max", "--limit", "4", "--json"]) == 0
    maxima = [feature["max"] for feature in json.loads(capsys.readouterr().out)]
    assert maxima == sorted(maxima, reverse=True)
    assert len(maxima) == 4
    assert main(["features", "list", run]) == 0
    assert "density" in capsys.readouterr().out
    assert main(["features", "build", run, "--device", "cpu"]) == 2  # another unit_rows than the fixture's
    assert "unit_rows" in capsys.readouterr().err


def test_a_terminal_gets_colours_by_strength(home: Path) -> None:
    from rich.console import Console

    with FeatureStore.open(home / "threshold") as store:
        example = store.top(10)[0]
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, color_system="truecolor", width=200)
    console.print(render(example, example.value, colour=True, around=5))
    assert "48;2;255;138;0m" in output.getvalue()
    assert "⟦" not in output.getvalue()


def test_marks_and_bars() -> None:
    assert mark(["a", "b", "c", "d"], [1.0, 2.0, 0, None]) == "⟦ab⟧cd"
    assert mark(["a", "b"], [0, 1.0]) == "a⟦b⟧"
    assert histogram_bars({-1: 8, 1: 1}) == "█ ▂"
    assert histogram_bars({}) == ""


def test_ctrl_c_says_how_to_go_on(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "build_features", interrupted)
    assert main(["features", "build", str(home / "topk")]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def fails(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that must fail."""
    assert main(["features", *args]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("saeforge: error: ")
    return error[0]


def test_mistakes_are_one_line(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(home / "topk")
    assert "no latent 96: this SAE has 96, 0 to 95" in fails(["show", run, "96"], capsys)
    assert "no latent -1" in fails(["show", run, "-1"], capsys)
    assert "does not exist" in fails(["show", str(tmp_path / "nowhere"), "1"], capsys)
    assert "features build" in fails(["show", str(tmp_path), "1"], capsys)
    assert "did you mean 'search'" in fails(["serch", run], capsys)
    assert "nothing to search for" in fails(["search", run, "++"], capsys)
    assert "sort 'size'" in fails(["list", run, "--sort", "size"], capsys)
    assert "limit = 0" in fails(["list", run, "--limit", "0"], capsys)
    assert "seed = -1" in fails(["build", run, "--seed", "-1"], capsys)
    assert "leave out --data" in fails(["build", run, "--texts", "stdlib", "--split", "train"], capsys)
    assert "does not exist" in fails(["build", run, "--texts", str(tmp_path / "no.jsonl")], capsys)
    assert "split 'test'" in fails(["build", run, "--split", "test"], capsys)
    assert "max_tokens = 0" in fails(["build", run, "--max_tokens", "0"], capsys)
    assert "does not exist" in fails(["build", str(tmp_path / "nowhere")], capsys)
    write_dataset(tmp_path / "bare", {"train": torch.randn(2048, D)}, site="layers.1:out")
    assert "with --texts" in fails(["build", run, "--data", str(tmp_path / "bare")], capsys)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((4096, D)).astype("float32"))
    import_activations([tmp_path / "x.npy"], tmp_path / "imported", site="layers.1:out", validation_share=0)
    message = fails(["build", run, "--data", str(tmp_path / "imported")], capsys)
    assert "has no tokens/" in message
    assert "with --texts" in message
    sae = SAE.load(home / "topk" / "sae")
    sae.meta = {}
    sae.save(tmp_path / "homeless" / "sae")
    assert "--data" in fails(["build", str(tmp_path / "homeless")], capsys)
    assert "which model" in fails(["build", str(tmp_path / "homeless"), "--texts", "demo"], capsys)


def test_a_store_of_another_sae_or_a_damaged_one_is_refused(home: Path, tmp_path: Path) -> None:
    run = copy_run(home / "topk", tmp_path / "run")
    store = (home / "topk" / "features.sqlite").read_bytes()
    (run / "features.sqlite").write_bytes(store)
    FeatureStore.open(run).close()
    make_sae("topk", SAE.load(run / "sae").meta, seed=1).save(run / "sae")
    with pytest.raises(DatasetError, match="another SAE"):
        FeatureStore.open(run)
    copy_run(home / "topk", run)
    (run / "features.sqlite").write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(DatasetError, match="damaged"):
        FeatureStore.open(run)
    (run / "features.sqlite").write_bytes(store)
    middle = len(store) // 2
    (run / "features.sqlite").write_bytes(store[:middle] + b"\xff" * 200_000 + store[middle + 200_000 :])
    with FeatureStore.open(run) as damaged, pytest.raises(DatasetError, match="damaged"):
        [damaged.top(latent) for latent in range(D_SAE)]
    (run / "features.sqlite").write_bytes(store)
    with contextlib.closing(sqlite3.connect(run / "features.sqlite")) as connection, connection:
        connection.execute("UPDATE meta SET value = '99' WHERE key = 'format_version'")
    with pytest.raises(DatasetError, match="format 99"):
        FeatureStore.open(run)


def test_progress_of_other_options_or_damaged_is_refused(home: Path, tmp_path: Path) -> None:
    run = copy_run(home / "topk", tmp_path / "run")

    def stop(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        build_features(run, device="cpu", unit_rows=1000, save_seconds=0, on_progress=stop)
    with pytest.raises(ConfigError, match="another seed"):
        build_features(run, device="cpu", unit_rows=1000, seed=2)
    progress_file(run).write_bytes(progress_file(run).read_bytes()[:2000])
    with pytest.raises(DatasetError, match="damaged"):
        build_features(run, device="cpu", unit_rows=1000)
    assert not build_features(run, device="cpu", unit_rows=1000, overwrite=True).resumed
    assert contents(run) == contents(home / "topk")


def test_damaged_tokens_are_noticed(home: Path, tmp_path: Path) -> None:
    import shutil

    run = copy_run(home / "topk", tmp_path / "run")
    shutil.copytree(home / "acts", tmp_path / "acts")
    path = tmp_path / "acts" / "tokens" / "train.tokens.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"train\.tokens\.npy is damaged"):
        build_features(run, data=tmp_path / "acts", device="cpu")
    path.unlink()
    with pytest.raises(DatasetError, match=r"train\.tokens\.npy is missing"):
        build_features(run, data=tmp_path / "acts", device="cpu")
    # The manifest is the truth: what stands beside it does not matter, and neither does a split that is not read.
    (tmp_path / "acts" / "tokens" / "packing.json").write_text("{")
    assert build_features(run, data=tmp_path / "acts", split="validation", overwrite=True, device="cpu").tokens > 0


def test_an_sae_that_never_fires_has_a_store(home: Path, tmp_path: Path) -> None:
    meta = SAE.load(home / "threshold" / "sae").meta
    sae = make_sae("threshold", meta)
    sae.b_enc.fill_(-1e9)
    sae.save(tmp_path / "sae")
    built = build_features(tmp_path, device="cpu")
    assert (built.fired, built.examples) == (0, 0)
    with FeatureStore.open(tmp_path) as store:
        assert store.latent(3).max == 0
        assert store.ranked() == []
        assert store.search("the") == []


def test_codes_that_are_not_kept_are_made_again(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "CODE_BYTES", 0)
    run = copy_run(home / "topk", tmp_path / "run")
    build_features(run, device="cpu", unit_rows=1000)
    assert contents(run) == contents(home / "topk")


def test_no_step_makes_a_dense_matrix(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the passes take in is the non-zeros."""
    sizes: list[float] = []
    update = Aggregate.update

    def spy(self: Aggregate, latents: np.ndarray, values: np.ndarray, keys: np.ndarray, rows: int) -> None:
        sizes.append(len(values) / rows)
        update(self, latents, values, keys, rows)

    monkeypatch.setattr(Aggregate, "update", spy)
    build_features(copy_run(home / "topk", tmp_path / "run"), device="cpu")
    assert set(sizes) == {5.0}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rule", RULES)
def test_two_hundred_thousand_tokens_equal_a_dense_computation(home: Path, tmp_path: Path, rule: str) -> None:
    write_jsonl(tmp_path / "text.jsonl", make_documents(1500, words=300, seed=9))
    harvest(
        model=str(home / "llama"),
        sites=["resid_post.1"],
        out=str(tmp_path / "acts"),
        text=str(tmp_path / "text.jsonl"),
        n_tokens=205_000,
        context_length=128,
        device="cpu",
    )
    sae = make_sae(rule, ShardSource(str(tmp_path / "acts"), input="resid_post.1").pairs[0].identity, d_sae=512)
    sae.save(tmp_path / "run" / "sae")
    built = build_features(tmp_path / "run", device="cpu")
    assert built.tokens >= 200_000
    dense, rows = read_dense(tmp_path / "acts", sae, ("train", "validation"))
    latents = np.random.default_rng(0).choice(512, 50, replace=False)
    check_store(tmp_path / "run", dense, rows, 127, [int(latent) for latent in latents])
