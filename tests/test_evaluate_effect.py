"""The effect on the model: equal to a plain computation without packing, exact where the truth is known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM

import saeforge
from saeforge.cli.main import main
from saeforge.data.manifest import Manifest
from saeforge.data.shard_source import ShardSource
from saeforge.data.shards import ActivationDataset
from saeforge.errors import ConfigError, DatasetError, SaeforgeError
from saeforge.evaluation.effect import Effect, EffectMetrics, measure_effect
from saeforge.evaluation.held_out import HeldOutTexts
from saeforge.evaluation.judge import Evaluation
from saeforge.evaluation.passes import Replace, SplicedModel
from saeforge.evaluation.table import label_rows, notes
from saeforge.harvest import harvest
from saeforge.lm.load import quiet
from saeforge.lm.sites import Site
from saeforge.sae import SAE
from tests.tiny_models import D, make_documents, save_model, write_text_folder
from tests.toy import toy_dataset

LAYER = {"gpt2": "transformer.h.1", "llama": "model.layers.1"}
SITE = {"gpt2": "h.1", "llama": "layers.1"}
SPECIAL = {"gpt2": "<|endoftext|>", "llama": "<s>"}
CONTEXT = 64
NUMBERS = [name for name in EffectMetrics.__dataclass_fields__ if name not in ("intervals", "tokens", "documents")]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, texts with special tokens in their middle, and a dataset of each model; one of them not packed."""
    home = tmp_path_factory.mktemp("effect")
    for kind in ("gpt2", "llama", "bert"):
        save_model(kind, home / kind)
    documents = make_documents(200)
    for number in range(0, 200, 5):
        words = documents[number].split()
        words[3:3] = SPECIAL.values()
        documents[number] = " ".join(words)
    write_text_folder(home / "text", documents)
    make_dataset(home, "gpt2", home / "acts-gpt2", pack=True)
    make_dataset(home, "gpt2", home / "acts-first", pack=True, drop_first=False)  # only here a border could be scored
    make_dataset(home, "llama", home / "acts-llama", pack=True)
    make_dataset(home, "llama", home / "acts-alone", pack=False)
    make_dataset(home, "bert", home / "acts-bert")
    return home


def make_dataset(home: Path, kind: str, out: Path, **changes: Any) -> None:
    options: dict[str, Any] = {
        "model": str(home / kind),
        "sites": ["resid_post.1", "resid_pre.1"],
        "out": str(out),
        "text": str(home / "text"),
        "n_tokens": 100_000,
        "document_tokens": 75,  # what is beyond is neither spliced nor scored
        "context_length": CONTEXT,
        "batch_contexts": 8,
        "store_dtype": "float32",
        "validation_share": 0.4,
        "device": "cpu",
    }
    harvest(**options | changes)


def meta_of(dataset: Path, kind: str, *, target: str | None = None, site: str | None = None) -> dict[str, Any]:
    site = site or f"{SITE[kind]}:out"
    return ShardSource(str(dataset), input=site, target=target).pairs[0].identity


def random_sae(meta: dict[str, Any], *, d_sae: int = 96, k: int = 8, skip: bool = False) -> SAE:
    """Random directions: a bad SAE, so that every pass differs from every other."""
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(d_sae, D, generator=generator)
    b_dec = torch.randn(D, generator=generator)
    W_skip = torch.randn(D, D, generator=generator) / 6 if skip else None
    return SAE(W / 4, torch.zeros(d_sae), W / 4, b_dec, rule="topk", k=k, W_skip=W_skip, meta=meta)


def open_parts(dataset: Path, kind: str, *, dtype: torch.dtype = torch.float32, budget: int = 10**9) -> Any:
    model = AutoModelForCausalLM.from_pretrained(dataset.parent / kind, dtype=dtype).eval().requires_grad_(False)
    site = Site(SITE[kind], "out")
    texts = HeldOutTexts(dataset, Manifest.load(dataset / "manifest.json"), "validation", budget=budget)
    mean = torch.tensor(ShardSource(str(dataset), input=site.id).statistics[0].mean)
    return SplicedModel(model, site, site), mean, texts


