"""The demo text: every label, nothing of the test passages, and a script that draws the same samples again."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from saeforge.demo import model_path, text_path
from saeforge.errors import ConfigError
from saeforge.lm import text as text_module
from saeforge.lm.load import load_tokenizer
from saeforge.lm.text import DemoText, Document, open_text, read_passages, read_samples, runs, words

SCRIPTS = Path(__file__).parent.parent / "scripts"
SAMPLED = ("c", "english", "french", "german", "html", "italian", "json", "portuguese", "python", "spanish", "sql")
shipped = pytest.mark.skipif(
    not (text_path().is_file() and (model_path() / "model.safetensors").is_file()),
    reason="this tree lacks the demo text or the demo model: scripts/train_demo_lm.py, scripts/sample_demo_text.py",
)


def write_samples(path: Path, documents: Sequence[Document]) -> Path:
    lines = [json.dumps({"name": d.name, "label": d.label, "text": d.text}) + "\n" for d in documents]
    path.write_bytes(gzip.compress("".join(lines).encode()))
    return path


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module("sample_demo_text")


@pytest.fixture(scope="module")
def model(script: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that knows nothing, with a tokenizer of the passages; labels as if it had been trained on three."""
    lm = importlib.import_module("demo_lm_model")
    training = [script.Document(passage.label, passage.text, False) for passage in read_passages()]
    shape = lm.Shape(vocab_size=2000, d_model=16, n_layers=2, n_heads=2, intermediate=32, context=64)
    facts: dict[str, Any] = {"labels": {"english": {}, "japanese": {}, "sql": {}}}
    folder: Path = tmp_path_factory.mktemp("demo") / "tiny"
    lm.save_model(folder, shape.build(), lm.train_tokenizer(training, 2000), shape, facts)
    return folder


