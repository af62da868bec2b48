"""docs/writing-a-variant.md is true: its path is walked in a clean environment, and its variants do what it says."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
import torch

import saeforge
from saeforge.cli.new_variant import new_variant
from saeforge.data.shard_source import ShardSource
from saeforge.errors import CheckpointError, ConfigError
from saeforge.registry import VARIANTS
from saeforge.testing import QUICK, conformance
from saeforge.variants import Variant
from tests.readme import ROOT
from tests.toy import D_IN, toy_dataset, toy_rows

PAGE = (ROOT / "docs" / "writing-a-variant.md").read_text()
EXAMPLES = {"pursuit": "Pursuit", "signed": "Signed", "temporal": "Temporal"}
SMALL_FIT = ["--data.batch_size=256", "--data.tokens=20480", "--model.variant.d_sae=128", "--model.variant.k=4"]
SMALL_FIT += ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    joined = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [shlex.split(line) for line in joined.splitlines() if line]


def source_of(name: str) -> str:
    """The block of Python that holds the class of an example."""
    (block,) = [block for block in blocks("python") if f"class {EXAMPLES[name]}(Variant)" in block]
    return block


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, type[Variant]]:
    """The classes of the page's examples, importable as modules."""
    monkeypatch.syspath_prepend(str(tmp_path))
    classes = {}
    for name, title in EXAMPLES.items():
        (tmp_path / f"page_{name}.py").write_text(source_of(name))
        monkeypatch.delitem(sys.modules, f"page_{name}", raising=False)
        classes[name] = getattr(importlib.import_module(f"page_{name}"), title)
    return classes


# What the page shows -----------------------------------------------------------------------------------------------


def test_the_page_shows_what_the_command_makes(tmp_path: Path) -> None:
    folder = new_variant("my-topk", into=tmp_path)
    assert (folder / "src/saeforge_my_topk/variant.py").read_text() in blocks("python")
    assert (folder / "tests/test_my_topk.py").read_text() in blocks("python")
    listed = re.findall(r"^  (\S+) ", blocks("text")[0], flags=re.MULTILINE)
    made = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(listed) == {path for path in made if not path.endswith("__init__.py")}


def test_every_link_of_the_page_leads_somewhere() -> None:
    headings = {"#" + re.sub(r"[^\w ]", "", line).strip().lower().replace(" ", "-") for line in PAGE.splitlines()}
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert target in headings if target.startswith("#") else (ROOT / "docs" / target).exists(), target


# The examples ------------------------------------------------------------------------------------------------------


def train(x: torch.Tensor, variant: str | type[Variant], **options: Any) -> saeforge.SAE:
    # Not seed 0, whose random directions are those that toy_rows is made of.
    settings = {"d_sae": 96, "k": 4, "tokens": 150_000, "batch_size": 256, "lr": 1e-2, "seed": 1, "progress": False}
    return saeforge.train(x, variant=variant, **{**settings, **options})


def fvu(sae: saeforge.SAE, x: torch.Tensor) -> float:
    return float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_pass_the_conformance_kit(name: str, examples: dict[str, type[Variant]]) -> None:
    report = conformance(examples[name], checks=QUICK)
    assert report.ok, str(report)


def test_pursuit_needs_its_package_and_pays_for_its_rounds(examples: dict[str, type[Variant]], tmp_path: Path) -> None:
    x = toy_rows(8192)
    with VARIANTS.register("pursuit", examples["pursuit"]):
        sae = train(x, "pursuit")
        sae.save(tmp_path / "pursuit")
        assert torch.equal(saeforge.load(tmp_path / "pursuit")(x), sae(x))
    with pytest.raises(CheckpointError, match=r"does not fold into plain weights: variant 'pursuit' of the module of"):
        saeforge.load(tmp_path / "pursuit")
    code = sae.encode(x)
    assert int(code.l0().max()) <= 4
    assert all((part.diff() > 0).all() for part in code.indices.split(code.offsets.diff().tolist()))
    assert fvu(sae, x) < 0.6 * fvu(train(x, "topk"), x)
    with pytest.raises(ConfigError, match="pursuit reconstructs its input"):
        train(x, examples["pursuit"], target=x.clone())