def measure(dataset: Path, kind: str, replace: Replace, **options: Any) -> Effect:
    model, mean, texts = open_parts(dataset, kind)
    return measure_effect(model, replace, mean, texts, **options)


def documents_of(dataset: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (dataset / "tokens" / "documents.jsonl").read_text().splitlines()]


def brute_force(home: Path, dataset: Path, kind: str, sae: SAE, *, reads: str = "out") -> dict[str, dict[str, float]]:
    """Every segment alone, in float64, with hooks of its own: {label or "all": {metric: mean}}."""
    tokenizer = AutoTokenizer.from_pretrained(home / kind)
    model = AutoModelForCausalLM.from_pretrained(home / kind).eval().double()
    sae = sae.double()
    mean = torch.tensor(ShardSource(str(dataset), input=f"{SITE[kind]}:out").statistics[0].mean, dtype=torch.float64)
    layer = model.get_submodule(LAYER[kind])
    before = [1] if kind == "llama" else []
    room = CONTEXT - len(before)
    state: dict[str, Any] = {}

    def see(module: Any, args: Any, kwargs: Any) -> None:
        state["in"] = (args[0] if args else kwargs["hidden_states"])[0].clone()

    def swap(module: Any, args: Any, output: Any) -> Any:
        if state["mode"] == "original":
            return None
        x = (output if isinstance(output, torch.Tensor) else output[0]).clone()
        source = state["in"] if reads == "in" else x[0].clone()
        new = {"sae": sae(source), "zero": 0 * x[0], "mean": mean.expand_as(x[0])}[state["mode"]]
        for i in state["kept"]:
            x[0, i] = new[i]
        return x if isinstance(output, torch.Tensor) else (x, *output[1:])

    layer.register_forward_pre_hook(see, with_kwargs=True)
    layer.register_forward_hook(swap)
    sums: dict[str, dict[str, float]] = {}
    for record in documents_of(dataset):
        if record["split"] != "validation":
            continue
        ids = tokenizer((home / "text" / record["name"]).read_text(), add_special_tokens=False)["input_ids"]
        left = record["kept"]
        for start in range(0, len(ids), room):
            piece = ids[start : start + room]
            kept = []
            for i, token in enumerate(piece):
                special = token in tokenizer.all_special_ids and token != (0 if kind == "llama" else None)
                first = dataset.name == "acts-gpt2" and i == 0
                if not special and not first and left > 0:
                    left -= 1
                    kept.append(len(before) + i)
            state["kept"] = kept
            log_p = {}
            for mode in ("original", "sae", "zero", "mean"):
                state["mode"] = mode
                with torch.no_grad():
                    log_p[mode] = model(torch.tensor([[*before, *piece]])).logits[0].log_softmax(-1)
            for i in kept:
                if i + 1 not in kept:
                    continue
                target = [*before, *piece][i + 1]
                p = log_p["original"][i]
                for label in ("all", record["label"]):
                    entry = sums.setdefault(label, dict.fromkeys(["tokens"], 0.0))
                    entry["tokens"] += 1
                    entry["ce_original"] = entry.get("ce_original", 0) - float(p[target])
                    for mode in ("sae", "zero", "mean"):
                        q = log_p[mode][i]
                        for name, value in (
                            (f"ce_{mode}", -q[target]),
                            (f"kl_{mode}", (p.exp() * (p - q)).sum()),
                            (f"top1_{mode}", p.argmax() == q.argmax()),
                        ):
                            entry[name] = entry.get(name, 0) + float(value)
        assert left == 0
    for entry in sums.values():
        for name in entry:
            if name != "tokens":
                entry[name] /= entry["tokens"]
        entry["delta_ce"] = entry["ce_sae"] - entry["ce_original"]
        for name in ("zero", "mean"):
            harm = entry[f"ce_{name}"] - entry["ce_original"]
            entry[f"ce_score_{name}"] = (entry[f"ce_{name}"] - entry["ce_sae"]) / harm
    return sums


