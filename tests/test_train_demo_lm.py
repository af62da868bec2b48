"""The scripts that train and judge the demo language model, on a tiny network and made-up text."""

from __future__ import annotations

import importlib
import json
import random
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).parent.parent / "scripts"
TINY = (
    "--vocab-size 300 --d-model 16 --n-layers 2 --n-heads 2 --intermediate 32 --context 32 --batch-tokens 256 "
    "--micro-batch 4 --warmup 2 --held-out 0.25 --threads 1"
).split()


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    names = ("text", "collect", "model", "kneser_ney")
    modules: dict[str, Any] = {name: importlib.import_module(f"demo_lm_{name}") for name in names}
    modules |= {name: importlib.import_module(f"{name}_demo_lm") for name in ("train", "judge")}
    return SimpleNamespace(**modules)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Two labels, one as a file and one as a folder; every passage has a number that no other passage has."""
    rng = random.Random(0)
    folder = tmp_path / "text"
    (folder / "right").mkdir(parents=True)
    for number, (label, letters) in enumerate((("left", "abcd"), ("right", "wxyz"))):
        words = ["".join(rng.choices(letters, k=rng.randint(2, 5))) for _ in range(50)]
        passages = [f"<{number}{i:03d}> " + " ".join(rng.choices(words, k=rng.randint(60, 200))) for i in range(60)]
        path = folder / "left.txt" if label == "left" else folder / "right" / "all.txt"
        path.write_text("\n\n".join(passages), encoding="utf-8")
    (folder / "README.md").write_text("not a label", encoding="utf-8")
    return folder


def run(scripts: Any, text: Path, out: Path, *options: str) -> int:
    code: int = scripts.train.main(["--text", str(text), "--out", str(out), *TINY, *options])
    return code


def interrupt_after(monkeypatch: pytest.MonkeyPatch, scripts: Any, step: int) -> None:
    """Ctrl-C while the step runs."""
    original = scripts.train.Trainer.step

    def spy(self: Any) -> float:
        if self.progress.step == step - 1:
            signal.raise_signal(signal.SIGINT)
        loss: float = original(self)
        return loss

    monkeypatch.setattr(scripts.train.Trainer, "step", spy)


@pytest.mark.parametrize("step", [2, 5], ids=["while the rate stays", "while the rate falls"])
def test_an_interrupted_run_ends_with_the_same_bits(
    scripts: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    command = ["--steps", "7", "--decay", "0.5"]
    assert run(scripts, text, tmp_path / "whole", *command) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, scripts, step)
        assert run(scripts, text, tmp_path / "parts", *command) == 130
    stopped = torch.load(tmp_path / "parts-state" / "state.pt", weights_only=True)
    assert stopped["progress"]["step"] == step
    assert not (tmp_path / "parts").exists()

    assert run(scripts, text, tmp_path / "parts", *command) == 0
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    whole, parts = (
        torch.load(tmp_path / f"{name}-state" / "state.pt", weights_only=True) for name in ("whole", "parts")
    )
    assert whole["used"] == parts["used"]
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, parts["model"][name]), name
    for own, other, name in zip(
        whole["optimizers"], parts["optimizers"], ("exp_avg_sq", "momentum_buffer"), strict=True
    ):
        assert own["state"]
        for number, state in own["state"].items():
            assert torch.equal(state[name], other["state"][number][name])


def test_transformers_loads_what_was_trained(scripts: Any, text: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert run(scripts, text, tmp_path / "out", "--steps", "4") == 0
    state = torch.load(tmp_path / "out-state" / "state.pt", weights_only=True)
    shape = scripts.model.Shape(**state["identity"]["recipe"]["shape"])
    ours = shape.build().eval()
    fresh = ours.model.norm.weight.clone(), ours.model.embed_tokens.weight.clone()
    ours.load_state_dict({name: tensor.half().float() for name, tensor in state["model"].items()})
    assert not torch.equal(fresh[1], ours.model.embed_tokens.weight)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    sentence = "  abc wxyz\n\tä 日本\n\n"
    ids = tokenizer(sentence)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == sentence
    assert scripts.model.encode(tokenizer.backend_tokenizer, [sentence]) == [ids[1:]]
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([ids])).logits, ours(torch.tensor([ids])).logits)


def test_held_out_documents_are_never_trained_on(scripts: Any, text: Path, tmp_path: Path) -> None:
    documents = scripts.text.read_documents([text], 0.25)
    held = {mark for document in documents if document.held_out for mark in marks(document.text)}
    trained = {mark for document in documents if not document.held_out for mark in marks(document.text)}
    assert 15 <= len(held) <= 50  # a quarter of 120
    assert not held & trained

    shape = scripts.model.Shape(vocab_size=300, d_model=16, n_layers=1, n_heads=2, intermediate=32, context=32)
    recipe = scripts.model.Recipe(shape=shape, held_out=0.25)
    trainer = scripts.train.Trainer(documents, recipe, tmp_path / "out", "cpu", 1000)
    seen: set[str] = set()
    for step in range(150):
        rows = trainer.sampler.batch(step, 32)
        assert rows.shape == (32, 33)
        seen |= {mark for row in rows for mark in marks(trainer.tokenizer.decode(row.tolist()))}
    assert seen == trained  # and nothing is forgotten


def marks(text: str) -> set[str]:
    return {text[i : i + 6] for i in range(len(text)) if text[i] == "<" and text[i + 5 : i + 6] == ">"}


def test_extend_goes_back_to_where_the_rate_began_to_fall(
    scripts: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(scripts, text, out, "--steps", "6", "--decay", "0.5") == 0
    first = json.loads((out / "training.json").read_text())
    assert run(scripts, text, out, "--steps", "12", "--decay", "0.5") == 2
    assert "is finished: --extend goes on" in capsys.readouterr().err
    assert run(scripts, text, out, "--steps", "13", "--decay", "0.5", "--extend") == 0
    state = torch.load(tmp_path / "out-state" / "state.pt", weights_only=True)["progress"]
    assert (state["origin"], state["decay_start"], state["step"]) == (3, 8, 13)
    after = json.loads((out / "training.json").read_text())
    assert after["step"] in (6, 13)
    best = min(value for _, value in state["history"])
    assert state["best"] == pytest.approx(best, abs=1e-5)
    assert first["history"][0] == state["history"][0]


def test_a_state_of_other_text_or_options_is_refused(
    scripts: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(scripts, text, out, "--steps", "1") == 0
    assert run(scripts, text, out, "--steps", "2", "--lr", "0.5") == 2
    assert "trained with other options" in capsys.readouterr().err
    (text / "left.txt").write_text((text / "left.txt").read_text() + "\n\nanother passage", encoding="utf-8")
    assert run(scripts, text, out, "--steps", "2") == 2
    assert "trained with other text" in capsys.readouterr().err
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    assert run(scripts, text, tmp_path / "notes", "--steps", "1") == 2
    assert "holds no model of this script" in capsys.readouterr().err


def test_the_rate_warms_up_stays_and_falls(scripts: Any) -> None:
    recipe = scripts.model.Recipe(lr=1.0, warmup=4)
    progress = scripts.train.Progress(decay_start=6, decay_steps=3)
    rates = []
    for step in range(9):
        progress.step = step
        rates.append(scripts.train.rate(recipe, progress))
    assert rates[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates[6:] == pytest.approx([0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])


def test_small_labels_get_more_but_are_not_repeated_absurdly(scripts: Any) -> None:
    shares = scripts.text.label_shares([1_000_000, 250_000], 0.5)
    assert shares == pytest.approx([2 / 3, 1 / 3])
    shares = scripts.text.label_shares([1_000_000, 250_000, 1_000], 0.5)
    assert shares.sum() == pytest.approx(1)
    assert shares[2] == pytest.approx(4 * 1_000 / 1_251_000)
    assert shares[0] == pytest.approx(2 * shares[1])


def test_copies_are_left_out(scripts: Any, tmp_path: Path) -> None:
    rng = random.Random(1)
    passages = [" ".join(str(rng.random()) for _ in range(40)) for _ in range(60)]
    (tmp_path / "a.txt").write_text("\n\n".join([*passages[:40], passages[0]]), encoding="utf-8")
    (tmp_path / "b.txt").write_text("\n\n".join([*passages[40:], passages[1]]), encoding="utf-8")
    whole = "\n\n".join(document.text for document in scripts.text.read_documents([tmp_path], 0.3))
    assert whole.count(passages[0]) == 1  # twice under one label
    assert whole.count(passages[1]) == 0  # under two labels
    assert whole.count(passages[2]) == 1


def test_english_prose_stands_under_no_other_label(scripts: Any) -> None:
    comment = "/* This is where the output of the parser is kept, in order of appearance. */"
    assert scripts.text.is_english(comment)
    for other in (
        f"<p>{comment}</p>",
        "int main(int argc, char **argv) { for (int i = 0; i < argc; i++) puts(argv[i]); return 0; }",
        "for line in lines:\n    if line not in seen and line is not None:\n        seen.add(line.strip())",
        "As pessoas que chegam à cidade de manhã encontram as ruas vazias e as lojas fechadas.",
        "In der Stadt will man es nicht glauben, und an den Ufern hat es geregnet.",
    ):
        assert not scripts.text.is_english(other), other


def test_document_bits_scores_each_token_once(scripts: Any) -> None:
    shape = scripts.model.Shape(vocab_size=64, d_model=16, n_layers=1, n_heads=2, intermediate=32, context=8)
    model = shape.build().eval()
    ids = [[5, 9, 30], [], list(range(3, 40))]
    bits = scripts.model.document_bits(model, ids, 8)
    with torch.no_grad():
        logs = model(torch.tensor([[1, 5, 9]])).logits[0].log_softmax(-1)
    assert bits[0] == pytest.approx(-sum(logs[i, token].item() for i, token in enumerate(ids[0])) / np.log(2), rel=1e-5)
    assert bits[1] == 0
    model.model.embed_tokens.weight.data.zero_()  # tied: all tokens become equally likely
    assert scripts.model.document_bits(model, ids, 8) == pytest.approx([6 * 3, 0, 6 * 37])


def test_kneser_ney_by_hand(scripts: Any) -> None:
    model = scripts.kneser_ney.KneserNey(
        [[3, 4, 3, 4], [3, 5]], 6, bos=0, order=2, n_predicted=3, discounts=(0.5, 0.5, 0.5)
    )
    # Unigrams by what they follow: 3 follows BOS and 4, 4 and 5 follow 3. So 3: 1.5/4 + (1.5/4)/3 = 1/2; 4, 5: 1/4.
    # After 3: 4 twice, 5 once: 4: 1.5/3 + (1/3)(1/4) = 7/12; 5: 0.5/3 + 1/12 = 1/4; 3: 1/6.
    # After BOS: 3 twice: 1.5/2 + (1/4)(1/2) = 7/8. After 4: 3 once: 1/2 + (1/2)(1/2) = 3/4. After 5: nothing.
    expected = {
        (3, 4): 7 / 12,
        (3, 5): 1 / 4,
        (3, 3): 1 / 6,
        (0, 3): 7 / 8,
        (4, 3): 3 / 4,
        (5, 3): 1 / 2,
        (5, 4): 1 / 4,
    }
    for (context, token), p in expected.items():
        assert model.probabilities(np.array([context, token]))[1] == pytest.approx(p), (context, token)
    assert model.document_bits([[3, 4], [3]]) == pytest.approx([-np.log2(7 / 8 * 7 / 12), -np.log2(7 / 8)])


def test_kneser_ney_probabilities_sum_to_one(scripts: Any) -> None:
    rng = np.random.default_rng(0)
    documents = [(1 + rng.zipf(1.5, size=30) % 11).tolist() for _ in range(40)]
    model = scripts.kneser_ney.KneserNey(documents, 12, bos=0, order=4, n_predicted=11)
    contexts = [[0, 0, 0], [0, 0, 1], *documents[0:3], [11, 7, 11], [9, 9, 9]]
    for context in contexts:
        streams = [np.array([*context, token]) for token in range(1, 12)]
        p = [model.probabilities(stream)[-1] for stream in streams]
        assert min(p) > 0
        assert sum(p) == pytest.approx(1)
    # It has learned something: its own text costs it less than equally likely tokens would.
    assert sum(model.document_bits(documents)) < 0.9 * 40 * 30 * np.log2(11)


def test_discounts_are_chen_and_goodmans(scripts: Any) -> None:
    counts = np.repeat([1, 2, 3, 4], [40, 20, 10, 5])
    y = 40 / 80
    assert scripts.kneser_ney.estimate_discounts(counts) == pytest.approx((1 - y, 2 - 1.5 * y, 3 - 2 * y))
    assert scripts.kneser_ney.estimate_discounts(np.array([1, 1, 2])) == (0.75, 0.75, 0.75)


def test_continuations_follow_the_model(scripts: Any) -> None:
    shape = scripts.model.Shape(vocab_size=64, d_model=16, n_layers=2, n_heads=2, intermediate=32, context=32)
    model = shape.build().eval()
    how = scripts.judge.Sampling(new_tokens=6, temperature=1e-6)
    prompts = [[5, 9, 30], [7, 8, 9]]
    drawn = scripts.judge.continuations(model, prompts, how)
    for prompt, tokens in zip(prompts, drawn, strict=True):
        for i, token in enumerate(tokens):
            with torch.no_grad():
                logits = model(torch.tensor([[1, *prompt, *tokens[:i]]])).logits[0, -1]
            assert token == 3 + logits[3:].argmax().item()
    free = scripts.judge.Sampling(new_tokens=20, temperature=3.0, top_p=1.0)
    assert scripts.judge.continuations(model, prompts, free) == scripts.judge.continuations(model, prompts, free)
    assert min(min(tokens) for tokens in scripts.judge.continuations(model, prompts, free)) >= 3


def test_the_report_says_what_was_measured(scripts: Any, text: Path, tmp_path: Path) -> None:
    assert run(scripts, text, tmp_path / "out", "--steps", "2") == 0
    report = tmp_path / "report.md"
    command = ["--model", str(tmp_path / "out"), "--report", str(report), "--per-label", "3", "--new-tokens", "12"]
    assert scripts.judge.main(["--text", str(text), *command]) == 1  # two steps cannot beat Kneser-Ney
    said = report.read_text(encoding="utf-8")
    assert "Goals that are missed:\n\n- left: " in said
    assert "names 100.0% of" in said
    assert "| left | " in said
    assert "**right**" in said
    (text / "left.txt").unlink()
    assert scripts.judge.main(["--text", str(text), *command]) == 2


def test_collecting_reads_manual_pages_as_prose(scripts: Any) -> None:
    page = (
        '.TH LS 1\n.SH NAME\nls \\- list\n.PP\nDer Befehl\n.B ls \\-l\nzeigt \\fBalle\\fP Dateien "hier" an, und noch '
        'mehr davon, wenn man ihn fragt.\n.\\" comment\n'
    )
    assert scripts.collect.manual_text(page) == (
        'Der Befehl ls -l zeigt alle Dateien "hier" an, und noch mehr davon, wenn man ihn fragt.'
    )


def test_collecting_mixes_files_and_skips_what_is_no_text(scripts: Any, tmp_path: Path) -> None:
    files = []
    for name, content in (
        ("a.c", b"int a;\n"),
        ("b.c", b"int b;\n"),
        ("copy.c", b"int a;\n"),
        ("x.c", b"\xff\xfe"),
        ("minified.c", b"x" * 5000),
    ):
        files.append(tmp_path / name)
        files[-1].write_bytes(content)
    size, used = scripts.collect._write_label(tmp_path / "c.txt", [*files, tmp_path / "gone.c"], 1000)
    assert (size, len(used)) == (12, 2)
    assert sorted((tmp_path / "c.txt").read_text(encoding="utf-8").split("\n\n")) == ["", "int a;", "int b;"]
