"""What loads the model of an SAE runs code that came with it only where `trust_remote_code` is given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import saeforge
from saeforge.cli.main import main
from saeforge.data.shard_source import ShardSource
from saeforge.errors import ConfigError
from saeforge.harvest import harvest
from saeforge.lm.origin import origin_of
from saeforge.sae import load
from tests.test_evaluate_effect import random_sae
from tests.tiny_models import WORDS, forget_code, make_documents, own_modules, save_model, write_text_folder

REFUSED = (
    "brings its own Python code, and none of it was run; read it, and if you trust it give trust_remote_code: true"
)
CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig
Path(r"{mark}").touch()

class HutConfig(LlamaConfig):
    model_type = "{model_type}"
"""
MODELING = """
from transformers import LlamaForCausalLM, LlamaModel
from .configuration_hut import HutConfig

class HutModel(LlamaModel):
    config_class = HutConfig

class HutForCausalLM(LlamaForCausalLM):
    config_class = HutConfig
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast

class HutTokenizer(PreTrainedTokenizerFast):
    pass
"""


def give_code(folder: Path, mark: Path, model_type: str) -> None:
    """Lets a model and its tokenizer come with code, which leaves a mark when it runs."""
    config = json.loads((folder / "config.json").read_text())
    classes = {
        "AutoConfig": "configuration_hut.HutConfig",
        "AutoModel": "modeling_hut.HutModel",
        "AutoModelForCausalLM": "modeling_hut.HutForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type, "auto_map": classes}))
    path = folder / "tokenizer_config.json"
    tokenizer = {"AutoTokenizer": [None, "tokenization_hut.HutTokenizer"]}
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "HutTokenizer", "auto_map": tokenizer})
    )
    (folder / "configuration_hut.py").write_text(
        CONFIGURATION.replace("{mark}", str(mark)).replace("{model_type}", model_type)
    )
    (folder / "modeling_hut.py").write_text(MODELING)
    (folder / "tokenization_hut.py").write_text(f"from pathlib import Path\nPath(r'{mark}').touch()\n{TOKENIZATION}")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two models with code, of a type that transformers does not know and of one that it does, and a RUN of each."""
    home = tmp_path_factory.mktemp("trust")
    lines = [{"text": f"{WORDS[i % 2]} {WORDS[i % 7 + 2]} {i}", "label": WORDS[i % 2]} for i in range(48)]
    (home / "labelled.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with own_modules(home / "modules"):
        write_text_folder(home / "text", make_documents(140, words=80))
        for kind in ("hut", "llama"):
            give_code(save_model("llama", home / kind), home / f"{kind}-ran", kind)
            harvest(
                model=str(home / kind),
                sites=["resid_post.1"],
                out=str(home / f"acts-{kind}"),
                text=str(home / "text"),
                n_tokens=11_000,
                context_length=64,
                store_dtype="float32",
                validation_share=0.35,
                device="cpu",
                trust_remote_code=True,
            )
            meta = ShardSource(str(home / f"acts-{kind}"), input="layers.1:out").pairs[0].identity
            random_sae(meta).save(home / f"run-{kind}" / "sae")
        yield home


COMMANDS = {
    "evaluate": ["evaluate", "RUN", "--effect", "true", "--effect_tokens", "300"],
    "features of shards": ["features", "build", "RUN", "--max_tokens", "300", "--overwrite"],
    "features of texts": ["features", "build", "RUN", "--texts", "TEXT", "--max_tokens", "300", "--overwrite"],
    "concepts": "features concepts RUN --texts LABELLED --probe false --resamples 9 --control RUN".split(),
    "steer": "steer RUN --edit 5=add:3 --prompt the --max_new_tokens 3".split(),
    "inspect": ["data", "inspect", "ACTS", "--decode", "true"],
}


@pytest.mark.parametrize("kind", ["hut", "llama"])
@pytest.mark.parametrize("name", list(COMMANDS))
def test_commands_run_the_code_only_if_allowed(
    home: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"RUN": home / f"run-{kind}", "ACTS": home / f"acts-{kind}"}
    places |= {"TEXT": home / "text", "LABELLED": home / "labelled.jsonl"}
    command = [str(places.get(word, word)) for word in COMMANDS[name]]
    mark = home / f"{kind}-ran"
    mark.unlink(missing_ok=True)
    forget_code()
    assert main(command) == 2
    captured = capsys.readouterr()
    assert REFUSED in captured.err
    assert captured.err.count("\n") == 1
    assert main([*command, "--trust_remote_code", "false"]) == 2
    assert not mark.exists()
    assert main([*command, "--trust_remote_code", "true"]) == 0
    assert mark.exists()


def test_an_evaluation_without_the_model_says_why(home: Path) -> None:
    found = saeforge.evaluate(home / "run-hut", device="cpu")
    assert found.effect is None
    assert REFUSED in str(found.effect_reason)
    with pytest.raises(ConfigError, match="none of it was run"):
        saeforge.evaluate(home / "run-hut", effect=True, device="cpu")
    assert saeforge.evaluate(home / "run-hut", effect_tokens=300, trust_remote_code=True, device="cpu").effect


def test_other_code_is_another_model(home: Path) -> None:
    """Also where transformers has an architecture of that name: it is not taken in the place of the model's own."""
    sae = load(home / "run-llama")
    for origin in (origin_of(sae), origin_of(sae, model=str(home / "llama"))):
        with pytest.raises(ConfigError, match="none of it was run"):
            origin.load_base()
        with pytest.raises(ConfigError, match="none of it was run"):
            origin.load_causal()
    path = home / "llama" / "modeling_hut.py"
    before = path.read_text()
    path.write_text(before + "\n# changed\n")
    try:
        with pytest.raises(ConfigError, match="has changed since this SAE's activations were harvested"):
            origin_of(sae, trust_remote_code=True).load_causal()
    finally:
        path.write_text(before)