@pytest.mark.parametrize(
    ("name", "kind"), [("gpt2", "gpt2"), ("first", "gpt2"), ("llama", "llama"), ("alone", "llama")]
)
def test_it_equals_a_float64_computation_segment_by_segment(home: Path, name: str, kind: str) -> None:
    dataset = home / f"acts-{name}"
    expected = brute_force(home, dataset, kind, random_sae(meta_of(dataset, kind)))
    result = saeforge.evaluate(random_sae(meta_of(dataset, kind)), effect=True, device="cpu")
    assert result.effect is not None
    assert result.effect.settings["packed"] == (name != "alone")
    check(result.effect, expected)


def check(effect: Effect, expected: dict[str, dict[str, float]]) -> None:
    found = {"all": effect.overall, **effect.by_label}
    assert found.keys() == expected.keys() == {"all", "even", "odd"}
    for label, metrics in found.items():
        assert metrics.tokens == expected[label]["tokens"] > 300
        for metric in NUMBERS:
            value = getattr(metrics, metric)
            if value is None:
                assert expected[label][f"ce_{metric[9:]}"] <= expected[label]["ce_original"]
                continue
            tolerance = 1.1 / metrics.tokens if metric.startswith("top1") else 2e-4
            assert value == pytest.approx(expected[label][metric], abs=tolerance, rel=1e-3), (label, metric)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_transcoder_writes_its_output_from_the_other_sites_input(home: Path, kind: str) -> None:
    dataset = home / f"acts-{kind}"
    meta = meta_of(dataset, kind, site=f"{SITE[kind]}:in", target=f"{SITE[kind]}:out")
    expected = brute_force(home, dataset, kind, random_sae(meta, skip=True), reads="in")
    result = saeforge.evaluate(random_sae(meta, skip=True), effect=True, device="cpu")
    assert result.effect is not None
    check(result.effect, expected)


def test_doing_nothing_is_exactly_no_effect(home: Path) -> None:
    for kind in ("gpt2", "llama"):
        metrics = measure(home / f"acts-{kind}", kind, lambda x: x).overall
        assert (metrics.delta_ce, metrics.kl_sae, metrics.top1_sae) == (0.0, 0.0, 1.0)
        assert metrics.intervals["delta_ce"] == (0.0, 0.0)


def test_the_identity_sae_has_no_effect_but_for_rounding(home: Path) -> None:
    eye = torch.eye(D)
    W = torch.cat([eye, -eye])
    sae = SAE(W, torch.zeros(2 * D), W, torch.zeros(D), rule="threshold", threshold=torch.zeros(2 * D))
    metrics = measure(home / "acts-llama", "llama", sae).overall
    assert abs(metrics.delta_ce) < 1e-6
    assert abs(metrics.kl_sae) < 1e-6
    assert metrics.ce_zero - metrics.ce_original != 0


def test_sae_that_gives_zero_or_the_mean_equals_that_ablation(home: Path) -> None:
    dataset = home / "acts-gpt2"
    _, mean, _ = open_parts(dataset, "gpt2")
    for name, b_dec in (("zero", torch.zeros(D)), ("mean", mean)):
        never = torch.full((8,), 1e30)
        sae = SAE(torch.ones(8, D), torch.zeros(8), torch.ones(8, D), b_dec, rule="threshold", threshold=never)
        metrics = measure(dataset, "gpt2", sae).overall
        for what in ("ce", "kl", "top1"):
            assert getattr(metrics, f"{what}_sae") == getattr(metrics, f"{what}_{name}")
        assert metrics.ce_zero != metrics.ce_mean
        assert getattr(metrics, f"ce_score_{name}") in (0.0, None)


