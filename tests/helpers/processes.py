"""Processes that work together: a script of this folder forks them once and runs many cases."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

HELPERS = Path(__file__).parent


def launch(script: str, *arguments: object, timeout: float = 300.0) -> None:
    """Runs a script of this folder to its end, for a test."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HELPERS.parent)}
    command = [sys.executable, str(HELPERS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]


def fork(world: int, main: Callable[..., None], *arguments: Any) -> None:
    """``main(*arguments)`` in so many processes with a default group; raises what one raised."""
    with TemporaryDirectory() as folder:
        # Forked, they need not import torch, which takes longer than all their work.
        torch.multiprocessing.start_processes(
            _enter, (world, f"{folder}/store", main, arguments), nprocs=world, start_method="fork"
        )


def _enter(rank: int, world: int, store: str, main: Callable[..., None], arguments: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    torch.manual_seed(7)
    main(*arguments)
    leave()


def leave() -> None:
    """Ends a process whose work is done, when that of all is.

    No teardown: on a busy machine gloo's may wait for ever for a thread that waits for Python, or
    abort ("terminate called without an active exception").
    """
    torch.distributed.barrier()
    os._exit(0)
