"""Harvest: rows are the model's own, in the right place, once; a restart changes nothing; mistakes are one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from saeforge.data.manifest import Manifest
from saeforge.data.shards import ActivationDataset
from saeforge.errors import ConfigError, DatasetError, SaeforgeError
from saeforge.harvest import HarvestConfig, harvest, run
from tests.tiny_models import make_documents, save_model, write_jsonl, write_text_folder

ROOT = Path(__file__).parent.parent
CONFIGS = [ROOT / "configs" / "quickstart" / "harvest.yaml", *sorted((ROOT / "configs" / "harvest").glob("*.yaml"))]
KINDS = ("gpt2", "llama", "bert")
LAYERS = {"gpt2": "h", "llama": "layers", "bert": "encoder.layer"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and lose much where other work shares the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, a folder of text, and the same text as .jsonl."""
    home = tmp_path_factory.mktemp("home")
    for kind in KINDS:
        save_model(kind, home / kind)
    documents = make_documents(300)
    write_text_folder(home / "text", documents)
    write_jsonl(home / "text.jsonl", documents)
    return home


def options(home: Path, kind: str, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(home / kind),
        "sites": ["resid_post.1", "resid_pre.1"],
        "out": str(out),
        "text": str(home / "text"),
        "n_tokens": 12_000,
        "context_length": 64,
        "batch_contexts": 8,
        "store_dtype": "float32",
        "validation_share": 0.25,
        "bucket_rows": 1024,
        "device": "cpu",
    } | changes


@pytest.fixture(scope="module")
def datasets(home: Path) -> dict[str, Path]:
    """One dataset of each model."""
    for kind in KINDS:
        harvest(**options(home, kind, home / f"out-{kind}"))
    return {kind: home / f"out-{kind}" for kind in KINDS}


def load_rows(root: Path, site: str, split: str) -> tuple[torch.Tensor, np.ndarray]:
    dataset = ActivationDataset.open(root, site=site)
    blocks = [dataset.read_block(split, i) for i in range(dataset.n_blocks(split))]
    rows = [dataset.read_rows(split, i) for i in range(dataset.n_blocks(split))]
    return torch.cat(blocks).float(), np.concatenate(rows).astype(np.int64)


def documents_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "tokens" / "documents.jsonl").read_text().splitlines()]


def files_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("store", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_a_plain_hook_on_single_documents(
    home: Path, datasets: dict[str, Path], tmp_path: Path, kind: str, store: str
) -> None:
    root = datasets[kind]
    if store == "bfloat16":
        root = tmp_path / "bf16"
        harvest(**options(home, kind, root, store_dtype=store))
    assert Manifest.load(root / "manifest.json").packing["packed"] == (kind != "bert")
    # Ten lines that share nothing with saeforge: one document, cut by hand, one forward pass, one hook.
    tokenizer = AutoTokenizer.from_pretrained(home / kind)
    model = AutoModel.from_pretrained(home / kind).eval()
    caught: dict[str, torch.Tensor] = {}
    layer = model.get_submodule(f"{LAYERS[kind]}.1")
    layer.register_forward_hook(lambda m, a, o: caught.update(x=(o if isinstance(o, torch.Tensor) else o[0])[0]))
    before, after = {"gpt2": ([], []), "llama": ([1], []), "bert": ([2], [3])}[kind]
    room = 64 - len(before) - len(after)
    expected: dict[tuple[int, int], torch.Tensor] = {}
    for document in documents_of(root):
        ids = tokenizer((home / "text" / document["name"]).read_text(), add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), room):
            with torch.no_grad():
                model(torch.tensor([[*before, *ids[start : start + room], *after]]))
            for i in range(len(ids[start : start + room])):
                expected[document["id"], start + i] = caught["x"][len(before) + i]
    count = 0
    for split in ("train", "validation"):
        x, rows = load_rows(root, f"{LAYERS[kind]}.1:out", split)
        wanted = torch.stack([expected[row[0], row[1]] for row in rows.tolist()])
        if store == "float32":
            torch.testing.assert_close(x, wanted, rtol=1e-5, atol=1e-5)
        else:  # one unit in the last place: 2**-7 of the value; and what float32 itself may differ by
            torch.testing.assert_close(x, wanted, rtol=2**-7, atol=1e-5)
        count += len(x)
    assert count > 9_000