def test_the_result_does_not_depend_on_the_batch(home: Path) -> None:
    sae = random_sae(meta_of(home / "acts-llama", "llama"))
    results = [measure(home / "acts-llama", "llama", sae, contexts_at_once=n) for n in (1, 3, 1000)]
    for result in results[1:]:
        assert result.overall.tokens == results[0].overall.tokens
        for name in NUMBERS:
            value, first = getattr(result.overall, name), getattr(results[0].overall, name)
            assert value == (None if first is None else pytest.approx(first, rel=1e-4, abs=1e-5))


def test_labels_add_up_to_all(home: Path) -> None:
    effect = measure(home / "acts-gpt2", "gpt2", random_sae(meta_of(home / "acts-gpt2", "gpt2")))
    parts = list(effect.by_label.values())
    assert sum(part.tokens for part in parts) == effect.overall.tokens
    assert sum(part.documents for part in parts) == effect.overall.documents
    for name in NUMBERS:
        if "score" not in name:
            total = sum(getattr(part, name) * part.tokens for part in parts) / effect.overall.tokens
            assert getattr(effect.overall, name) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("name", ["gpt2", "first", "llama", "alone"])
def test_no_prediction_across_texts_or_of_special_tokens_is_scored(home: Path, name: str) -> None:
    dataset = home / f"acts-{name}"
    kind = "gpt2" if name in ("gpt2", "first") else "llama"
    texts = HeldOutTexts(dataset, Manifest.load(dataset / "manifest.json"), "validation", budget=10**9)
    arrays = {key: np.array(array) for key, array in texts.contexts.arrays.items()}
    specials = set(AutoTokenizer.from_pretrained(home / kind).all_special_ids) - ({0} if kind == "llama" else set())
    # By hand over the flat arrays: the same segment means the same document and the next position in it.
    starts = set(arrays["offsets"].tolist())
    expected = []
    for i in range(len(arrays["tokens"]) - 1):
        pair = arrays["tokens"][[i, i + 1]].tolist()
        together = arrays["documents"][i] == arrays["documents"][i + 1] and i + 1 not in starts
        follows = int(arrays["positions"][i]) + 1 == int(arrays["positions"][i + 1])
        if together and follows and arrays["within"][i + 1] > 0 and arrays["keep"][[i, i + 1]].all():
            assert not specials & set(pair)
            expected.append((int(arrays["documents"][i]), *pair))
    for size in (1, 5):
        found = []
        for batch in texts.batches(size):
            ids = batch.batch.input_ids.flatten()
            assert torch.equal(ids[batch.predicting + 1], batch.targets)
            assert set(batch.predicting.tolist()) <= set(batch.kept.tolist())
            found += list(
                zip(batch.documents.tolist(), ids[batch.predicting].tolist(), batch.targets.tolist(), strict=True)
            )
        assert found == expected
    segments = int((arrays["within"] == 0).sum())
    assert 0 < len(expected) < len(arrays["tokens"]) - segments


def test_the_budget_takes_whole_contexts(home: Path) -> None:
    everything = open_parts(home / "acts-gpt2", "gpt2")[2]
    part = open_parts(home / "acts-gpt2", "gpt2", budget=200)[2]
    fewer = sum(len(batch.targets) for batch in list(part.batches(1))[:-1])
    assert fewer < 200 <= part.tokens == sum(len(batch.targets) for batch in part.batches(4))
    assert 1 < part.n_contexts < everything.n_contexts == everything.n_all


