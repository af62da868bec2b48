"""How every command reads its options: `--config`, interpolation that follows overrides, errors of one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from saeforge.errors import ConfigError

#: `${data.d}` in a file is absolute to that file; both settings together make it follow later overrides [style A1.3].
PARSER_MODE = "omegaconf+"


def configure_jsonargparse() -> None:
    """Process-wide settings that all parsers share."""
    set_parsing_settings(
        docstring_parse_attribute_docstrings=True,
        omegaconf_absolute_to_relative_paths=True,
        instantiate_subclass_spec_in_any=False,  # a class_path inside model.sweep is made where its entry is
    )


def dispatch(group: str, commands: Mapping[str, Callable[[list[str]], int]], usage: str, argv: Sequence[str]) -> int:
    """Runs the command of a group (`saeforge data verify ...`) that the first argument names.

    Args:
        group: the group's name.
        commands: its commands.
        usage: what `--help` prints, and an empty command line.
        argv: arguments after the group's name.

    Returns:
        Exit code.

    Raises:
        ConfigError: no such command.
    """
    arguments = list(argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0 if arguments else 2
    if arguments[0] not in commands:
        close = difflib.get_close_matches(arguments[0], commands, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"commands: {', '.join(commands)}"
        raise ConfigError(f"unknown command `{group} {arguments[0]}`; {hint}")
    return commands[arguments[0]](arguments[1:])


def plain_text(text: str) -> str:
    """Return an argument that stands for this text itself, also where it looks like an interpolation, `${...}`."""
    return re.sub(r"(\\*)\$\{", lambda hit: hit[1] * 2 + "\\${", text)


def fail(parser: ArgumentParser, message: str, cause: Exception | None) -> NoReturn:
    """Raises a parser's complaint as one line with a suggestion, instead of printing a page of usage.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(_one_line(message) + _suggestion(parser, message)) from cause


class OneLineParser(ArgumentParser):
    """A parser whose errors are one line instead of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises ConfigError with the message in one line."""
        fail(self, message, ex)


def _one_line(message: str) -> str:
    text = re.sub(r"\s+", " ", message).strip()
    return text if len(text) <= 400 else text[:397] + "..."


def _suggestion(parser: ArgumentParser, message: str) -> str:
    """The nearest existing key, for a key that does not exist."""
    found = re.search(r"nrecognized arguments: --([\w.]+)|(?:option|nested key|Option|Key) '([\w.]+)'", message)
    if not found:
        return ""
    wrong = next(part for part in found.groups() if part)
    keys = sorted(_keys(parser))
    last = {key.rsplit(".", 1)[-1]: key for key in keys}
    close = difflib.get_close_matches(wrong, keys, n=1) or difflib.get_close_matches(
        wrong.rsplit(".", 1)[-1], last, n=1
    )
    return f"; did you mean {last.get(close[0], close[0])!r}?" if close else ""


def _keys(parser: Any) -> set[str]:
    """All option names of a parser and its subcommands."""
    keys: set[str] = set()
    for action in parser._actions:
        if isinstance(action.choices, dict):
            keys |= set().union(*(_keys(sub) for sub in action.choices.values()))
        elif action.dest not in ("help", "config"):
            keys.add(action.dest)
    return keys
