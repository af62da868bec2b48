"""The crc32 of blocks, by the fastest hand there is: isal, which uses the processor's instructions, else zlib.

Both give the same sums; zlib's takes longer than reading the bytes from the page cache.
"""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for this machine
    from zlib import crc32

__all__ = ["crc32"]