def test_everything_is_finite_in_bf16(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "text", tmp_path / "text")
    save_model("llama", tmp_path / "llama", dtype=torch.bfloat16)
    make_dataset(tmp_path, "llama", tmp_path / "acts")
    model, mean, texts = open_parts(tmp_path / "acts", "llama", dtype=torch.bfloat16)
    seen = []

    def replace(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.dtype)
        return x.float() * 50

    metrics = measure_effect(model, replace, mean, texts).overall
    assert set(seen) == {torch.bfloat16}
    values = [getattr(metrics, name) for name in NUMBERS if "score" not in name]
    assert all(np.isfinite(values))
    assert metrics.kl_sae > 0
    result = saeforge.evaluate(random_sae(meta_of(tmp_path / "acts", "llama")), effect=True, device="cpu")
    assert result.effect is not None
    assert result.effect.settings["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_hooks_are_gone_after_a_failure(home: Path, kind: str) -> None:
    model, mean, texts = open_parts(home / f"acts-{kind}", kind)

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        measure_effect(model, fail, mean, texts)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())


def test_a_transcoder_against_the_flow_is_refused(home: Path) -> None:
    model, mean, texts = open_parts(home / "acts-llama", "llama")
    backwards = SplicedModel(model.model, Site("layers.2", "out"), Site("layers.1", "out"))
    with pytest.raises(ConfigError, match=r"layers.1:out does not run once after layers.2:out"):
        measure_effect(backwards, lambda x: x, mean, texts)


def save_run(sae: SAE, folder: Path) -> Path:
    sae.save(folder / "sae")
    return folder


