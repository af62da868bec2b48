"""A rank as a forked process: its place is in the environment, where torch looks; an error is told, not raised."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist


def run_rank(number: int, world: int, port: int, work: Callable[[], None]) -> NoReturn:
    """Does the work of a rank in this process and ends it: with 0, or with 1 after an error's traceback."""
    code = 1
    try:
        if world > 1:
            os.environ |= {"LOCAL_RANK": str(number), "WORLD_SIZE": str(world), "NODE_RANK": "0"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.manual_seed(0)
        work()
        if dist.is_initialized():
            dist.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
