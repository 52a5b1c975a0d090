"""Run a function in two processes on gloo."""
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmtune.behaviours import convolution


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def _start(rank, world_size, port, function, args, init, results):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port))
    torch.set_num_threads(1)
    # MMEngine's launcher for gloo asks for a GPU all the same.
    torch.cuda.set_device = lambda device: None
    # What the fixtures of tests/conftest.py do does not reach here.
    convolution.SMALL_MAP = convolution.SMALL_SHARE = 0
    if init:
        # A deadlock is to end the test.
        dist.init_process_group('gloo', timeout=timedelta(seconds=60))
    try:
        results[rank] = function(rank, *args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def in_processes(function: Callable, *args: Any, world_size: int = 2,
                 init: bool = True) -> list:
    """Run ``function(rank, *args)`` in each process; gives what each gives.

    Args:
        function (Callable): Of a module's top level.
        *args: To hand on.
        world_size (int): How many processes.
        init (bool): Whether to make the process group, or leave it to
            MMEngine.
    """
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(
            _start,
            (world_size, free_port(), function, args, init, results),
            nprocs=world_size)
        return [results[rank] for rank in range(world_size)]