def test_the_command_writes_and_prints_the_effect(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(random_sae(meta_of(home / "acts-gpt2", "gpt2")), tmp_path / "run")
    assert main(["evaluate", str(run), "--device", "cpu", "--effect_tokens", "500", "--batch_contexts", "2"]) == 0
    printed = capsys.readouterr().out
    written = json.loads((run / "evaluation.json").read_text())
    effect = written["effect"]
    assert "effect_reason" not in written
    assert f"{effect['overall']['delta_ce']:+.4f}" in printed
    assert printed.index("ΔCE") < printed.index("L0")
    assert "even" in printed
    assert "documents only" in printed
    assert effect["settings"]["effect_tokens"] == 500
    assert 500 <= effect["overall"]["tokens"] < 600
    dataset = ActivationDataset.open(home / "acts-gpt2", site="h.1:out")
    blocks = range(dataset.n_blocks("validation"))
    documents = {int(row[0]) for block in blocks for row in dataset.read_rows("validation", block)}
    assert written["firing"]["documents"] == len(documents) > 3
    assert written["firing"]["dead_bound"] == 3 / len(documents)
    named = {name.strip() for key in effect["conventions"] for name in key.split(",")}
    assert {*NUMBERS, "tokens", "by_label", "intervals"} <= named
    assert main(["evaluate", str(run), "--device", "cpu", "--effect", "false", "--json"]) == 0
    off = json.loads(capsys.readouterr().out)
    assert off["effect"] is None
    assert off["metrics"] == written["metrics"]


def test_what_is_missing_is_noted_or_an_error(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bert = random_sae(meta_of(home / "acts-bert", "bert", site="encoder.layer.1:out"))
    moved = random_sae(meta_of(home / "acts-gpt2", "gpt2"))
    moved.meta["model"] = {**moved.meta["model"], "name": str(home / "gone")}
    toy = SAE.load(
        saeforge.train(toy_dataset(tmp_path / "toy"), d_sae=64, k=4, tokens=512, batch_size=256, progress=False).save(
            tmp_path / "toy-sae"
        )
    )
    for sae, words in ((bert, "no causal language model"), (moved, "gone"), (toy, "which model")):
        run = save_run(sae, tmp_path / words.replace(" ", "-"))
        assert main(["evaluate", str(run), "--device", "cpu"]) == 0
        printed = capsys.readouterr().out
        assert "note: the effect on the model was not measured" in printed
        result = json.loads((run / "evaluation.json").read_text())
        assert result["effect"] is None
        assert words in result["effect_reason"]
        assert main(["evaluate", str(run), "--device", "cpu", "--effect", "true"]) == 2
        assert words in capsys.readouterr().err
    run = tmp_path / "gone"
    assert main(["evaluate", str(run), "--device", "cpu", "--effect", "true", "--model", str(home / "gpt2")]) == 0
    assert main(["evaluate", str(run), "--effect", "perhaps"]) == 2
    assert "auto, true or false" in capsys.readouterr().err


def test_a_model_that_sees_the_next_token_is_no_causal_model(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "bert", tmp_path / "bert")
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(home / "bert")
    with quiet():
        BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    shutil.copytree(home / "text", tmp_path / "text")
    make_dataset(tmp_path, "bert", tmp_path / "acts")
    sae = random_sae(meta_of(tmp_path / "acts", "bert", site="encoder.layer.1:out"))
    with pytest.raises(ConfigError, match="see the next token"):
        saeforge.evaluate(sae, effect=True, device="cpu")


def test_damaged_or_foreign_texts_are_refused(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "acts-gpt2", tmp_path / "acts")
    sae = random_sae(meta_of(home / "acts-gpt2", "gpt2"))
    path = tmp_path / "acts" / "tokens" / "validation.keep.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"validation.keep.npy is damaged"):
        saeforge.evaluate(sae, data=tmp_path / "acts", device="cpu")
    path.unlink()
    with pytest.raises(DatasetError, match=r"validation.keep.npy is missing"):
        saeforge.evaluate(sae, data=tmp_path / "acts", effect=True, device="cpu")
    sae.meta["model"] = {**sae.meta["model"], "name": "other", "files_sha256": "0" * 64}
    with pytest.raises(ConfigError, match="was harvested from model"):
        saeforge.evaluate(sae, data=home / "acts-gpt2", effect=True, device="cpu")


def test_a_dataset_of_other_weights_under_the_same_name_is_refused(home: Path, tmp_path: Path) -> None:
    sae = random_sae(meta_of(home / "acts-gpt2", "gpt2"))
    own = sae.meta["model"]
    sae.meta["model"] = {**own, "files_sha256": "0" * 64}
    with pytest.raises(ConfigError, match="this SAE is of other weights of that name"):
        saeforge.evaluate(sae, effect=True, device="cpu")
    # A folder that moved is the same model.
    shutil.copytree(home / "gpt2", tmp_path / "moved")
    sae.meta["model"] = {**own, "name": str(tmp_path / "moved")}
    assert saeforge.evaluate(sae, effect=True, effect_tokens=50, device="cpu").effect is not None


@pytest.mark.parametrize("option", ["effect_tokens", "batch_contexts"])
def test_impossible_numbers_are_refused(home: Path, option: str) -> None:
    sae = random_sae(meta_of(home / "acts-gpt2", "gpt2"))
    options: dict[str, Any] = {option: 0}
    with pytest.raises(SaeforgeError, match=f"{option} = 0"):
        saeforge.evaluate(sae, device="cpu", **options)
    with pytest.raises(SaeforgeError, match="seed = -1"):
        saeforge.evaluate(sae, device="cpu", seed=-1)


@pytest.mark.parametrize(("labels", "rows"), [(1, 0), (2, 2), (12, 12), (15, 13), (40, 13), (41, 0)])
def test_the_table_never_shows_dozens_of_labels(labels: int, rows: int, home: Path) -> None:
    effect = measure(home / "acts-gpt2", "gpt2", lambda x: x)
    many = Effect(effect.overall, {f"l{i}": effect.overall for i in range(labels)}, effect.settings)
    about = {"trained_on_this_dataset": True}
    result = Evaluation(None, None, None, many, None, 8, about)  # type: ignore[arg-type]
    assert len(label_rows(result)) == rows
    assert any("too many" in note for note in notes(result)) == (labels == 41)
    if rows == 13:
        assert label_rows(result)[-1][:3] == (
            f"{labels - 12} others",
            f"{(labels - 12) * effect.overall.documents:,}",
            f"{(labels - 12) * effect.overall.tokens:,}",
        )
