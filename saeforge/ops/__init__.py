"""Tensor functions on sparse codes: select, decode, and the sparse backward, for every variant.

Public contract of plugins: `SparseCode`, `encode`, `decode`, `pick`, `residual`, `row_norms`, `encode_beside`,
`decode_beside`, `stop_gradient`, `pseudo_gradient`, `TopK`, `BatchTopK`, `Above`, `Selection`, `Group`, `Shard`,
`latents_over`.
"""

from saeforge.ops.code import SparseCode
from saeforge.ops.engine import decode, decode_beside, encode, encode_beside, pick, row_norms
from saeforge.ops.group import Group
from saeforge.ops.marks import pseudo_gradient, stop_gradient
from saeforge.ops.residual import residual
from saeforge.ops.select import Above, BatchTopK, Selection, TopK
from saeforge.ops.shards import Shard, latents_over

__all__ = [
    "Above",
    "BatchTopK",
    "Group",
    "Selection",
    "Shard",
    "SparseCode",
    "TopK",
    "decode",
    "decode_beside",
    "encode",
    "encode_beside",
    "latents_over",
    "pick",
    "pseudo_gradient",
    "residual",
    "row_norms",
    "stop_gradient",
]
