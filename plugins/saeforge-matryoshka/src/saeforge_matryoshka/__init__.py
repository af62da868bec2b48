"""Matryoshka SAEs: nested dictionaries in one, at the cost of one."""

from saeforge_matryoshka.variant import Matryoshka

__all__ = ["Matryoshka"]
