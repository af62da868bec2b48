"""Tar shards of aligned blocks: valid tar and webdataset files whose payloads can be read by offset.

Each member is a `.npy` file whose header is padded with spaces until its payload starts at a multiple of 4096 bytes in
the shard, which numpy, webdataset and `tar` all accept, and which direct I/O needs. Times and owners are zero, so that
equal arrays give equal bytes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import struct
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from saeforge.data.checksum import crc32
from saeforge.data.manifest import BlockRecord, ShardRecord, fsync_folder, part_path
from saeforge.errors import SaeforgeError

ALIGNMENT = 4096


def npy_header(array: np.ndarray, length: int) -> bytes:
    """Return a version 1.0 `.npy` header of `array` (C order) that is exactly `length` bytes long."""
    fields = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': {array.shape!r}, }}"
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", length - 10)
    return start + fields.encode().ljust(length - 10 - 1) + b"\n"


def write_shard(path: Path, arrays: Iterable[tuple[str, np.ndarray]]) -> ShardRecord:
    """Write a shard: temporary name, fsync, rename, fsync of the folder.

    Args:
        path: final name; its folder exists.
        arrays: (member name, C-contiguous array) in order; the first axis is rows.

    Returns:
        The record for the manifest.

    Raises:
        SaeforgeError: no space left on the device; the temporary file is removed.
    """
    part = part_path(path)
    digest = hashlib.sha256()
    blocks: list[BlockRecord] = []
    position = 0
    try:
        with part.open("wb") as file:

            def put(data: bytes | memoryview) -> None:
                nonlocal position
                file.write(data)
                digest.update(data)
                position += len(data)

            for name, array in arrays:
                payload = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
                start = position + tarfile.BLOCKSIZE
                header = -start % ALIGNMENT or ALIGNMENT  # a multiple of 512, and never less than the fields need
                member = tarfile.TarInfo(name)
                member.size, member.mode, member.mtime = header + len(payload), 0o644, 0
                put(member.tobuf(format=tarfile.USTAR_FORMAT))
                put(npy_header(array, header))
                blocks.append(BlockRecord(position, len(payload), len(array), crc32(payload)))
                put(payload)
                put(bytes(-position % tarfile.BLOCKSIZE))
            put(bytes(2 * tarfile.BLOCKSIZE))
            put(bytes(-position % tarfile.RECORDSIZE))
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space(path.parent, position) from error
        raise
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)
    return ShardRecord(path.name, position, digest.hexdigest(), tuple(blocks))


def no_space(folder: Path, written: int) -> SaeforgeError:
    """Return the error for a full disk: how much is free, how far the shard in writing was, what to do."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    so_far = f", the shard in writing has {written / 2**20:.1f} MiB so far" if written else ""
    return SaeforgeError(
        f"no space left under {folder}: {shutil.disk_usage(there).free / 2**20:.1f} MiB free{so_far}; free some space "
        "and run the same command again (what is finished is kept), or choose another --out"
    )
