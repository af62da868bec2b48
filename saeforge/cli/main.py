"""`saeforge COMMAND ...`: picks the command's module and turns expected errors into one line.

Only the standard library is imported here, and a command's module only when that command is asked for, so that
`saeforge --help` answers before torch would have begun to load.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence

from saeforge import __version__
from saeforge.errors import SaeforgeError

COMMANDS: dict[str, tuple[str, str]] = {
    "harvest": ("saeforge.cli.harvest", "run a language model over text and store its activations as a dataset"),
    "data": ("saeforge.cli.data", "inspect or verify a dataset of activations, or import one stored elsewhere"),
    "plan": ("saeforge.cli.plan", "memory, time and traffic of a training run, before it is started"),
    "fit": ("saeforge.cli.fit", "train a sparse autoencoder on a dataset of activations"),
    "evaluate": (
        "saeforge.cli.evaluate",
        "judge an autoencoder on held-out activations and by its model's loss",
    ),
    "features": ("saeforge.cli.features", "read the latents: what fires them, and which concept they are"),
    "report": ("saeforge.cli.report", "write a page about runs: figures, curves, latents, several runs compared"),
    "steer": ("saeforge.cli.steer", "generate text with latents clamped, scaled or added, beside the plain text"),
    "export": ("saeforge.cli.export", "write an autoencoder in the files of another tool"),
    "import": ("saeforge.cli.import_", "read an autoencoder that another tool wrote"),
    "push": ("saeforge.cli.push", "upload an autoencoder, its figures and a model card to the HuggingFace hub"),
    "card": ("saeforge.cli.card", "print the model card of an autoencoder"),
    "bench-synthetic": ("saeforge.cli.bench_synthetic", "judge variants on activations whose features are known"),
    "variants": ("saeforge.cli.variants", "list the kinds of autoencoder: built-in ones and installed plugins"),
    "new-variant": ("saeforge.cli.new_variant", "make a package with a variant of your own, working and tested"),
}
"""name -> (module with `run(argv) -> int`, one line for `saeforge --help`)."""

USAGE_ERROR = 2  # as argparse does
FAILURE = 1
INTERRUPTED = 130  # as a shell reports a process ended by SIGINT
BROKEN_PIPE = 141  # as a shell reports a process ended by SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after `saeforge`; those of this process if None.

    Returns:
        The exit code: 0 done, 1 failed, 2 something that the user can mend, 130 interrupted.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(args)
        # Here, not at exit, where Python would print a traceback if the reader is gone (`saeforge variants | head`).
        sys.stdout.flush()
        return code
    except SaeforgeError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("saeforge: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # What is still buffered goes nowhere, or the flush at exit would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        place = f" while writing {error.filename}" if error.filename else ""
        return _fail(f"no space left on the disk{place}; free some, then run the same command again", FAILURE)
    except Exception as error:
        if not _is_omegaconf_error(error):
            raise
        return _fail(_omegaconf_message(error))


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0 if args else USAGE_ERROR
    if args[0] in ("-V", "--version"):
        print(f"saeforge {__version__}")
        return 0
    if args[0] not in COMMANDS:
        return _fail(_unknown(args[0]))
    code: int = importlib.import_module(COMMANDS[args[0]][0]).run(args[1:])
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: saeforge COMMAND [options]",
            "",
            "Sparse autoencoders for language models: train, judge, read and steer.",
            "",
            "commands:",
            *lines,
            "",
            "options:",
            "  -h, --help     this text; `saeforge COMMAND --help` for a command's options",
            "  -V, --version  the version of saeforge",
        ]
    )


def _unknown(word: str) -> str:
    import difflib

    what = "option" if word.startswith("-") else "command"
    close = difflib.get_close_matches(word, [*COMMANDS, "--help", "--version"], n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"commands: {', '.join(COMMANDS)}"
    return f"unknown {what} {word!r}; {hint} (see `saeforge --help`)"


def _fail(message: str, code: int = USAGE_ERROR) -> int:
    # What was printed so far comes first when both streams end in one file.
    sys.stdout.flush()
    print(f"saeforge: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _is_omegaconf_error(error: Exception) -> bool:
    """Whether OmegaConf raised it, found out by name: importing omegaconf would make every command slower to start."""
    return any(
        base.__name__ == "OmegaConfBaseException" and base.__module__.partition(".")[0] == "omegaconf"
        for base in type(error).__mro__
    )


def _omegaconf_message(error: Exception) -> str:
    """`key: what is wrong`, without the dump of types that OmegaConf adds on further lines."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    key = getattr(error, "full_key", None)
    return f"configuration key {key!r}: {reason}" if key else f"configuration: {reason}"


if __name__ == "__main__":
    sys.exit(main())
