"""Data-parallel runs under ``torchrun``: this process's place, and sums and means over all processes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those of the run; a single process is rank 0 of 1, and reductions leave its input as it is."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place; the same bits in each."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        """Mean over the processes, in place; the same bits in each."""
        return self.sum_(tensor).div_(self.size) if self.size > 1 else tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """The main process's values, in place."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def from_main(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the main process, which alone calls it; if it raises, every process raises."""
        if self.size == 1:
            return make()
        found: list[Any] = [None, None]
        if self.is_main:
            try:
                found[0] = make()
            except Exception as error:
                found[1] = error
        dist.broadcast_object_list(found, src=0)
        if found[1] is not None:
            raise found[1]
        result: T = found[0]
        return result

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


ALONE = World()


def launched_by_torchrun() -> bool:
    """Whether ``torchrun`` (or anything that sets the same variables) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_device(device: torch.device) -> torch.device:
    """The device of this process: the GPU of its local rank if ``device`` is ``cuda`` without a number."""
    if device.type == "cuda" and device.index is None and launched_by_torchrun():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def join(device: torch.device) -> World:
    """Join the processes that ``torchrun`` started: over gloo on CPU, NCCL on CUDA. Without torchrun, a single process.

    Raises:
        RuntimeError: the processes cannot reach each other, or this host has more of them than GPUs.
    """
    if not launched_by_torchrun():
        return ALONE
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise RuntimeError(
                f"torchrun must start at most one process per GPU, got process {device.index} on a host of "
                f"{torch.cuda.device_count()} GPUs; lower --nproc-per-node"
            )
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # Its functions take the default group at their import as a default argument. timm and torch._dynamo import it:
        # if they did so later, the group and its threads would outlive leave(), and Gloo's may abort an ending process.
        importlib.import_module("torch.distributed.nn")
        with _stdout_to_stderr():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size())


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Whatever is written to the standard output, in C++ too, goes to stderr: Gloo of PyTorch 2.10 greets there."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, AttributeError):  # there is none
        yield
        return
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def leave() -> None:
    """Take down what :func:`join` set up."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
