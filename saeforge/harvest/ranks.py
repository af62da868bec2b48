"""Which of several processes this one is, as torchrun or SLURM tell it. None of them talks to another."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from saeforge.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """A process among others.

    Attributes:
        number: its number, from 0.
        world: how many there are.
        local: its number on its host.
        local_world: how many there are on its host.
    """

    number: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Rank:
        """Read torchrun's variables, else SLURM's, else those of Lightning's launcher; alone it is rank 0 of 1.

        Lightning starts the further ranks of a host itself and names their number on it, and how many there are.

        Raises:
            ConfigError: one of them is not a number, or the rank is not below the number of ranks.
        """
        if "RANK" in environment:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        elif "SLURM_PROCID" in environment:
            names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_TASKS_PER_NODE")
        elif "LOCAL_RANK" in environment and "WORLD_SIZE" in environment:
            names = ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_RANK", "WORLD_SIZE")
        else:
            return cls()
        values = []
        for name, default in zip(names, ("0", "1", "0", "1"), strict=True):
            text = environment.get(name, default).partition("(")[0].partition(",")[0]  # SLURM writes 4(x2),1
            if not text.isdecimal():
                raise ConfigError(f"environment variable {name} = {environment[name]!r}: expected a number")
            values.append(int(text))
        rank = cls(*values)
        if rank.number >= rank.world:
            raise ConfigError(f"{names[0]} = {rank.number} and {names[1]} = {rank.world}: expected a rank below that")
        return rank

    def device(self, asked: str, found: str, count: int) -> str:
        """Return the device of this process.

        Args:
            asked: the option; only "auto" is spread over devices.
            found: what it means on this machine.
            count: CUDA devices that this process sees.
        """
        return f"cuda:{self.local % count}" if asked == "auto" and found == "cuda" and self.world > 1 else found

    def own_first(self, items: Sequence[T]) -> list[T]:
        """Return the items, every world-th from its own number on first."""
        mine = items[self.number :: self.world]
        return [*mine, *(item for at, item in enumerate(items) if at % self.world != self.number)]
