"""Real processes for tests of models that several of them hold: gloo on the CPU."""

import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_TIMEOUT = 120.0
# Imported once, by the process that all others are forked from: alone, each would take seconds for them.
_PRELOAD = ["processes", "safekern", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"]


def run(
    world_size: int, work: Callable[..., Any], *args: Any, fail_ok: bool = False, timeout: float = 30.0
) -> list[Any]:
    """Calls ``work(*args)`` in as many processes of one gloo group.

    Args:
        world_size: how many processes.
        work: a function of a module, so that processes find it; it may use ``torch.distributed``.
        args: what it gets; has to survive ``torch.save``.
        fail_ok: give the text of a process's exception in place of its result, where it would be raised.
        timeout: seconds that a process waits for the others in a collective.

    Returns:
        What it returned in each process, which has to survive ``torch.save`` too.

    Raises:
        AssertionError: a process raised, ended without a word, or did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(args, Path(folder, "args"))
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        processes = [
            context.Process(target=_main, args=(rank, world_size, folder, timeout, work), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + _TIMEOUT
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        assert not hung, f"processes {hung} did not end within {_TIMEOUT:.0f} s"
        results = []
        for rank, process in enumerate(processes):
            path = Path(folder, f"result{rank}")
            assert path.exists(), f"process {rank} ended with status {process.exitcode} and no result"
            error, value = torch.load(path, weights_only=True)
            assert fail_ok or error is None, f"process {rank}: {error}"
            results.append(value if error is None else error)
        return results


def free_port() -> int:
    """For processes that find each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _main(rank: int, world_size: int, folder: str, timeout: float, work: Callable[..., Any]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    error, value = None, None
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        value = work(*torch.load(Path(folder, "args"), weights_only=True))
        dist.barrier()
    # What pytest.raises raises where nothing was raised is no Exception.
    except BaseException:
        error = traceback.format_exc()
    finally:
        torch.save((error, value), Path(folder, f"result{rank}"))
        if dist.is_initialized():
            dist.destroy_process_group()
