"""The SAEs of a RUN that holds several, each loaded as its turn comes: those of all layers need not fit in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

from saeforge.errors import CheckpointError
from saeforge.sae import META_FILE, SAE, load


class Stored(Sequence[SAE]):
    """The SAEs in `RUN/<name>/sae`, or the one of a RUN that holds one; numbers in names count, 2 goes before 10.

    Attributes:
        folders: the RUN folder of each.
    """

    def __init__(self, run: str | Path) -> None:
        """Finds them, loads none.

        Raises:
            CheckpointError: none there.
        """
        run = Path(run)
        found = [path.parents[1] for path in run.glob(f"*/sae/{META_FILE}")]
        single = (run / META_FILE).is_file() or (run / "sae" / META_FILE).is_file()
        self.folders: list[Path] = [run] if single else sorted(found, key=lambda path: _by_numbers(path.name))
        if not self.folders:
            raise CheckpointError(f"no SAE in {run}; expected a RUN folder that holds one or several (RUN/NAME/sae)")

    def __len__(self) -> int:
        return len(self.folders)

    @overload
    def __getitem__(self, index: int) -> SAE: ...
    @overload
    def __getitem__(self, index: slice) -> list[SAE]: ...
    def __getitem__(self, index: int | slice) -> SAE | list[SAE]:
        if isinstance(index, slice):
            return [load(folder) for folder in self.folders[index]]
        return load(self.folders[index])

    def __iter__(self) -> Iterator[SAE]:
        return (load(folder) for folder in self.folders)


def _by_numbers(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
