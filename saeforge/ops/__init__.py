"""Tensor functions on sparse codes: select, decode, and the sparse backward, for every variant.

Public contract of plugins: `SparseCode`, `encode`, `decode`, `pick`, `TopK`, `Above`, `Selection`, `Group`.
"""

from saeforge.ops.code import SparseCode
from saeforge.ops.engine import decode, encode, pick
from saeforge.ops.group import Group
from saeforge.ops.select import Above, Selection, TopK

__all__ = ["Above", "Group", "Selection", "SparseCode", "TopK", "decode", "encode", "pick"]