@pytest.mark.parametrize("kind", KINDS)
def test_provenance_names_the_token_and_no_special_token_is_kept(
    home: Path, datasets: dict[str, Path], kind: str
) -> None:
    root = datasets[kind]
    tokenizer = AutoTokenizer.from_pretrained(home / kind)
    documents = documents_of(root)
    texts = [(home / "text" / document["name"]).read_text() for document in documents]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    seen = set()
    for split in ("train", "validation"):
        _, rows = load_rows(root, f"{LAYERS[kind]}.1:in", split)
        for document, position, token, _ in rows.tolist():
            assert ids[document][position] == token
            assert documents[document]["split"] == split
            assert kind != "gpt2" or position % 64 != 0  # no BOS: the first token of a segment is dropped
            seen.add((document, position))
        assert len(set(rows[:, 3])) > 10
        assert not set(rows[:, 2].tolist()) & set(tokenizer.all_special_ids)
    manifest = Manifest.load(root / "manifest.json")
    counts = manifest.packing["counts"]
    dropped = sum(split.dropped_rows for split in manifest.splits.values())
    assert len(seen) == counts["kept_tokens"] - dropped == sum(d["kept"] for d in documents) - dropped
    assert counts["kept_tokens"] == 12_000


def test_splits_are_disjoint_by_document_and_text(datasets: dict[str, Path]) -> None:
    for root in datasets.values():
        by_split: dict[str, set[str]] = {"train": set(), "validation": set()}
        for document in documents_of(root):
            by_split[document["split"]].add(document["sha256"])
        assert not by_split["train"] & by_split["validation"]
        share = len(by_split["validation"]) / sum(map(len, by_split.values()))
        assert 0.15 < share < 0.35


