"""`saeforge push` and `saeforge card`: what goes to the hub, byte by byte, and what comes back from it."""

from __future__ import annotations

import builtins
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import saeforge
from saeforge.cli.main import main
from saeforge.errors import CheckpointError, ConfigError, SaeforgeError
from saeforge.formats.card import MARK
from saeforge.formats.publish import card_of, push
from saeforge.sae import SAE
from tests.hub_server import HubServer, as_the_hub

REPO = "user/saes"
EVALUATION = {
    "metrics": {"tokens": 4096, "l0_mean": 31.5, "fvu": 0.2125, "dead": 3, "cosine": None},
    "conventions": {"fvu": "squares | over the set", "l0_mean, l0_p5": "latents != 0", "dead": "fired on no token"},
    "effect": {
        "overall": {"delta_ce": 0.0625, "intervals": {"delta_ce": [0.05, 0.07]}},
        "conventions": {"delta_ce": "ce_sae - ce_original, nats"},
        "settings": {"model": "/home/someone/models/gemma"},
    },
    "dataset": "abc123",
    "split": "validation",
    "trained_on_this_dataset": True,
}


def make_sae(seed: int = 0, rule: str = "topk", **meta: Any) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    W_enc, W_dec = (torch.randn(24, 8, generator=generator) for _ in range(2))
    options: dict[str, Any] = {"k": 4} if rule == "topk" else {"threshold": torch.zeros(24)}
    origin = {
        "model": {"name": "google/gemma-2-2b", "class": "Gemma2Model", "revision": "c0ffee", "files_sha256": None},
        "site": {"id": "layers.3:out", "module_path": "layers.3", "where": "out", "d": 8},
        "target": None,
        "dataset": "abc123",
        "dataset_path": "/home/someone/data/books",
        "variant": {"name": "topk", "distribution": "saeforge", "version": "0.1.0", "options": {"d_sae": 24, "k": 4}},
        "training": {"steps": 100, "tokens": 409600, "saeforge": "0.1.0"},
    }
    return SAE(W_enc, torch.zeros(24), W_dec, torch.zeros(8), rule=rule, meta=origin | meta, **options)  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A RUN with an SAE and its evaluation."""
    make_sae().save(tmp_path / "run" / "sae")
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps(EVALUATION))
    return tmp_path / "run"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with as_the_hub(monkeypatch, str(tmp_path / "cache")) as server:
        yield server


# ---- what is uploaded


def test_a_run_goes_up_whole_in_one_commit_and_comes_back_the_same(run: Path, hub: HubServer) -> None:
    pushed = push(run, REPO)
    files = hub.files(REPO)
    assert set(files) == {"README.md", "evaluation.json", "sae.json", "sae.safetensors"} == set(pushed.sizes)
    assert files["sae.safetensors"] == (run / "sae" / "sae.safetensors").read_bytes()
    assert {name: len(content) for name, content in files.items()} == pushed.sizes
    assert hub.repos[REPO].messages == ["Upload 1 SAE with saeforge"]
    assert {token for _, _, token in hub.asked if token} == {"hf_writes"}
    assert pushed.location == f"hf://{REPO}"
    back, sae = saeforge.load(pushed.location), saeforge.load(run)
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in sae.state_dict().items())
    assert back.meta["site"] == sae.meta["site"]


def test_no_folder_of_this_disk_goes_up(run: Path, hub: HubServer) -> None:
    push(run, REPO)
    assert [name for name, content in hub.files(REPO).items() if b"someone" in content] == []
    assert json.loads(hub.files(REPO)["sae.json"])["dataset_path"] == "books"
    assert json.loads(hub.files(REPO)["evaluation.json"])["effect"]["settings"]["model"] == "gemma"


def test_a_folder_and_a_branch_are_made_and_the_rest_stays(run: Path, hub: HubServer) -> None:
    push(run, REPO)
    pushed = push(run, REPO, path="layer_3/topk/", revision="v2", message="again")
    assert pushed.location == f"hf://{REPO}@v2/layer_3/topk"
    assert {"README.md", "layer_3/topk/README.md", "layer_3/topk/sae.safetensors"} <= set(hub.files(REPO, "v2"))
    assert "layer_3/topk/README.md" not in hub.files(REPO)
    assert 'saeforge.load("hf://user/saes@v2/layer_3/topk")' in pushed.card
    assert saeforge.load(pushed.location).d_sae == 24


def test_the_saes_of_a_sweep_get_a_folder_each_and_one_card(tmp_path: Path, hub: HubServer) -> None:
    for number, name in enumerate(("k_4", "k_8")):
        make_sae(number).save(tmp_path / "sweep" / name / "sae")
    (tmp_path / "sweep" / "k_8" / "evaluation.json").write_text(json.dumps(EVALUATION))
    pushed = push(tmp_path / "sweep", REPO, path="all")
    files = {f"all/k_{k}/sae.{end}" for k in (4, 8) for end in ("json", "safetensors")}
    assert set(hub.files(REPO)) == files | {"all/README.md", "all/k_8/evaluation.json"}
    assert pushed.members == ["k_4", "k_8"]
    assert torch.equal(saeforge.load(f"{pushed.location}/k_8").W_enc, make_sae(1).W_enc)
    assert "| `k_8` | layers.3:out | topk | 24 | 31.5 | 0.2125 | 0.0625 |" in pushed.card
    with pytest.raises(CheckpointError, match="k_4"):
        saeforge.load(pushed.location)


def test_the_files_can_be_another_tools(run: Path, hub: HubServer) -> None:
    push(run, REPO, path="sae", format="saelens")
    assert {"sae/cfg.json", "sae/sae_weights.safetensors", "sae/README.md"} <= set(hub.files(REPO))
    assert b"someone" not in hub.files(REPO)["sae/cfg.json"]
    back = saeforge.load(f"hf://{REPO}/sae")
    assert back.meta["imported"]["format"] == "saelens"
    assert torch.equal(back.W_enc, make_sae().W_enc)


def test_a_card_that_a_person_wrote_stays_and_ours_is_renewed(run: Path, hub: HubServer) -> None:
    push(run, REPO)
    (run / "evaluation.json").unlink()
    assert push(run, REPO).notes == []
    assert b"Not evaluated" in hub.files(REPO)["README.md"]
    hub.repos[REPO].commit("main", {"README.md": b"---\nlicense: mit\n---\nMine."})
    assert "stays" in push(run, REPO).notes[0]
    assert hub.files(REPO)["README.md"].endswith(b"Mine.")
    hub.repos[REPO].commit("main", {"README.md": b"---\nlicense: mit\n---\n"})  # what the hub makes of a new repository
    assert push(run, REPO).notes == []


def test_private_means_private(run: Path, hub: HubServer) -> None:
    push(run, REPO, private=True)
    assert hub.repos[REPO].private
    push(run, REPO, private=True)
    push(run, "user/open")
    with pytest.raises(ConfigError, match="is public already"):
        push(run, "user/open", private=True)
    assert len(hub.repos["user/open"].messages) == 1


# ---- coming back: pins and the cache


def test_a_revision_is_pinned_and_the_cache_serves_without_the_hub(
    run: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    push(run, REPO, path="a")
    first = hub.repos[REPO].branches["main"]
    make_sae(1).save(run / "sae")
    push(run, REPO, path="a")
    old, new = f"hf://{REPO}@{first}/a", f"hf://{REPO}/a"
    assert torch.equal(saeforge.load(old).W_enc, make_sae(0).W_enc)
    assert torch.equal(saeforge.load(new).W_enc, make_sae(1).W_enc)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert torch.equal(saeforge.load(old).W_enc, make_sae(0).W_enc)
    assert torch.equal(saeforge.load(f"hf://{REPO}@{first[:8]}/a").W_enc, make_sae(0).W_enc)
    assert torch.equal(saeforge.load(new).W_enc, make_sae(1).W_enc)
    assert hub.asked == []
    for missing in (f"hf://{REPO}/b", f"hf://{REPO}@v9/a", "hf://user/other/a"):
        with pytest.raises(CheckpointError, match="offline mode") as refused:
            saeforge.load(missing)
        assert "\n" not in str(refused.value)


def test_a_hub_that_is_not_reached_is_said_and_the_cache_serves(
    run: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    push(run, REPO)
    saeforge.load(f"hf://{REPO}")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # it would wait longer each time
    with pytest.warns(UserWarning, match="cannot be reached"):
        assert saeforge.load(f"hf://{REPO}").d_sae == 24
    with pytest.raises(CheckpointError, match="does not give it"):
        saeforge.load("hf://user/never-seen")


def test_a_repository_that_is_gone_is_not_taken_from_the_cache(run: Path, hub: HubServer) -> None:
    push(run, REPO)
    saeforge.load(f"hf://{REPO}")
    hub.repos.clear()
    with pytest.raises(CheckpointError, match="does not give it"):
        saeforge.load(f"hf://{REPO}")


# ---- the card


def front_matter(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    return found


def test_the_card_says_what_it_is_and_each_figure_with_its_convention(run: Path) -> None:
    card = card_of(run, repo=REPO, license="apache-2.0")
    head = front_matter(card)
    assert (head["library_name"], head["license"], head["base_model"]) == (
        "saeforge",
        "apache-2.0",
        "google/gemma-2-2b",
    )
    assert {"saeforge", "sparse-autoencoder", "topk"} <= set(head["tags"])
    for text in (
        "24 latents of `google/gemma-2-2b` at `layers.3:out`",
        "| fvu | 0.2125 | squares \\| over the set |",
        "| delta_ce | 0.0625 [0.05, 0.07] | ce_sae - ce_original, nats |",
        "| l0_mean | 31.5 | latents != 0 |",
        "4,096 tokens of the validation split of dataset `abc123` (the one it was trained on)",
        "409,600 tokens, 100 steps",
        "top-k: the 4 largest",
        "revision c0ffee",
        MARK,
    ):
        assert text in card
    assert "cosine" not in card.split("## How good it is")[1]  # null in the file
    assert "pip install saeforge-" not in card


def test_the_lines_of_use_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = card_of(run, repo=REPO).split("```python\n")[1].split("```")[0]
    x = torch.randn(5, 8)
    sae = saeforge.load(run)
    monkeypatch.setattr(saeforge, "load", lambda place: sae if place == f"hf://{REPO}" else None, raising=False)
    names: dict[str, Any] = {"x": x}
    exec(code.split("with saeforge")[0], names)
    assert torch.equal(names["x_hat"], sae(x))


@pytest.mark.parametrize(
    "model",
    [
        {"name": "/home/someone/gemma", "files_sha256": "1f"},
        {"name": "gemma", "files_sha256": "1f"},
        {"name": "demo"},
        {"name": "package:thing"},
        None,
    ],
)
def test_a_model_that_is_not_on_the_hub_is_no_base_model(tmp_path: Path, model: Any) -> None:
    make_sae(model=model).save(tmp_path / "sae")
    card = card_of(tmp_path)
    assert "base_model" not in front_matter(card)
    assert "someone" not in card


def test_what_a_file_says_cannot_break_out_of_the_card(tmp_path: Path) -> None:
    evil = "x |\n---\nlicense: evil\n<script>`"
    make_sae(model={"name": evil, "files_sha256": None}, variant={"name": evil}).save(tmp_path / "sae")
    card = card_of(tmp_path)
    assert "license" not in front_matter(card)
    assert "<script>" not in card.split("---", 2)[2].replace("`x / --- license: evil <script>`", "")


def test_the_card_of_an_sae_that_needs_its_plugin_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = make_sae(variant={"name": "panneal", "distribution": "saeforge-panneal", "version": "0.2"})
    monkeypatch.setattr("saeforge.formats.publish.load_own", lambda folder: sae)
    sae.rule = "plugin"
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "sae.json").write_text("{}")
    assert "Needs `pip install saeforge-panneal` (made with 0.2) to load" in card_of(tmp_path)


# ---- the commands


def test_a_dry_run_prints_the_card_and_reaches_for_nothing(
    run: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(run), "--repo", REPO, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "library_name: saeforge" in out
    assert "sae.safetensors" in out
    assert "nothing was uploaded" in out
    assert hub.asked == []


def test_the_commands_print_what_was_done(run: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(run), "--repo", REPO, "--license", "mit", "--private"]) == 0
    out = capsys.readouterr().out
    assert f'saeforge.load("hf://{REPO}")' in out
    assert "/commit/" in out
    assert main(["card", str(run), "--repo", REPO, "--license", "mit", "--out", str(run / "README.md")]) == 0
    assert (run / "README.md").read_bytes() == hub.files(REPO)["README.md"]
    assert main(["card", str(run)]) == 0
    assert "USER/NAME" in capsys.readouterr().out


# ---- what goes wrong


def refused(run: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["push", str(run), "--repo", REPO, *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("saeforge: error: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "repos/create", 401, "does not know this token; `hf auth login`"),
        ("POST", "repos/create", 403, "may not write there"),
        ("POST", "preupload", 404, "no such repository for this token"),
        ("POST", "commit", 403, "may not write there"),
        ("POST", "commit", 409, "refuses"),
        ("PUT", "lfs", 403, "may not write there"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line_with_the_fix(
    run: Path, hub: HubServer, capsys: pytest.CaptureFixture[str], method: str, path: str, status: int, message: str
) -> None:
    hub.fails.append((method, path, status))
    assert message in refused(run, capsys)
    assert all(repo.messages == [] for repo in hub.repos.values())


def test_without_a_token_nothing_is_tried(
    run: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert "not logged in to the hub; `hf auth login`" in refused(run, capsys)
    assert hub.asked == []


def test_offline_and_unreachable_hubs_are_told_apart(
    run: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(run, capsys)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refused(run, capsys)


def test_without_huggingface_hub_the_error_says_what_to_install(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'saeforge[hub]'" in refused(run, capsys)
    with pytest.raises(CheckpointError, match=r"pip install 'saeforge\[hub\]'"):
        saeforge.load("hf://user/saes")


@pytest.mark.parametrize(
    ("repo", "path", "message"),
    [
        ("saes", "", "expected USER/NAME"),
        ("user/saes/more", "", "expected USER/NAME"),
        ("user/..", "", "expected USER/NAME"),
        ("user/saes", "a/../../b", r"without '\.\.'"),
        ("user/saes", "a\\b", r"without '\.\.'"),
        ("user/saes", "a//b", r"without '\.\.'"),
    ],
)
def test_names_that_are_none_are_refused(run: Path, repo: str, path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        push(run, repo, path=path)


def test_only_whole_saes_are_pushed(run: Path, tmp_path: Path, hub: HubServer) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="becomes a RUN by `saeforge import`"):
        push(tmp_path / "empty", REPO)
    (run / "evaluation.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"evaluation\.json is damaged"):
        push(run, REPO)
    (run / "evaluation.json").unlink()
    with pytest.raises(SaeforgeError, match="did you mean 'saelens'"):
        push(run, REPO, format="saelense")
    weights = run / "sae" / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="damaged"):
        push(run, REPO)
    assert hub.asked == []