@pytest.fixture
def made(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model in the demo model's place, two samples in the demo text's."""
    monkeypatch.setattr("saeforge.lm.load.model_path", lambda: model)
    samples = [Document("sample/french/0", "Le chat.", "french"), Document("sample/c/0", "int cat;\n", "c")]
    path = write_samples(tmp_path / "text.jsonl.gz", samples)
    monkeypatch.setattr(text_module, "text_path", lambda: path)
    return tmp_path


def everything(source: DemoText) -> list[Document]:
    return [source[i] for i in range(len(source))]


def groups(documents: Sequence[Document]) -> Counter[str]:
    return Counter(document.name.partition("/")[0] for document in documents)


def test_the_source_holds_train_passages_samples_and_some_of_the_library(made: Path) -> None:
    source = open_text("demo")
    assert isinstance(source, DemoText)
    documents = everything(source)
    assert len({document.name for document in documents}) == len(documents)
    by_group = groups(documents)
    assert by_group.keys() == {"passage", "sample", "stdlib"}
    assert by_group["passage"] == sum(passage.split == "train" for passage in read_passages())
    assert [d for d in documents if d.name.startswith("sample/")] == read_samples()
    library = [document for document in documents if document.name.startswith("stdlib/")]
    assert {document.label for document in library} == {"python"}
    assert 190_000 < sum(len(document.text) for document in library) < 202_000
    assert max(len(document.text) for document in library) <= 2000
    assert not [document for document in documents if document.split == "test"]
    assert everything(DemoText()) == documents


def test_a_piece_of_the_library_that_holds_a_part_of_a_test_passage_is_left_out(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = made / "lib"
    library.mkdir()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    passage = next(p.text for p in read_passages() if p.split == "test" and p.label == "english")
    thirteen, twelve = (" ".join(passage.split()[3 : 3 + n]).upper() for n in (13, 12))  # other tokens, same words
    (library / "copies.py").write_text(f'"""{thirteen}"""\n')
    (library / "alike.py").write_text(f"# {twelve}\n")
    assert [d.name for d in everything(DemoText()) if d.name.startswith("stdlib/")] == ["stdlib/alike.py"]
    # Ten words may be more than 13 tokens.
    ten = " ".join(passage.split()[3:13])
    (library / "tokens.py").write_text(f"# {ten}\n")
    tokens = load_tokenizer("demo")(ten, add_special_tokens=False)["input_ids"]
    assert len(tokens) > 14
    assert "stdlib/tokens.py" not in [d.name for d in everything(DemoText())]


def test_runs_and_words() -> None:
    assert runs([1, 2, 3], 2) == {(1, 2), (2, 3)}
    assert runs([1], 2) == set()
    assert words("L'Été, x_1 + 42!") == ["l", "été", "x_1", "42"]


def test_missing_or_damaged_samples_are_one_line(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made / "text.jsonl.gz"
    whole = path.read_bytes()
    bad_lines = (b'{"name": "a", "label": "c"}\n', b'{"name":\n', b"3\n", b"\xff\n")
    for damaged in (whole[:-9], b"plain", whole[:20] + b"\0\0\0" + whole[23:], *map(gzip.compress, bad_lines)):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"text demo: .*text\.jsonl\.gz is damaged") as caught:
            open_text("demo")
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ConfigError, match=r"text\.jsonl\.gz is missing; reinstall saeforge"):
        open_text("demo")


def test_a_missing_model_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saeforge.lm.load.model_path", lambda: tmp_path / "model")
    with pytest.raises(ConfigError, match=r"model 'demo': .*model is missing; reinstall saeforge") as caught:
        load_tokenizer("demo")
    assert "\n" not in str(caught.value)


def test_other_sources_name_demo_in_their_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a \.jsonl file, demo, or stdlib"):
        open_text(str(tmp_path / "nothing"))
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(ConfigError, match="give one of them, demo, or stdlib"):
        open_text(str(tmp_path / "a.csv"))


@shipped
@pytest.mark.parametrize("units", ["words", "tokens"])
def test_nothing_that_is_harvested_shares_13_units_with_a_test_passage(units: str) -> None:
    tokenizer = load_tokenizer("demo")

    def cut(text: str) -> Any:
        return words(text) if units == "words" else tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    tested = [passage for passage in read_passages() if passage.split == "test"]
    forbidden = {run: passage.name for passage in tested for run in runs(cut(passage.text))}
    assert len(forbidden) > 10_000
    shared = {
        document.name: forbidden[run]
        for document in everything(DemoText())
        for run in runs(cut(document.text))
        if run in forbidden
    }
    assert shared == {}


@shipped
def test_every_label_has_30_000_tokens_of_the_shipped_model() -> None:
    tokenizer, sizes = load_tokenizer("demo"), Counter[str]()
    samples = read_samples()
    assert len({sample.text for sample in samples}) == len(samples)
    for sample in samples:
        assert sample.label is not None
        sizes[sample.label] += len(tokenizer(sample.text, add_special_tokens=False)["input_ids"])
    assert set(SAMPLED) <= sizes.keys()
    assert min(sizes.values()) >= 30_000
    facts = json.loads(text_path().with_name("text.json").read_text(encoding="utf-8"))
    assert {label: own["tokens"] for label, own in facts["labels"].items()} == sizes
    assert facts["text_sha256"] == hashlib.sha256(gzip.decompress(text_path().read_bytes())).hexdigest()
    for name, sha256 in facts["model"].items():
        assert hashlib.sha256((model_path() / name).read_bytes()).hexdigest() == sha256, f"{name} changed: draw anew"


def draw(script: Any, model: Path, out: Path, *options: str) -> int:
    command = ["--model", str(model), "--out", str(out), "--tokens", "60", "--new-tokens", "12", "--batch", "8"]
    code: int = script.main([*command, *options])
    return code


def test_the_script_writes_the_same_bytes_again(script: Any, model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert draw(script, model, tmp_path / f"{name}.jsonl.gz", "--unfiltered", "--most-tries", "50") == 0
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert draw(script, model, tmp_path / "c.jsonl.gz", "--unfiltered", "--most-tries", "50", "--seed", "1") == 0
    assert (tmp_path / "a.jsonl.gz").read_bytes() != (tmp_path / "c.jsonl.gz").read_bytes()

    facts = json.loads((tmp_path / "a.json").read_text())
    lines = [json.loads(line) for line in gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).splitlines()]
    assert {line["label"] for line in lines} == {"english", "sql"}
    assert facts["left_out"]["labels"] == ["japanese"]
    tokenizer = script.AutoTokenizer.from_pretrained(model).backend_tokenizer
    for label, own in facts["labels"].items():
        texts = [line["text"] for line in lines if line["label"] == label]
        assert own["documents"] == len(texts)
        assert own["tokens"] == sum(len(ids) for ids in script.encode(tokenizer, texts)) >= 60
        assert own["drawn"] == len(texts) + sum(own["refused"].values())


def test_a_label_that_the_model_does_not_know_is_named(
    script: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(script, model, tmp_path / "o.jsonl.gz", "--labels", "sql") == 2
    said = capsys.readouterr().err
    assert "error: label 'sql': " in said
    assert "tokens after 21 samples" in said
    assert not (tmp_path / "o.jsonl.gz").exists()
    assert draw(script, model, tmp_path / "o.jsonl.gz", "--labels", "japanese") == 2
    assert "--labels japanese: expected some of english sql" in capsys.readouterr().err
    assert draw(script, model, tmp_path / "o.jsonl.gz", "--new-tokens", "60") == 2
    assert "do not fit into the model's context of 64" in capsys.readouterr().err


def test_what_the_script_refuses(script: Any, model: Path) -> None:
    class Oracle:
        """Calls a text by its last letter."""

        def predict(self, texts: Sequence[str]) -> list[str]:
            return ["english" if text.endswith("e") else "sql" for text in texts]

    tokenizer = script.AutoTokenizer.from_pretrained(model).backend_tokenizer
    passages = read_passages()
    network = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64))
    how = script.replace(script.DEFAULTS, new_tokens=20)
    writer = script.Writer(network, tokenizer, passages, Oracle(), how, 8)
    good = "ab " + "the green house we like more e " * 2 + "zz"
    copied = "ab " + next(p.text for p in passages if p.label == "english" and p.split == "train") + " zz"
    mixed = "ab " + "the green house x " * 3 + "by the e zz"
    drawn = [good, good, "a b", "ab tre\ufffde " * 9, copied, mixed, "ab " + "дом " * 20 + "e zz"]
    kept = script.Kept()
    writer._keep("english", drawn, 1000, kept)
    assert kept.texts == [script.whole_words(good)]
    assert kept.refused == {"repeated": 1, "broken": 2, "like a passage": 1, "named otherwise": 2}
    assert (kept.drawn, kept.named["another script"]) == (7, 1)


def test_a_token_is_picked_by_its_place_in_the_nucleus(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definition, row by row; with a short head some rows' nuclei do not fit into it."""
    sampling = importlib.import_module("demo_lm_sampling")
    monkeypatch.setattr(sampling, "HEAD", 8)
    generator = torch.Generator().manual_seed(0)
    sharpness = torch.linspace(0.1, 8, 60, dtype=torch.float64)[:, None]
    p = (torch.randn(60, 40, generator=generator, dtype=torch.float64) * sharpness).softmax(-1)
    at = torch.rand(60, generator=generator, dtype=torch.float64)
    fits = p.topk(8).values.sum(-1) >= 0.9
    assert fits.any()
    assert not fits.all()
    for row, place, token in zip(p.tolist(), at.tolist(), sampling._pick(p, at, 0.9)[:, 0].tolist(), strict=True):
        nucleus: list[int] = []
        for candidate in sorted(range(40), key=lambda i: -row[i]):
            if sum(row[i] for i in nucleus) < 0.9:
                nucleus.append(candidate)
        left = place * sum(row[i] for i in nucleus)
        for candidate in nucleus:
            left -= row[candidate]
            if left < 0:
                break
        assert token == candidate


@pytest.mark.parametrize(
    ("drawn", "kept"),
    [
        ("ow many\n  words  ar", "many\n  words"),
        ("word", ""),
        ("two words", ""),
        (" a b ", "a b"),
        ("\n\tx = 1\n", "x = 1"),
    ],
)
def test_a_sample_keeps_whole_words(script: Any, drawn: str, kept: str) -> None:
    assert script.whole_words(drawn) == kept


def test_prompts_begin_where_a_train_passage_begins_a_sentence_or_a_line(script: Any, model: Path) -> None:
    tokenizer = script.AutoTokenizer.from_pretrained(model).backend_tokenizer
    network = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64))
    passages = [
        Document("a", "One two three four five. Six seven eight nine ten! No", "english", "train"),
        Document("b", "Test passages are never shown to the model. Never", "english", "test"),
    ]
    how = script.replace(script.DEFAULTS, prompt_tokens=4, new_tokens=20)
    prompts = script.Writer(network, tokenizer, passages, None, how, 8)._prompts("english")
    begun = {tokenizer.decode(next(prompts)) for _ in range(6)}
    assert len(begun) == 2
    assert all(text.startswith(("One", "S")) for text in begun)
