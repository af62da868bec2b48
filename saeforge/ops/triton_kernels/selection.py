"""Selection in Triton: the k largest of each row, and what lies above a threshold. Nothing waits for the host but the
size of a ragged result.

Numbers are compared as integer keys that order like them, NaN above everything and both zeros equal, so that the choice
is exact and ties go to the lowest index, as on the CPU. The k-th largest key is found bit by bit: a bit is set if at
least k keys reach what is then asked for.

`top_k` reads a row twice. In the first pass it keeps the maxima of groups of entries; the k-th largest maximum is at
most the k-th largest entry, since k groups hold one at least as large. In the second it lists what reaches it: k
entries and a few. Another kernel chooses among these, or passes over the whole row again if they are too many (a row
of one value).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Entries of a row in registers at once; at least, and for `above`.
_TILE = 2048
#: The largest k of `top_k`: all candidates are in registers at once.
LARGEST_K = 1 << 14
_BLOCK = 1024


@triton.jit
def _keys(bits, inside, BF16: tl.constexpr):
    """uint32 keys of float bits (int16 or int32); 0, which is below every number's, where not inside."""
    if BF16:
        wide = bits.to(tl.int32)
        order = wide ^ ((wide >> 15) & 0x7FFF)
        key = tl.where((wide & 0x7FFF) > 0x7F80, 0x7FFF, order + ((order >> 15) & 1)) + 0x8000
        found = key.to(tl.uint32)
    else:
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        key = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFFFFFF, order + ((order >> 31) & 1))
        found = key.to(tl.uint32, bitcast=True) ^ 0x80000000
    return tl.where(inside, found, 0).to(tl.uint32)


@triton.jit
def _numbers(bits, BF16: tl.constexpr):
    """fp32 of float bits (int16 or int32)."""
    if BF16:
        bits = bits.to(tl.int32) << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _kth_largest(keys, k, BF16: tl.constexpr):
    """The k-th largest of a block of keys; 0 if there are fewer."""
    bit = tl.full([], 0x8000 if BF16 else 0x80000000, tl.uint32)
    found = tl.full([], 0, tl.uint32)
    for _ in range(16 if BF16 else 32):
        asked = found | bit
        reached = tl.sum((keys >= asked).to(tl.int32), axis=0)
        found = tl.where(reached >= k, asked, found)
        bit = bit >> 1
    return found


@triton.jit(do_not_specialize=["k", "room"])
def _candidates(pre, places, counts, n, k, room, TILE: tl.constexpr, BF16: tl.constexpr):
    """Lists the places of a row's entries that may be among its k largest, ascending; counts all, stores `room`."""
    row = tl.program_id(0).to(tl.int64)
    pre += row * n
    lanes = tl.arange(0, TILE)
    maxima = tl.zeros([TILE], tl.uint32)
    for first in range(0, n, TILE):
        inside = first + lanes < n
        maxima = tl.maximum(maxima, _keys(tl.load(pre + first + lanes, mask=inside, other=0), inside, BF16))
    floor = _kth_largest(maxima, k, BF16)
    count = tl.full([], 0, tl.int32)
    for first in range(0, n, TILE):
        inside = first + lanes < n
        keys = _keys(tl.load(pre + first + lanes, mask=inside, other=0), inside, BF16)
        found = (inside & (keys >= floor)).to(tl.int32)
        here = tl.sum(found, axis=0)
        if here > 0:
            at = count + tl.cumsum(found, axis=0) - 1
            tl.store(places + row * room + at, first + lanes, mask=(found > 0) & (at < room))
            count += here
    tl.store(counts + row, count)


@triton.jit
def _take_k(pre, places, keys, inside, more, same, values, indices, k, floor, need, BF16: tl.constexpr):
    """Writes a block's entries above the floor, and of those at it the first `need`. `more`, `same`: how many of either
    came in blocks before. Returns them with this block's."""
    larger, equal = (keys > floor).to(tl.int32), (inside & (keys == floor)).to(tl.int32)
    rank = same + tl.cumsum(equal, axis=0)
    # Of the places before this one in the result, the larger and the equal ones that were kept.
    at = more + tl.cumsum(larger, axis=0) + tl.minimum(rank, need) - 1
    kept = (larger > 0) | ((equal > 0) & (rank <= need))
    kept &= at < k
    number = _numbers(tl.load(pre + places, mask=kept, other=0), BF16)
    tl.store(values + at, number, mask=kept)
    tl.store(indices + at, places.to(tl.int64), mask=kept)
    return more + tl.sum(larger, axis=0), same + tl.sum(equal, axis=0)


