"""A `Member` whose latents several ranks share out: what each keeps, and what all hold alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saeforge.errors import ConfigError
from saeforge.ops import Group, Shard
from saeforge.variants import OwnEncoder, shard_
from saeforge.variants.sharding import check_shard

if TYPE_CHECKING:
    from saeforge.training.member import Member

#: torch's optimizers that step each entry by itself, so that some rows of a weight step as all of them would.
_BY_ENTRY = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "ASGD", "Rprop")


def check_shared_out(member: Member, ranks: int) -> None:
    """Whether so many ranks can share out its latents.

    Raises:
        ConfigError: they cannot.
    """
    if ranks == 1:
        return
    variant, optimizer = member.variant, member.settings.optimizer
    check_shard(variant, Shard.of(variant.d_sae, Group(ranks)))
    if isinstance(variant, OwnEncoder):
        raise ConfigError(
            f"{type(variant).__name__} encodes by itself, so its parts on several ranks make no SAE; let devices "
            "share the rows instead (trainer.strategy: ddp)"
        )
    if optimizer is not None:
        made = type(optimizer([{"params": [nn.Parameter(torch.zeros(1, 1))]}]))
        if made.__module__.split(".")[0] != "torch" or made.__name__ not in _BY_ENTRY:
            raise ConfigError(
                f"model.optimizer {made.__name__} may look at whole weights, of which each rank has some rows; "
                f"leave it out, use one of {', '.join(_BY_ENTRY)}, or let devices share the rows instead"
            )


def share_out(member: Member, latents: Group, device: torch.device) -> None:
    """Keeps the latents of this rank, on the device that the group exchanges tensors of; before `prepare`.

    Raises:
        ConfigError: see `check_shared_out`.
    """
    check_shared_out(member, latents.size)
    if latents.size > 1:
        shard_(member.variant, Shard.of(member.variant.d_sae, latents))
        member.variant.to(device)
        if member.skip is not None:
            member.skip.to(device)


def cut_names(member: Member) -> frozenset[str]:
    """Names of the parameters and buffers with one entry for each latent that this rank has."""
    names = {f"variant.{name}" for name in member.variant.latent_names}
    if member.average is not None:
        shadowed = enumerate(name for name, _ in member.variant.named_parameters())
        names |= {f"average.shadow_{number}" for number, name in shadowed if name in member.variant.latent_names}
    return frozenset(names)


def cut_parameters(member: Member) -> list[tuple[int, Tensor]]:
    """Those of them that the optimizer steps, with their number in its state."""
    cut = cut_names(member)
    parameters = {id(tensor) for name, tensor in member.named_parameters() if name in cut}
    stepped = enumerate(tensor for group in member.param_groups() for tensor in group["params"])
    return [(number, tensor) for number, tensor in stepped if id(tensor) in parameters]


@torch.no_grad()
def agree(member: Member) -> None:
    """Gives the ranks that share out the latents one state of what they all hold: biases, scales, a skip path.

    They compute the same from the same rows; but a processor of another kind, or a language model that runs on each
    of them, may differ in the last bit, and nothing would bring them together again.
    """
    for tensor in _in_common(member):
        member.variant.latent_group.copy_(tensor)


def agree_on_gradients(member: Member) -> None:
    """The same for gradients that each column of a mesh has averaged by itself, maybe in another order of ranks."""
    if member.variant.shard is None or member.variant.run.group.size == 1:
        return
    for tensor in _in_common(member):
        if tensor.grad is not None:
            member.variant.latent_group.copy_(tensor.grad)


def _in_common(member: Member) -> Iterator[Tensor]:
    """What is not cut, if latents are shared out."""
    if member.variant.shard is not None:
        cut = cut_names(member)
        for name, tensor in (*member.named_parameters(), *member.named_buffers()):
            if name not in cut:
                yield tensor
