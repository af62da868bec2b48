"""JumpReLU SAEs: a threshold for each latent, learned through pseudo-gradients."""

from saeforge_jumprelu.variant import JumpReLU

__all__ = ["JumpReLU"]
