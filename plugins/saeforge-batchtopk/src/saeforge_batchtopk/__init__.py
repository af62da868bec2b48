"""BatchTopK: k active latents a token on average, shared out over the batch."""

from saeforge_batchtopk.variant import BatchTopKSAE

__all__ = ["BatchTopKSAE"]
