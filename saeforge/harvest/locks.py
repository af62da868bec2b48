"""Locks on files, which the kernel lets go of when their process dies: no time-outs, nothing to clean up."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from saeforge.errors import SaeforgeError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


def take(path: Path, *, shared: bool = False, wait: bool = False) -> int | None:
    """Lock a file, made if missing, in an existing folder; closing the descriptor lets go.

    Args:
        path: the file. It may be removed by whoever holds the lock.
        shared: with others that share it, or alone.
        wait: until it is free, or come back at once.

    Returns:
        The descriptor, or None if another process is in the way.

    Raises:
        FileNotFoundError: the folder is not there.
        SaeforgeError: the file system has no locks.
    """
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, operation)
            if _is_still(descriptor, path):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                raise SaeforgeError(
                    f"the file system of {path.parent} has no file locks (flock: {error.strerror}), which keep two "
                    "harvests apart; choose an --out on another one, or mount it with locks (NFS: without nolock, "
                    "Lustre: with -o flock)"
                ) from error
            raise
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # what was locked is no longer there: someone removed it in between


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
