"""Load a HuggingFace model as deep as its sites need, and its tokenizer, with one-line errors."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from saeforge.demo import model_path
from saeforge.errors import ConfigError
from saeforge.lm.sites import Site, find_layers, last_layer_needed, resolve_sites

MODEL_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DeviceMap = str | dict[str, int | str] | None


@dataclass
class LoadedModel:
    """A base model in evaluation mode, cut after the deepest site.

    Attributes:
        model: the module, on its device, without gradients.
        sites: resolved sites, in the order asked for.
        context_limit: longest sequence that the model allows, or None.
        card: what a manifest says of the model.
    """

    model: nn.Module
    sites: list[Site]
    context_limit: int | None
    card: dict[str, Any]


def resolve_model(name: str) -> str:
    """Return the folder or hub name behind a model name.

    `demo` is the small model that ships with saeforge.
    `package:NAME` is the folder inside the installed Python package NAME that holds a `config.json`.

    Raises:
        ConfigError: no such folder or package, or the folder is not a HuggingFace model.
    """
    if name == "demo":
        if not (model_path() / "config.json").is_file():
            raise ConfigError(
                f"model 'demo': {model_path()} is missing; reinstall saeforge, or make it with scripts/train_demo_lm.py"
            )
        return str(model_path())
    if name.startswith("package:"):
        package = name.removeprefix("package:")
        try:
            spec = importlib.util.find_spec(package)
        except (ModuleNotFoundError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"model {name!r}: no Python package {package!r} is installed here; pip install it")
        root = Path(next(iter(spec.submodule_search_locations)))
        folders = sorted({path.parent for path in root.rglob("config.json")}, key=lambda path: (len(path.parts), path))
        models = [folder for folder in folders if _model_type(folder) is not None]
        if not models:
            raise ConfigError(f"model {name!r}: the package holds no folder with a HuggingFace config.json")
        return str(models[0])
    path = Path(name).expanduser()
    if path.is_dir():
        if _model_type(path) is None:
            raise ConfigError(
                f"model {name!r}: the folder has no config.json of a HuggingFace model (with a model_type)"
            )
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ConfigError(f"model {name!r}: no such folder; give a model's folder, a hub name, package:NAME, or demo")
    return name


def load_tokenizer(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model.

    Args:
        name: folder, hub name, `package:NAME` or `demo`.
        revision: hub revision.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        ConfigError: there is none, or it needs its own code and may not run it.
    """
    folder = resolve_model(name)
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise load_error(name, "its tokenizer cannot be loaded", error) from error


