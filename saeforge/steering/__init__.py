"""Steering: a language model's text with latents clamped, scaled or added to."""

from saeforge.steering.audit import Audit
from saeforge.steering.context import Steering, steer
from saeforge.steering.edits import Add, Clamp, Edit, Scale, format_edits, parse_edit, parse_edits
from saeforge.steering.scales import LatentScales, read_scales
from saeforge.steering.splice import Splice, attached

__all__ = [
    "Add",
    "Audit",
    "Clamp",
    "Edit",
    "LatentScales",
    "Scale",
    "Splice",
    "Steering",
    "attached",
    "format_edits",
    "parse_edit",
    "parse_edits",
    "read_scales",
    "steer",
]