def test_signed_latents_are_active_wherever_they_are_not_0(examples: dict[str, type[Variant]], tmp_path: Path) -> None:
    x = toy_rows(8192)
    with VARIANTS.register("signed", examples["signed"]):
        sae = train(x, "signed")
        sae.save(tmp_path / "signed")
        assert torch.equal(saeforge.load(tmp_path / "signed")(x), sae(x))
    code = sae.encode(x)
    assert (code.values < 0).any()
    assert (code.values > 0).any()
    assert code.l0().tolist() == [4] * len(x)
    assert fvu(sae, x) < 0.25


def test_slow_latents_change_less_and_find_what_stays(examples: dict[str, type[Variant]]) -> None:
    """On rows where the strengths along half of the directions are the same for both tokens of a pair."""
    generator = torch.Generator().manual_seed(42)
    directions = torch.nn.functional.normalize(torch.randn(64, D_IN, generator=generator), dim=1)
    strengths = torch.rand(16384, 64, generator=generator) * (torch.rand(16384, 64, generator=generator) < 0.05)
    strengths[1::2, :32] = strengths[::2, :32]
    x = strengths @ directions
    moved, found = [], []
    for change in (0.0, 0.3):
        sae = train(x, examples["temporal"], d_sae=64, slow=0.5, change=change, group_rows=2)
        assert sae.rule == "topk"
        slow = (sae.encode(x).to_dense()[:, :32] @ sae.W_dec[:32]).view(-1, 2, D_IN)
        moved.append(float((slow[:, 0] - slow[:, 1]).square().sum() / slow.square().sum()))
        found.append(float(((sae.W_dec[:32] @ directions.T).argmax(1) < 32).float().mean()))
    assert moved[1] < 0.7 * moved[0]
    assert found[1] > found[0]
    with pytest.raises(ConfigError, match="harvest with --group_rows 2"):
        train(x, examples["temporal"])


# The path ----------------------------------------------------------------------------------------------------------


class CleanEnvironment:
    """A virtual environment of its own over the packages of this one, so that pip installs nothing here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "env", with_pip=False, symlinks=True)
        paths = {"base": str(folder / "env"), "platbase": str(folder / "env")}
        site = Path(sysconfig.get_path("purelib", "venv", paths))
        below = sysconfig.get_path("purelib")
        (site / "below.pth").write_text(f"import site; site.addsitedir({below!r})\n")
        self.python = str(folder / "env" / "bin" / "python")

    def run(self, words: list[str], *more: str) -> subprocess.CompletedProcess[str]:
        """A command of the page, in the folder."""
        modules = {"saeforge": "saeforge.cli.main", "pip": "pip", "pytest": "pytest"}
        command = [self.python, "-m", modules[words[0]], *words[1:], *more]
        if words[0] == "pip":
            command += ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
        if words[0] == "pytest":
            command += [
                "-q",
                "-p",
                "no:cacheprovider",
                "-c",
                os.devnull,
                "--rootdir",
                words[1],
                "-W",
                "error::UserWarning",
            ]
        return run(command, self.folder)

    def works(self, words: list[str], *more: str) -> str:
        """What a command prints that must work."""
        done = self.run(words, *more)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def load_here(run_folder: Path) -> subprocess.CompletedProcess[str]:
    """`saeforge.load` in this environment, which has none of the page's packages."""
    script = (
        "import sys, torch, saeforge\ntry:\n    sae = saeforge.load(sys.argv[1])\n"
        "except saeforge.SaeforgeError as error:\n    sys.exit(f'saeforge: error: {error}')\n"
        "print(sae.rule, sae.encode(torch.randn(3, 32)).n_rows, sae.meta['variant']['distribution'])\n"
        "assert 'lightning' not in sys.modules and not any(name.startswith('saeforge_my') for name in sys.modules)"
    )
    return run([sys.executable, "-c", script, str(run_folder)], run_folder.parent)