def load_model(
    name: str,
    sites: Sequence[str],
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    device_map: DeviceMap = None,
) -> LoadedModel:
    """Load the base model (no head), only as many layers as the sites need.

    The architecture is built without weights first, so that a wrong site is told before anything large is read.

    Args:
        name: folder, hub name or `package:NAME`.
        sites: site names (see `saeforge.lm.sites`).
        revision: hub revision.
        dtype: "auto" (the checkpoint's), "float32" or "bfloat16".
        device: torch device, unless there is a device map.
        trust_remote_code: run Python code that comes with the model; without it, code of one's own is refused, not run.
        device_map: how accelerate spreads the layers over devices: "auto", "balanced", or a device per module; weights
            for which no device has room stay in memory or on disk ("cpu", "disk") until they are used.

    Raises:
        ConfigError: no such model or site, an encoder-decoder, weights that the sites need are missing, the model needs
            its own code and may not run it, or a device map without accelerate.
    """
    folder = resolve_model(name)
    check_device_map(device_map)
    with quiet():
        config = read_config(name, folder, revision, trust_remote_code)
        if config.is_encoder_decoder:
            raise ConfigError(
                f"model {name!r} is an encoder-decoder ({config.model_type}); give a causal LM or an encoder"
            )
        text_config = config.get_text_config()
        total = getattr(text_config, "num_hidden_layers", None)
        try:
            with torch.device("meta"):
                skeleton = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
        except (ValueError, ImportError) as error:
            raise load_error(name, "no base model for this architecture", error) from error
        layers = find_layers(skeleton, total) if total else None
        resolved = resolve_sites(
            skeleton,
            sites,
            layers=layers,
            n_layers=total or 0,
            prefix=skeleton.base_model_prefix,
            model_type=config.model_type,
        )
        deepest = last_layer_needed(skeleton, resolved, layers)
        loaded = total if deepest is None else deepest + 1
        if loaded != total:
            text_config.num_hidden_layers = loaded
            for key in ("layer_types", "mlp_layer_types"):  # one entry per layer, checked against their number
                if isinstance(getattr(text_config, key, None), list):
                    setattr(text_config, key, getattr(text_config, key)[:loaded])
        config.use_cache = text_config.use_cache = False
        try:
            model, report = AutoModel.from_pretrained(
                folder,
                revision=revision,
                config=config,
                dtype="auto" if dtype == "auto" else MODEL_DTYPES[dtype],
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # a head may be as wide as there are layers (ESM's contacts)
                trust_remote_code=trust_remote_code,
                device_map=device_map,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise load_error(name, "its weights cannot be loaded", error) from error
    for fault, keys in (
        ("lacks weights", report["missing_keys"]),
        ("has other sizes of weights", [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]),
    ):
        needed = _needed(model, resolved, keys)
        if needed:
            raise ConfigError(f"model {name!r}: its checkpoint {fault} that the sites need, for example {needed[0]}")
    model.eval().requires_grad_(False)
    if device_map is None:
        model.to(device)
    card = {**find_card(name, folder, model, config, revision), "layers": total, "layers_loaded": loaded}
    if device_map is not None:
        card["device_map"] = device_map
    return LoadedModel(model, resolved, getattr(text_config, "max_position_embeddings", None), card)


def wrap_module(model: nn.Module, sites: Sequence[str]) -> LoadedModel:
    """Take a module as it is, set to evaluation, without gradients asked of it by a capture.

    Args:
        model: any module. One of transformers has its layers' aliases (resid_post.6); others need module paths.
        sites: site names.

    Raises:
        ConfigError: no such site.
    """
    config: Any = getattr(model, "config", None)
    total = getattr(config.get_text_config(), "num_hidden_layers", None) if hasattr(config, "get_text_config") else None
    layers = find_layers(model, total) if total else None
    model_type = getattr(config, "model_type", "")
    resolved = resolve_sites(model, sites, layers=layers, n_layers=total or 0, model_type=model_type)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    card = {
        "name": getattr(model, "name_or_path", "") or type(model).__name__,
        "revision": getattr(config, "_commit_hash", None),
        "files_sha256": None,
        "weights_sha256": digest.hexdigest(),
        "class": type(model).__name__,
        "model_type": model_type or None,
        "dtype": str(next((p.dtype for p in model.parameters()), torch.float32)).removeprefix("torch."),
        "attention": getattr(config, "_attn_implementation", None),
        "layers": total,
        "layers_loaded": total,
    }
    return LoadedModel(model.eval(), resolved, None, card)


def check_device_map(device_map: DeviceMap) -> None:
    """Raise ConfigError if there is a device map and no accelerate to follow it."""
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise ConfigError(f"device_map {device_map!r} needs the package accelerate; pip install accelerate")


def load_error(name: str, what: str, error: BaseException) -> ConfigError:
    """Return the one line for a model that transformers cannot load; code that may not run is said to be the reason."""
    if "trust_remote_code" in str(error):
        return own_code_error(name)
    return ConfigError(f"model {name!r}: {what}: {first_line(error)}")


def own_code_error(name: str) -> ConfigError:
    """Return the one line for a model that needs its own code and may not run it."""
    return ConfigError(
        f"model {name!r} brings its own Python code, and none of it was run; read it, and if you trust it give "
        "trust_remote_code: true (--trust_remote_code true)"
    )


def read_config(name: str, folder: str, revision: str | None, trust_remote_code: bool = False) -> Any:
    """Return the configuration of a model, from its folder or the hub.

    Raises:
        ConfigError: there is none, none that this transformers knows, or one that needs code that may not run.
    """
    try:
        return AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise load_error(name, "cannot be loaded", error) from error


def find_card(name: str, folder: str, model: Any, config: Any, revision: str | None) -> dict[str, Any]:
    """Return what identifies a loaded model; `remote_code` stands in it if code that came with the model runs."""
    # transformers imports such code under one name, from wherever it came.
    own_code = any(type(part).__module__.startswith("transformers_modules.") for part in (model, config))
    return {
        "name": name,
        "revision": getattr(config, "_commit_hash", None) or revision,
        "files_sha256": _hash_files(Path(folder), own_code=own_code) if Path(folder).is_dir() else None,
        "class": type(model).__name__,
        "model_type": config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": getattr(config, "_attn_implementation", None),
        **({"remote_code": True} if own_code else {}),
    }


def tokenizer_card(tokenizer: Any) -> dict[str, Any]:
    """Return what identifies a tokenizer: class, size, and a hash of what it does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return {
        "class": type(tokenizer).__name__,
        "vocabulary": len(tokenizer),
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
    }


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, for a one-line error."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _needed(model: nn.Module, sites: Sequence[Site], keys: Sequence[str]) -> list[str]:
    """Return those of the weights that run before the end of the last site (a pooler after it does not matter)."""
    names = list(dict(model.named_modules()))
    last = max(
        number
        for number, name in enumerate(names)
        if any(name == site.module_path or name.startswith(f"{site.module_path}.") for site in sites)
    )
    before = set(names[: last + 1])
    return [key for key in keys if key.rpartition(".")[0] in before]


def _model_type(folder: Path) -> str | None:
    """Return the model_type of a folder's config.json, or None if it is no HuggingFace model."""
    try:
        data = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    found = data.get("model_type") if isinstance(data, dict) else None
    return found if isinstance(found, str) else None


def _hash_files(folder: Path, *, own_code: bool) -> str:
    """Return one sha256 over config, weights and, if it runs, code of a folder, so that a changed model is noticed."""
    digest = hashlib.sha256()
    files = [folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    if own_code:
        files += folder.glob("*.py")
    for path in sorted(files):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' load reports and bars: a truncated load leaves weights unused on purpose."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def versions() -> dict[str, str]:
    """Return the versions that a manifest records."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}
