"""`saeforge import PATH`: an SAE of another tool becomes a RUN folder, which every other command takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from saeforge.cli.parsing import PARSER_MODE, OneLineParser, configure_jsonargparse

if TYPE_CHECKING:
    from saeforge.sae import SAE


def make_parser() -> OneLineParser:
    """The parser of `saeforge import`."""
    configure_jsonargparse()
    parser = OneLineParser(
        prog="saeforge import",
        description="Read an SAE that another tool wrote and keep it as a RUN folder, RUN/sae, for evaluate, features, "
        "steer and model.init_from.",
        parser_mode=PARSER_MODE,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of the options below.")
    parser.add_argument("path", type=str, help="Folder or file, or hf://USER/NAME[@REVISION][/FOLDER].")
    parser.add_argument(
        "--from",
        type=str,
        default="auto",
        metavar="FORMAT",
        help="auto, saelens, sparsify, dictionary_learning, gemma_scope, gemma_scope_2, llama_scope, qwen_scope, "
        "openai, circuit-tracer (the file of one layer), or a plugin's.",
    )
    parser.add_argument("--run", type=str | None, default=None, help="RUN folder; default: runs/<name of the folder>.")
    parser.add_argument(
        "--model", type=str | None, default=None, help="Its language model: folder, hub name, package:NAME or demo."
    )
    parser.add_argument(
        "--site", type=str | None, default=None, help="Where it reads that model; default: where its files say."
    )
    parser.add_argument("--target", type=str | None, default=None, help="Where a transcoder writes; default likewise.")
    parser.add_argument(
        "--trust_remote_code",
        type=bool,
        default=False,
        help="Run Python code that comes with the model; read it first.",
    )
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: arguments after `saeforge import`.

    Returns:
        Exit code.
    """
    options = make_parser().parse_args(list(argv))

    from pathlib import Path

    from saeforge import formats
    from saeforge.errors import ConfigError

    run_folder = Path(options.run or Path("runs") / (Path(options.path).stem or "imported"))
    if (run_folder / "sae").exists() or any(run_folder.glob("*/sae")):
        raise ConfigError(f"{run_folder} already holds an SAE; choose another --run")
    sae = formats.read(options.path, options["from"])
    if options.model is not None:
        from saeforge.lm.origin import describe_origin

        said = sae.meta["imported"]
        site = options.site or said.get("hook_name") or said.get("hookpoint") or said.get("submodule_name")
        if site is None:
            raise ConfigError(f"{options.path} does not say where it reads {options.model}; give --site")
        target = options.target or said.get("hook_name_out")
        sae.meta |= describe_origin(
            options.model, site, target, widths=(sae.d_in, sae.d_out), trust_remote_code=options.trust_remote_code
        )
    elif options.site or options.target:
        raise ConfigError("--site and --target are places in a model; give --model too")
    sae.save(run_folder / "sae")
    print(f"{sae} read as {sae.meta['imported']['format']}, written to {run_folder}/sae")
    print(_origin(sae, options.path))
    if note := _processing(sae, options.path):
        print(f"note: {note}")
    return 0


def _origin(sae: SAE, path: str) -> str:
    """What is known of its model, for people."""
    model, site = sae.meta.get("model"), sae.meta.get("site")
    if model and site:
        return f"it reads {model['name']} at {site['id']}"
    said = sae.meta["imported"]
    words = [str(said[key]) for key in ("model_name", "hook_name", "submodule_name", "hookpoint") if said.get(key)]
    return (
        f"note: {path} says {' at '.join(words[:2]) or 'nothing'} about its model; to steer, or to evaluate by "
        "the model's loss, import it with --model and --site"
    )


def _processing(sae: SAE, path: str) -> str | None:
    """How its activations may have been others than those of a HuggingFace model, for people."""
    from saeforge.data.site_names import processing_note

    said = sae.meta["imported"]
    theirs = said["metadata"] if isinstance(said.get("metadata"), dict) else said
    options = theirs.get("model_from_pretrained_kwargs")
    known = isinstance(options, dict)
    note = processing_note(str(theirs.get("hook_name") or ""), options if known else None)
    if note is None:
        return None
    return f"{note}; {path} {'was trained on the others' if known else 'does not say which it was trained on'}"
