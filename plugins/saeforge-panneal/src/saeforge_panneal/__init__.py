"""P-annealing: an L_p penalty whose p falls from 1 while its strength stays."""

from saeforge_panneal.variant import PAnneal

__all__ = ["PAnneal"]