@pytest.mark.timeout(600)
def test_from_nothing_to_an_sae_that_loads_where_its_package_is_not_installed(tmp_path: Path) -> None:
    clean = CleanEnvironment(tmp_path)
    new, install, own_tests, check = commands()[:4]
    assert [words[0] for words in (new, install, own_tests, check)] == ["saeforge", "pip", "pytest", "saeforge"]
    clean.works(new)
    clean.works(install)
    assert "my_topk" in clean.works(check)
    assert "passed" in clean.works(own_tests)

    toy_dataset(tmp_path / "data" / "my-activations")
    (tmp_path / "my_topk.yaml").write_text(blocks("yaml")[0])
    fit = commands()[4]
    assert fit[:2] == ["saeforge", "fit"]
    clean.works(fit, *SMALL_FIT)
    loaded = load_here(tmp_path / "runs" / "my_topk")
    assert loaded.stdout.split() == ["topk", "3", "saeforge-my-topk"], loaded.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_rest_of_the_path_and_a_package_whose_variant_cannot_fold(tmp_path: Path) -> None:
    clean = CleanEnvironment(tmp_path)
    toy_dataset(tmp_path / "data" / "my-activations")
    for name in EXAMPLES:
        clean.works(["saeforge", "new-variant", name])
        (tmp_path / f"saeforge-{name}" / "src" / f"saeforge_{name}" / "variant.py").write_text(source_of(name))
        clean.works(["pip", "install", "-e", f"saeforge-{name}"])
        if name != "temporal":  # whose rows must come in pairs
            assert "passed" in clean.works(["pytest", f"saeforge-{name}"])
    clean.works(["saeforge", "new-variant", "shrinks", "--kind", "penalty"])
    clean.works(["pip", "install", "-e", "saeforge-shrinks"])
    assert "passed" in clean.works(["pytest", "saeforge-shrinks"])
    assert "broken" not in clean.works(["saeforge", "variants", "--check"])

    fit = ["saeforge", "fit", "--data.path", "data/my-activations", "--run", "runs/pursuit"]
    clean.works([*fit, "--model.variant", "pursuit"], *SMALL_FIT)
    refused = load_here(tmp_path / "runs" / "pursuit")
    assert refused.returncode == 1
    shown = blocks("text")[-1].strip()
    assert refused.stderr.strip() == shown.replace("runs/pursuit", f"{tmp_path}/runs/pursuit")

    harvest, grouped = commands()[-2:]
    assert "--group_rows" in harvest
    clean.works(harvest)
    assert ShardSource(str(tmp_path / "acts")).unit == 2
    clean.works(grouped, *SMALL_FIT)
    assert saeforge.load(tmp_path / "runs" / "temporal").rule == "topk"
    refused = clean.run([*fit[:-1], "runs/none", "--model.variant", "temporal"], *SMALL_FIT)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith(
        "saeforge: error: temporal needs neighbouring tokens side by side"
    )

    clean.works(["saeforge", "new-variant", "my-topk"])
    clean.works(["pip", "install", "-e", "saeforge-my-topk"])
    (tmp_path / "my_topk.yaml").write_text(blocks("yaml")[0])
    second, options = commands()[5:7]
    clean.works(second, *SMALL_FIT[:-4], *SMALL_FIT[-3:])
    assert saeforge.load(tmp_path / "runs" / "my_topk-32").k == 32
    assert "active latents per token" in clean.works(options)
    (load,) = [block for block in blocks("python") if "saeforge.load" in block and "class " not in block]
    (tmp_path / "runs" / "my_topk").symlink_to("my_topk-32")
    printed = run([sys.executable, "-c", load], tmp_path)
    assert "saeforge-my-topk" in printed.stdout, printed.stderr


@pytest.mark.slow
def test_a_package_builds(tmp_path: Path) -> None:
    new_variant("my-topk", into=tmp_path)
    build = next(words for words in commands() if words[:3] == ["python", "-m", "build"])
    done = run([sys.executable, *build[1:], "--no-isolation"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    made = sorted(path.name for path in (tmp_path / "saeforge-my-topk" / "dist").iterdir())
    assert made == ["saeforge_my_topk-0.1.0-py3-none-any.whl", "saeforge_my_topk-0.1.0.tar.gz"]
