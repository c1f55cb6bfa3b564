"""One training in several processes: what they know of each other, and the sums they take together.

Started by ``torchrun``, on one machine or several; over gloo on CPUs and NCCL on GPUs. Gradients are averaged by one
all-reduce after the backward pass: everything else of a training is the same in one process and in many.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, distributed, nn

from robustflow.errors import UserError


@dataclass(frozen=True)
class Group:
    """The processes of a training: this one's number ``rank`` among ``size``.

    >>> ALONE.total(0.5, 3)
    [0.5, 3]
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None  # where what is sent must be

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def part(self, model: nn.Module, batch_size: int) -> slice:
        """This process's part of every global batch.

        Raises:
            UserError: the batch does not divide by the number of processes, whose mean gradient would then be another
                one; or the model normalises by statistics of a batch, of which a process sees only its part.
        """
        if self.size > 1 and any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            raise UserError(
                "batch normalisation is of the whole batch, of which each process sees a part: train this model in one "
                "process, and the others with --model"
            )
        if batch_size % self.size:
            raise UserError(
                f"batch_size {batch_size} does not divide by {self.size} processes: choose another number of processes"
            )
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def total(self, *numbers: float) -> list[float]:
        """Each number summed over the processes; alone, the number itself."""
        if self.size == 1:
            return list(numbers)
        summed = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        distributed.all_reduce(summed)
        return summed.tolist()

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over the processes into every tensor: one all-reduce of all their entries."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        flat /= self.size
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view(tensor.shape))

    def spread_(self, tensors: Iterable[Tensor]) -> None:
        """Put the first process's values into every tensor.

        Equal gradients make equal weights, but for kernels that add up in no fixed order (some of cuDNN's): what those
        let drift apart meets here again.
        """
        if self.size == 1:
            return
        for tensor in tensors:
            sent = tensor.detach().contiguous()
            distributed.broadcast(sent, src=0)
            tensor.detach().copy_(sent)

    def agree(self, number: int, what: str) -> None:
        """Raise UserError unless all processes have the same number: they would wait for each other for ever."""
        if self.size == 1:
            return
        ends = torch.tensor([number, -number], dtype=torch.int64, device=self.device)
        distributed.all_reduce(ends, distributed.ReduceOp.MAX)
        if int(ends[0]) != -int(ends[1]):
            raise UserError(f"the processes do not see the same of {what}: put --out where every machine sees it")

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """The first process does the block, then all others: what is to be downloaded, one process downloads."""
        if not self.leads:
            self.agree(0, "the order")
        yield
        if self.leads:
            self.agree(0, "the order")


ALONE = Group()


def launched() -> bool:
    """Whether ``torchrun`` has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """The group that ``torchrun`` has started this process in; otherwise a group of one, and nothing happens.

    Raises:
        UserError: there are fewer GPUs on this machine than processes.
    """
    if not launched() or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    if device.type == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise UserError(f"--nproc-per-node is more than the {there} GPUs of this machine: one process a GPU")
        torch.cuda.set_device(local)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield Group(distributed.get_rank(), distributed.get_world_size(), device)
    # After an error it is torchrun that ends the others; to say goodbye to them would be to wait for them. Otherwise
    # nobody leaves before the first process has written its last file.
    distributed.barrier()
    distributed.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process: at once if ``torchrun`` has started it.

    In two of some twenty runs (torch 2.14, gloo) a process aborted, its work done, while the interpreter was taken
    down, in a thread of a library's, and torchrun called the whole training failed.
    """
    if not launched():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