@triton.jit(do_not_specialize=["k", "room"])
def _choose(
    pre, places, counts, values, indices, n, k, room, ROOM: tl.constexpr, LISTED: tl.constexpr, BF16: tl.constexpr
):
    """The k largest among a row's candidates; or among all of the row, if it has no list or one longer than `room`."""
    row = tl.program_id(0).to(tl.int64)
    pre += row * n
    values += row * k
    indices += row * k
    lanes = tl.arange(0, ROOM)
    count = n
    if LISTED:
        count = tl.load(counts + row)
    if count <= room:
        inside = lanes < count
        if LISTED:
            place = tl.load(places + row * room + lanes, mask=inside, other=0)
        else:
            place = lanes
        keys = _keys(tl.load(pre + place, mask=inside, other=0), inside, BF16)
        floor = _kth_largest(keys, k, BF16)
        need = k - tl.sum((keys > floor).to(tl.int32), axis=0)
        _take_k(pre, place, keys, inside, 0, 0, values, indices, k, floor, need, BF16)
    else:
        bit = tl.full([], 0x8000 if BF16 else 0x80000000, tl.uint32)
        floor = tl.full([], 0, tl.uint32)
        for _ in range(16 if BF16 else 32):
            asked = floor | bit
            reached = tl.full([], 0, tl.int32)
            for first in range(0, n, ROOM):
                inside = first + lanes < n
                keys = _keys(tl.load(pre + first + lanes, mask=inside, other=0), inside, BF16)
                reached += tl.sum((keys >= asked).to(tl.int32), axis=0)
            floor = tl.where(reached >= k, asked, floor)
            bit = bit >> 1
        above = tl.full([], 0, tl.int32)
        for first in range(0, n, ROOM):
            inside = first + lanes < n
            keys = _keys(tl.load(pre + first + lanes, mask=inside, other=0), inside, BF16)
            above += tl.sum((keys > floor).to(tl.int32), axis=0)
        more = tl.full([], 0, tl.int32)
        same = tl.full([], 0, tl.int32)
        for first in range(0, n, ROOM):
            inside = first + lanes < n
            keys = _keys(tl.load(pre + first + lanes, mask=inside, other=0), inside, BF16)
            more, same = _take_k(
                pre, first + lanes, keys, inside, more, same, values, indices, k, floor, k - above, BF16
            )


@triton.jit
def _exceeds(pre, threshold, place, inside, STRIDE: tl.constexpr):
    number = tl.load(pre + place, mask=inside, other=0.0).to(tl.float32)
    bound = tl.load(threshold + place * STRIDE, mask=inside, other=0.0)
    return number, inside & ((number <= bound) == 0)  # so written that NaN exceeds


@triton.jit
def _count_above(pre, threshold, counts, n, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n, BLOCK):
        _, exceeds = _exceeds(pre + row * n, threshold, first + lanes, first + lanes < n, STRIDE)
        found += exceeds.to(tl.int32)
    tl.store(counts + row, tl.sum(found, axis=0).to(tl.int64))


@triton.jit
def _take_above(pre, threshold, offsets, values, indices, n, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    to = tl.load(offsets + row)
    for first in range(0, n, BLOCK):
        number, exceeds = _exceeds(pre + row * n, threshold, first + lanes, first + lanes < n, STRIDE)
        found = exceeds.to(tl.int32)
        here = tl.sum(found, axis=0)
        if here > 0:
            at = to + tl.cumsum(found, axis=0) - 1
            tl.store(values + at, number, mask=exceeds)
            tl.store(indices + at, (first + lanes).to(tl.int64), mask=exceeds)
            to += here


def _bits(pre: Tensor, name: str) -> tuple[Tensor, bool]:
    if pre.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{name}: expected float32 or bfloat16, got {pre.dtype}")
    is_bf16 = pre.dtype == torch.bfloat16
    return pre.detach().contiguous().view(torch.int16 if is_bf16 else torch.int32), is_bf16


def _warps(width: int) -> int:
    return max(1, min(32, width // 256))


def top_k(pre: Tensor, k: int, *, tile: int = _TILE) -> tuple[Tensor, Tensor]:
    """values (B, k) fp32, indices (B, k) ascending: the k largest of each row of (B, n), ties to the lowest index.

    Args:
        pre: (B, n) fp32 or bfloat16.
        k: at most n and `LARGEST_K`.
        tile: least number of entries of a row that are in registers at once, a power of two.
    """
    bits, is_bf16 = _bits(pre, "top_k")
    n_rows, n = pre.shape
    values = torch.empty(n_rows, k, device=pre.device)
    indices = torch.empty(n_rows, k, dtype=torch.int64, device=pre.device)
    if not n_rows:
        return values, indices
    # Twice as many groups as k: fewer would leave too low a floor, and too many candidates.
    tile = max(tile, 2 * triton.next_power_of_2(k))
    listed = n > tile
    room = min(tile, max(256, 2 * triton.next_power_of_2(k))) if listed else triton.next_power_of_2(n)
    places = torch.empty(n_rows if listed else 0, room, dtype=torch.int32, device=pre.device)
    counts = torch.empty(n_rows if listed else 0, dtype=torch.int32, device=pre.device)
    with torch.cuda.device_of(pre):
        if listed:
            _candidates[(n_rows,)](bits, places, counts, n, k, room, tile, is_bf16, num_warps=_warps(tile))
        _choose[(n_rows,)](
            bits, places, counts, values, indices, n, k, room, room, listed, is_bf16, num_warps=_warps(room)
        )
    return values, indices


def above(pre: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """values (nnz,) fp32, indices (nnz,), counts (B,) of the entries above the threshold; NaN is.

    Reads one number on the host, nnz.

    Args:
        pre: (B, n) fp32 or bfloat16.
        threshold: (1,) or (n,) fp32.
    """
    _bits(pre, "above")
    pre, threshold = pre.detach().contiguous(), threshold.detach().float().contiguous()
    n_rows, n = pre.shape
    stride = int(threshold.numel() > 1)
    counts = torch.empty(n_rows, dtype=torch.int64, device=pre.device)
    offsets = torch.zeros(n_rows + 1, dtype=torch.int64, device=pre.device)
    with torch.cuda.device_of(pre):
        if n_rows:
            _count_above[(n_rows,)](pre, threshold, counts, n, _BLOCK, stride, num_warps=4)
        torch.cumsum(counts, 0, out=offsets[1:])
        nnz = int(offsets[-1])
        values = torch.empty(nnz, device=pre.device)
        indices = torch.empty(nnz, dtype=torch.int64, device=pre.device)
        if nnz:
            _take_above[(n_rows,)](pre, threshold, offsets, values, indices, n, _BLOCK, stride, num_warps=4)
    return values, indices, counts
