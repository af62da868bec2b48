"""`saeforge steer`: plain and steered text of the same seed, and mistakes of one line; and how text is generated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import decoders
from transformers import GenerationConfig

from saeforge.cli.main import main
from saeforge.errors import ConfigError
from saeforge.lm.causal import CausalLM, load_causal_lm
from saeforge.lm.generate import generate
from saeforge.steering import Add, Scale, steer
from tests.causal_models import D_SAE, make_sae
from tests.test_steering_edits import write_store
from tests.tiny_models import D, save_model

PROMPTS = ["the cat sat on", "seven green hills", "it ran over the red mat and then"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a RUN whose SAE belongs to it and whose features are measured."""
    folder = tmp_path_factory.mktemp("steer")
    save_model("llama", folder / "model")
    sae = make_sae("threshold", d=D)
    sae.meta["model"] = {"name": str(folder / "model"), "revision": None, "files_sha256": None}
    write_store(folder / "run", sae)
    return folder


@pytest.fixture(scope="module")
def causal(folder: Path) -> CausalLM:
    return load_causal_lm(str(folder / "model"))


def steered(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> Any:
    """The JSON of a command that works."""
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    assert main(["steer", str(folder / "run"), *prompts, "--max_new_tokens=20", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_texts_and_audit_are_those_of_the_functions(
    folder: Path, causal: CausalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    result = steered(folder, capsys, "--edit", "5=add:3", "--edit", "9=scale:-2")
    options: Any = dict(max_new_tokens=20, temperature=0.8)
    plain = [found.text for found in generate(causal, PROMPTS, **options)]
    edits: Any = {5: Add(3), 9: Scale(-2)}
    with steer(causal.model, make_sae("threshold", d=D), edits, tokenizer=causal.tokenizer) as steering:
        other = [found.text for found in generate(causal, PROMPTS, **options)]
    assert [text["prompt"] for text in result["texts"]] == PROMPTS
    assert [text["plain"] for text in result["texts"]] == plain
    assert [text["steered"] for text in result["texts"]] == other
    assert all(a != b for a, b in zip(plain, other, strict=True))
    assert result["edits"] == ["5=add:3", "9=scale:-2"]
    assert result["audit"] == json.loads(json.dumps(steering.audit().to_json()))
    assert result["audit"]["touched"] > 40


def test_an_edit_of_nothing_writes_the_plain_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--seed=3"], ["--greedy"], ["--top_p=0.9", "--temperature=1.5"]):
        result = steered(folder, capsys, "--edit=5=scale:1", *options)
        assert all(text["plain"] == text["steered"] for text in result["texts"])
    assert main(["steer", str(folder / "run"), "--edit=5=add:0", "--prompt=the"]) == 0
    assert "no token was touched" in capsys.readouterr().out


def test_the_units_are_those_of_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [steered(folder, capsys, f"--edit=0={edit}") for edit in ("add:2", "add:0.5p99", "add:0.25max")]
    assert results[0]["texts"] == results[1]["texts"] == results[2]["texts"]
    assert results[0]["audit"]["touched"] > 0


def test_where_is_passed_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audits = [
        steered(folder, capsys, "--edit=5=add:3", f"--where={where}")["audit"] for where in ("prompt", "generated")
    ]
    assert audits[0]["where"] == "prompt"
    assert audits[0]["touched"] != audits[1]["touched"]


def test_a_file_gives_the_same_and_the_command_line_beats_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"edit": ["5=add:3", "9=scale:-2"], "seed": 4}
    path = tmp_path / "steer.yaml"
    path.write_text(yaml.safe_dump(config))
    expected = steered(folder, capsys, "--edit=5=add:3", "--edit=9=scale:-2", "--seed=4")
    assert steered(folder, capsys, "--config", str(path)) == expected
    assert steered(folder, capsys, "--config", str(path), "--edit=5=scale:1")["edits"] == ["5=scale:1"]


def test_prompts_are_taken_as_they_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = ["[sic]", "null", "a: {b}", "${run} \\${x} \\\\${y}", "12", "--x", "two\nlines \N{SNOWMAN}\U0001f600"]
    arguments = [f"--prompt={prompt}" for prompt in odd]
    command = ["steer", str(folder / "run"), "--edit=5=add:3", "--max_new_tokens=1", "--json"]
    assert main([*command, *arguments]) == 0
    assert [text["prompt"] for text in json.loads(capsys.readouterr().out)["texts"]] == odd


def test_the_table_shows_both_texts_and_what_was_done(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["steer", str(folder / "run"), "--edit=5=clamp:3", "--prompt=the cat [red]sat", "--max_new_tokens=5"]
    assert main(command) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert "plain" in lines[2]
    assert "steered" in lines[2]
    assert captured.out.count("the cat [red]sat") == 2
    assert "tokens touched (all), |delta|/|x|" in captured.out
    assert "latent 5 (clamp:3): mean" in captured.out
    assert max(map(len, lines)) <= 110
    assert captured.err == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt=a"], "--edit 123=clamp:0"),
        (["--edit=5=clamp:0"], "--prompt"),
        (["--edit=5=clmp:0", "--prompt=a"], "unknown kind 'clmp'"),
        (["--edit=5=clamp:0", "--edit=5=scale:2", "--prompt=a"], "edited twice"),
        ([f"--edit={D_SAE}=clamp:0", "--prompt=a"], f"0 to {D_SAE - 1}"),
        (["--edit=3=add:1p99", "--prompt=a"], "its p99 is not known"),
        (["--edit=5=clamp:0", "--prompt=a", "--temperature=0"], "temperature = 0"),
        (["--edit=5=clamp:0", "--prompt=a", "--top_p=1.5"], "top_p = 1.5"),
        (["--edit=5=clamp:0", "--prompt=a", "--max_new_tokens=0"], "max_new_tokens = 0"),
        (["--edit=5=clamp:0", "--prompt=a", "--max_new_tokens=128"], "more than the model's 128"),
        (["--edit=5=clamp:0", "--prompt=a", "--seed=-1"], "seed = -1"),
        (["--edit=5=clamp:0", "--prompt=a", "--where=late"], "'generated'"),
        (["--edit=5=clamp:0", "--prompt=a", "--device=cudda"], "'cudda'"),
        (["--edit=5=clamp:0", "--prompt=a", "--model=./nowhere"], "no such folder"),
        (["--edit=5=clamp:0", "--prompt"], "--prompt"),
        (["--edit=5=clamp:0", "--prompt=a", "--sed=3"], "did you mean 'seed'"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["steer", str(folder / "run"), *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("saeforge: error: ")
    assert words in line


def test_an_sae_without_origin_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae = make_sae("topk")
    sae.meta = {}
    sae.save(tmp_path / "sae")
    assert main(["steer", str(tmp_path), "--edit=5=clamp:0", "--prompt=a"]) == 2
    assert "does not say which model" in capsys.readouterr().err


def test_parsing_needs_no_torch() -> None:
    code = "import sys, saeforge.cli.steer as s; s.make_parser(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_sampling_depends_on_seed_and_place_alone(causal: CausalLM) -> None:
    expected = generate(causal, PROMPTS, max_new_tokens=24, seed=1)
    torch.manual_seed(77)
    state = torch.get_rng_state()
    for batch_size in (1, 2, 3):
        assert generate(causal, PROMPTS, max_new_tokens=24, seed=1, batch_size=batch_size) == expected
    assert torch.equal(torch.get_rng_state(), state)
    other = generate(causal, PROMPTS, max_new_tokens=24, seed=2)
    assert all(a.tokens != b.tokens for a, b in zip(expected, other, strict=True))
    twice = generate(causal, [PROMPTS[0]] * 2, max_new_tokens=24, seed=1)
    assert twice[0] == expected[0]
    assert twice[1].tokens != twice[0].tokens  # the same prompt again is another sample


def test_samples_follow_the_models_distribution(causal: CausalLM) -> None:
    n, temperature, top_p = 1500, 0.7, 0.8
    found = generate(causal, [PROMPTS[0]] * n, max_new_tokens=1, temperature=temperature, top_p=top_p, batch_size=500)
    ids = torch.tensor([found[0].prompt])
    assert ids[0, 0] == causal.tokenizer.bos_token_id
    p = (causal.model(input_ids=ids).logits[0, -1].double() / temperature).softmax(0)
    order = p.argsort(descending=True)
    kept = order[(p[order].cumsum(0) - p[order]) < top_p]
    p = torch.zeros_like(p).index_copy(0, kept, p[kept] / p[kept].sum())
    ends = [one for one in found if not one.tokens]
    counts = torch.bincount(torch.tensor([one.tokens[0] for one in found if one.tokens]), minlength=len(p))
    counts[causal.tokenizer.eos_token_id] += len(ends)
    assert counts.sum() == n
    assert (counts[p == 0] == 0).all()
    assert 2 < len(kept) < len(p)
    spread = (n * p * (1 - p)).sqrt()[kept]
    assert ((counts[kept] - n * p[kept]).abs() < 4.5 * spread + 1).all()


def test_greedy_is_the_argmax_and_ends_at_eos(causal: CausalLM) -> None:
    found = generate(causal, PROMPTS, max_new_tokens=16, greedy=True)
    for one in found:
        ids = torch.tensor([one.prompt])
        for token in one.tokens:
            best = int(causal.model(input_ids=ids).logits[0, -1].argmax())
            assert token == best
            ids = torch.cat([ids, torch.tensor([[best]])], 1)
    assert causal.tokenizer.decode(found[0].tokens) == found[0].text
    token = found[1].tokens[3]
    model: Any = causal.model
    own = model.generation_config
    try:
        model.generation_config = GenerationConfig(eos_token_id=[2, token], repetition_penalty=9.0, do_sample=True)
        ended = generate(causal, PROMPTS, max_new_tokens=16, greedy=True)
        assert model.generation_config.repetition_penalty == 9.0  # left as it was found
    finally:
        model.generation_config = own
    for before, after in zip(found, ended, strict=True):
        tokens = before.tokens[: before.tokens.index(token)] if token in before.tokens else before.tokens
        assert after.tokens == tokens  # and the model's own penalty did not apply
    assert len(ended[1].tokens) <= 3


def test_a_continuation_keeps_the_space_before_it(tmp_path: Path) -> None:
    causal = load_causal_lm(str(save_model("llama", tmp_path)))
    plain = generate(causal, ["the cat"] * 8, max_new_tokens=4)
    decoder = causal.tokenizer.backend_tokenizer.decoder
    # As Llama's: a text's first space is not shown.
    strip = decoders.Sequence([decoder, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    causal.tokenizer.backend_tokenizer.decoder = strip
    assert any(one.text.startswith(" ") for one in plain)
    assert [one.text for one in generate(causal, ["the cat"] * 8, max_new_tokens=4)] == [one.text for one in plain]


def test_no_prompts_give_no_texts_and_an_empty_one_is_the_bos(causal: CausalLM, tmp_path: Path) -> None:
    assert generate(causal, []) == []
    (one,) = generate(causal, [""], max_new_tokens=4)
    assert one.prompt == (causal.tokenizer.bos_token_id,)
    without = load_causal_lm(str(save_model("gpt2", tmp_path)))
    assert len(generate(without, ["the cat"], max_new_tokens=4)) == 1
    with pytest.raises(ConfigError, match="has no tokens"):
        generate(without, ["the cat", ""], max_new_tokens=4)