def test_sites_are_aligned_row_by_row(home: Path, datasets: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "three"
    harvest(**options(home, "llama", root, sites=["resid_pre.2", "resid_post.1", "layers.2.mlp"]))
    before, _ = load_rows(root, "layers.2:in", "train")
    after, rows = load_rows(root, "resid_post.1", "train")
    assert torch.equal(before, after)
    mlp, _ = load_rows(root, "layers.2.mlp", "train")
    assert mlp.shape == before.shape
    assert not torch.allclose(mlp, before)
    # Another set of sites, the same tokens in the same order.
    alone, rows_alone = load_rows(datasets["llama"], "layers.1:out", "train")
    assert np.array_equal(rows, rows_alone)
    torch.testing.assert_close(after, alone, rtol=0, atol=0)
    assert (
        Manifest.load(root / "manifest.json").alignment_sha256
        == Manifest.load(datasets["llama"] / "manifest.json").alignment_sha256
    )


def test_rows_of_a_block_come_from_many_documents(datasets: dict[str, Path]) -> None:
    dataset = ActivationDataset.open(datasets["gpt2"], site="h.1:out")
    rows = [dataset.read_rows("train", i) for i in range(dataset.n_blocks("train"))]
    assert np.mean([len(set(block[:, 0].tolist())) for block in rows]) > 15  # of 64 rows, in buckets of 1,024


def test_statistics_equal_numpy(datasets: dict[str, Path]) -> None:
    for kind, root in datasets.items():
        site = f"{LAYERS[kind]}.1:out"
        x = load_rows(root, site, "train")[0].double().numpy()
        statistics = ActivationDataset.open(root, site=site).site.statistics
        np.testing.assert_allclose(statistics.mean, x.mean(0), rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(statistics.variance, x.var(0), rtol=1e-11)
        np.testing.assert_allclose(statistics.mean_square_norm, (x**2).sum(1).mean(), rtol=1e-11)


def test_two_runs_write_the_same_bytes(home: Path, datasets: dict[str, Path], tmp_path: Path) -> None:
    harvest(**options(home, "llama", tmp_path / "again"))
    first, second = files_of(datasets["llama"]), files_of(tmp_path / "again")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_seed_changes_order_and_choice(home: Path, datasets: dict[str, Path], tmp_path: Path) -> None:
    harvest(**options(home, "llama", tmp_path / "other", seed=1))
    assert [d["name"] for d in documents_of(tmp_path / "other")] != [d["name"] for d in documents_of(datasets["llama"])]


def test_a_restart_makes_only_what_is_missing(
    home: Path, datasets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(datasets["llama"], tmp_path / "half")
    (tmp_path / "half" / "manifest.json").unlink()
    with pytest.raises(DatasetError, match="an interrupted harvest goes on with the same command"):
        ActivationDataset.open(tmp_path / "half")
    records = sorted((tmp_path / "half" / "index").iterdir())
    for record in records[3:7]:
        record.unlink()
    made = []
    original = run.make_rows

    def make_rows(*args: Any, **options: Any) -> Any:
        made.append(args[2:4])
        return original(*args, **options)

    monkeypatch.setattr(run, "make_rows", make_rows)
    harvest(**options(home, "llama", tmp_path / "half"))
    assert len(made) == 4
    assert files_of(tmp_path / "half") == files_of(datasets["llama"])


def test_ctrl_c_says_that_the_same_command_goes_on(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from saeforge.cli import harvest as command

    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "make_rows", interrupted)
    assert (
        command.run(
            [
                f"--{key}={json.dumps(v) if isinstance(v, list) else v}"
                for key, v in options(home, "gpt2", tmp_path / "o").items()
            ]
        )
        == 130
    )
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "saeforge: stopped; the same command goes on where this one was"


def test_a_finished_dataset_is_said_to_be_so_and_a_lost_shard_is_remade(
    home: Path, datasets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(datasets["gpt2"], root)
    before = files_of(root)
    harvest(**options(home, "gpt2", root))
    assert capsys.readouterr().out.startswith("already finished")
    assert files_of(root) == before
    lost = sorted(root.glob("h.1.in/*.tar"))[1]
    lost.unlink()
    harvest(**options(home, "gpt2", root))
    assert files_of(root) == before


def test_another_configuration_is_refused_unless_told_to_overwrite(
    home: Path, datasets: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(datasets["gpt2"], root)
    (root / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"other options \(seed, sites differ\); give --overwrite true"):
        harvest(**options(home, "gpt2", root, seed=5, sites=["resid_pre.1"]))
    assert files_of(root).items() > files_of(datasets["gpt2"]).items()
    harvest(**options(home, "gpt2", root, seed=5, sites=["resid_pre.1"], overwrite=True))
    assert not (root / "h.1.out").exists()
    assert (root / "notes.txt").read_text() == "mine"
    assert [site.id for site in Manifest.load(root / "manifest.json").sites] == ["h.1:in"]


def test_a_changed_model_and_damaged_tokens_stop_a_restart(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "gpt2", tmp_path / "gpt2")
    given = options(tmp_path, "gpt2", tmp_path / "out", text=str(home / "text"))
    harvest(**given)
    next((tmp_path / "out" / "index").iterdir()).unlink()
    tokens = tmp_path / "out" / "tokens" / "train.tokens.npy"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DatasetError, match=r"train\.tokens\.npy is missing or damaged"):
        harvest(**given)
    tokens.write_bytes(whole)
    config = tmp_path / "gpt2" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ConfigError, match=r"the model changed since .* was begun"):
        harvest(**given)


def test_strangers_and_a_second_writer_are_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds other files \(thesis.txt\) and no dataset"):
        harvest(**options(home, "gpt2", tmp_path, overwrite=True))
    with pytest.raises(ConfigError, match="is a file; choose a folder"):
        harvest(**options(home, "gpt2", tmp_path / "thesis.txt"))
    import fcntl

    (tmp_path / "busy").mkdir()
    with (tmp_path / "busy" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DatasetError, match="another harvest is writing to"):
            harvest(**options(home, "gpt2", tmp_path / "busy"))


def test_text_from_json_lines_has_labels_and_duplicates_are_left_out(home: Path, tmp_path: Path) -> None:
    lines = (home / "text.jsonl").read_text().splitlines()
    (tmp_path / "t.jsonl").write_text("\n".join([*lines, lines[0], "", json.dumps({"text": "  "})]) + "\n")
    manifest = harvest(**options(home, "bert", tmp_path / "o", text=str(tmp_path / "t.jsonl"), n_tokens=10**6))
    assert (manifest.packing["counts"]["duplicates"], manifest.packing["counts"]["empty"]) == (1, 1)
    documents = documents_of(tmp_path / "o")
    assert len(documents) == 300
    assert {document["label"] for document in documents} == {"l0", "l1"}


def test_document_tokens_limits_each_document(home: Path, tmp_path: Path) -> None:
    harvest(**options(home, "llama", tmp_path / "o", document_tokens=30, n_tokens=7_000, validation_share=0))
    documents = documents_of(tmp_path / "o")
    assert max(document["kept"] for document in documents) == 30
    assert {document["split"] for document in documents} == {"train"}
    assert ActivationDataset.open(tmp_path / "o", site="resid_pre.1").n_blocks("validation") == 0


def test_the_standard_library_is_a_source(home: Path, tmp_path: Path) -> None:
    manifest = harvest(**options(home, "bert", tmp_path / "o", text="stdlib", document_tokens=200))
    documents = documents_of(tmp_path / "o")
    assert manifest.packing["counts"]["kept_tokens"] == 12_000
    assert all(document["name"].endswith(".py") for document in documents)
    assert len({document["label"] for document in documents}) > 20


def test_non_finite_activations_name_site_document_and_position(home: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(home / "llama")
    tokenizer = AutoTokenizer.from_pretrained(home / "llama")
    token = tokenizer(" spain", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        model.get_submodule("embed_tokens").weight[token] = float("inf")
    model.eval()
    from saeforge.lm.load import quiet

    with quiet():
        model.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    message = r"layers\.1:out: NaN or infinite activation in document \d+ at token \d+ .*try --model_dtype float32"
    with pytest.raises(DatasetError, match=message):
        harvest(**options(tmp_path, "llama", tmp_path / "o", text=str(home / "text")))
    assert not list((tmp_path / "o").rglob("*.tar"))


def test_too_little_text_and_too_small_a_disk_are_told(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DatasetError, match=r"split validation has \d+ rows, at least 2048 are needed"):
        harvest(**options(home, "gpt2", tmp_path / "a", n_tokens=5_000))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SaeforgeError, match="MiB free; free some space, lower n_tokens"):
        harvest(**options(home, "gpt2", tmp_path / "b"))


def test_saeforge_harvest_is_the_function_and_the_package(tmp_path: Path) -> None:
    import saeforge

    for _ in range(2):  # importing the package must not take the function's place
        with pytest.raises(ConfigError, match="harvest needs the option 'model'"):
            saeforge.harvest()
    assert saeforge.harvest.harvest is harvest  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_token": 5}, "unknown harvest option 'n_token'; did you mean n_tokens"),
        ({"n_tokens": "many"}, "n_tokens = 'many': expected int"),
        ({"n_tokens": 0}, "n_tokens = 0: expected at least 1"),
        ({"sites": "resid_post.1"}, r"sites = 'resid_post.1': expected list\[str\]"),
        ({"sites": []}, "sites is empty"),
        ({"store_dtype": "float16"}, "store_dtype = 'float16'"),
        ({"validation_share": 1.0}, "expected 0 to less than 1"),
        ({"bucket_rows": 1000}, "expected a power of two"),
        ({"bucket_rows": 16}, "bucket_rows 16 is less than one block"),
        ({"pack": "maybe"}, "pack = 'maybe'"),
        ({"text": "/no/such/text"}, "does not exist; give a folder of text files"),
        ({"context_length": 500}, "context_length 500: this model and its tokenizer allow 128"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
        ({"sites": ["h.9"]}, "unknown site 'h.9'"),
    ],
)
def test_wrong_options_are_told_in_one_line(home: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        harvest(**options(home, "gpt2", tmp_path / "o") | changes)
    assert "\n" not in str(caught.value)


def test_contexts_are_as_long_as_the_model_allows_unless_asked(home: Path, tmp_path: Path) -> None:
    """The models here allow 128; a restart that says the same finds the finished dataset."""
    lengths = {}
    for name in ("default", "asked"):
        given = options(home, "gpt2", tmp_path / name)
        if name == "default":
            del given["context_length"]
        manifest = harvest(**given)
        lengths[name] = manifest.packing["context_length"]
        assert harvest(**given).fingerprint == manifest.fingerprint
    assert lengths == {"default": 128, "asked": 64}


def test_pack_true_is_refused_where_documents_would_leak(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pack: true, but packed segments see each other"):
        harvest(**options(home, "bert", tmp_path / "o", pack=True))
    manifest = harvest(**options(home, "gpt2", tmp_path / "p", pack=False))
    assert manifest.packing["rule"] == "one segment per context, padding masked"


def test_wrong_text_files_are_told(home: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    with pytest.raises(ConfigError, match="holds no files"):
        harvest(**options(home, "gpt2", tmp_path / "o", text=str(tmp_path / "bad")))
    (tmp_path / "bad" / "a.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ConfigError, match=r"a\.txt is not UTF-8 \(.* at byte 3\)"):
        harvest(**options(home, "gpt2", tmp_path / "o", text=str(tmp_path / "bad")))
    for line, message in (("{", "line 2: not JSON"), ('{"txt": 1}', "line 2: expected an object with a string field")):
        (tmp_path / "bad.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
        with pytest.raises(ConfigError, match=message):
            harvest(**options(home, "gpt2", tmp_path / "o", text=str(tmp_path / "bad.jsonl")))


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
GIVEN = ["--model", "/no/such/model", "--sites", "[h.1]", "--out", "o"]


def cli(*argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "saeforge.cli.main", "harvest", *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ONE_THREAD)


def test_the_command_reads_a_config_and_prints_rows_size_and_place(home: Path, tmp_path: Path) -> None:
    given = options(home, "llama", tmp_path / "wrong")
    (tmp_path / "c.yaml").write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in given.items()))
    done = cli("--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "o"))
    assert done.returncode == 0, done.stderr
    dataset = ActivationDataset.open(tmp_path / "o", site="layers.1:in")
    rows = dataset.n_blocks("train") * dataset.block_rows("train")
    assert f"train       {rows:,} rows" in done.stdout
    assert f"where       {tmp_path / 'o'}" in done.stdout
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*GIVEN, "--n_token", "5"], "--n_token"),
        ([*GIVEN, "--n_tokens", "many"], "n_tokens"),
        ([*GIVEN, "--config", "typo.yaml"], "'n_tokns' is not accepted; did you mean 'n_tokens'?"),
        ([*GIVEN, "--config", "lost.yaml"], "nowhere"),
        (GIVEN, "no such folder"),
        (["--config", "missing.yaml"], "missing.yaml"),
        ([], "model"),
    ],
)
def test_the_command_tells_mistakes_in_one_line(tmp_path: Path, argv: list[str], message: str) -> None:
    (tmp_path / "typo.yaml").write_text("n_tokns: 5\n")
    (tmp_path / "lost.yaml").write_text("text: ${nowhere}\n")
    done = cli(*argv, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert not (tmp_path / "o").exists()
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("saeforge: error: ")
    assert message in done.stderr


def test_print_config_prints_what_config_reads(tmp_path: Path) -> None:
    printed = cli("--model", "m", "--sites", "[resid_post.1]", "--out", "o", "--print_config")
    assert printed.returncode == 0, printed.stderr
    (tmp_path / "c.yaml").write_text(printed.stdout)
    again = cli("--config", str(tmp_path / "c.yaml"), "--print_config")
    assert again.stdout == printed.stdout
    for name in HarvestConfig.__dataclass_fields__:
        assert f"{name}:" in printed.stdout


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    from saeforge.cli.harvest import make_parser

    parsed = make_parser().parse_args(["--config", str(path)]).as_dict()
    HarvestConfig.build(None, {key: value for key, value in parsed.items() if key != "config"})
