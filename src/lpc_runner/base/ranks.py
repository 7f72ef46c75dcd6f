"""One run on several processes (torchrun): replicas, one slice of the batch each, one flat sum per update.

Not DistributedDataParallel: its hooks never fire under `torch.autograd.grad`, which the chain uses. Every rank runs the
whole chain on its slice, and what an update needs from the others travels in one vector; see `Ranks.combine`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from lpc_runner.base.errors import UserError

# Rank 0 measures and downloads while the others wait; a rank that died is noticed by torchrun, not by this limit.
PATIENCE = timedelta(hours=24)


@dataclass(frozen=True)
class Ranks:
    """This process among those of one run. rank: 0 .. size - 1. local_rank: its place on this machine."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def connect(cls) -> Ranks:
        """The ranks that torchrun started, connected at the first call; `SINGLE` without torchrun.

        CUDA tensors travel by NCCL, all others by gloo. Raises UserError if torchrun's variables are incomplete.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return SINGLE
        try:
            ranks = cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        except (KeyError, ValueError) as error:
            raise UserError(f"WORLD_SIZE is set but not what torchrun sets beside it ({error}); unset it") from None
        if not dist.is_initialized():
            on_cuda = torch.cuda.is_available() and dist.is_nccl_available()
            store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
            if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
                # A lone agent keeps its store over restarts: ranks would look for the addresses of those that died.
                store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        return ranks

    @property
    def is_main(self) -> bool:
        """Whether this process writes: run directory, log, checkpoints, tracker, progress."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """This rank's device: its own GPU where the run is on CUDA. Raises UserError when there are too few."""
        if self.size == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise UserError(f"device={device} is one GPU for {self.size} ranks; device=cuda gives each its own")
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise UserError(f"torchrun started more ranks here than there are GPUs ({count}): --nproc-per-node {count}")
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def rows(self, batch_size: int) -> slice:
        """This rank's examples of a global batch. Raises UserError if the batch is not divisible."""
        if batch_size % self.size:
            raise UserError(
                f"trainer.batch_size={batch_size} is the batch of all ranks together and must be divisible by "
                f"their number, {self.size}"
            )
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over ranks of a tensor, one all_reduce."""
        if self.size == 1:
            return value
        value = value.contiguous()
        dist.all_reduce(value)
        return value / self.size

    def mean_over_batch(self, value: Tensor) -> Tensor:
        """Mean over the global batch, (1, ...), of each rank's rows (b, ...): one all_reduce of one row."""
        return self.mean(value.mean(0, keepdim=True))

    def combine(
        self, gradients: Sequence[Tensor], means: Mapping[str, Tensor], maxima: Mapping[str, Tensor], stop: bool
    ) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
        """All that an update needs from the other ranks, by one flat all_reduce.

        gradients: per tensor, means over this rank's rows (what the sampler's parts take from the chain among them);
        returned as means over the global batch. means, maxima: 0-d values, averaged, or the largest taken. stop:
        whether this rank received a signal. Returns the gradients, the values of both mappings, and 0-d: how many ranks
        were signalled.

        A value that is not finite on one rank is not finite in the sum, so finiteness needs no entry of its own.
        """
        like = gradients[0]
        flag = torch.full((), float(stop), device=like.device, dtype=like.dtype)
        if self.size == 1:
            return list(gradients), {**means, **maxima}, flag
        # Each rank has a row of its own for its maxima: their sum is a gather.
        rows = torch.zeros(self.size, len(maxima), device=like.device, dtype=like.dtype)
        for column, value in enumerate(maxima.values()):
            rows[self.rank, column] = value
        scalars = torch.tensor([], device=like.device, dtype=like.dtype)
        if means:
            scalars = torch.stack([value.to(like.dtype) for value in means.values()])
        parts = [*(gradient.flatten() for gradient in gradients), scalars, rows.flatten(), flag.view(1)]
        flat = torch.cat(parts)
        dist.all_reduce(flat)
        *summed, scalars, rows, flag = flat.split([len(part) for part in parts])
        summed = [total.view_as(gradient) / self.size for total, gradient in zip(summed, gradients)]
        values = dict(zip(means, scalars / self.size)) | dict(zip(maxima, rows.view(self.size, -1).amax(0)))
        return summed, values, flag[0]

    def share(self, state: dict[str, Any]) -> dict[str, Any]:
        """Rank 0's `state` (what a checkpoint holds) on every rank: replicas start from the same bits."""
        if self.size == 1:
            return state
        buffer = io.BytesIO()
        if self.is_main:
            torch.save(state, buffer)
        content = [buffer.getvalue()]
        dist.broadcast_object_list(content, device=torch.device("cpu"))
        return torch.load(io.BytesIO(content[0]), map_location="cpu", weights_only=True)

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Rows of all ranks, rank after rank, on every rank; counts: how many each rank has."""
        if self.size == 1:
            return rows
        longest = max(counts)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts)])

    def agree(self, answer: bool) -> bool:
        """Rank 0's answer, on every rank; also a barrier: no rank returns before rank 0 has called it."""
        if self.size == 1:
            return answer
        shared = torch.tensor(int(answer))
        dist.broadcast(shared, 0)
        return bool(shared)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block first, then the others; if it fails, they exit with code 1 and print nothing."""
        if self.size == 1:
            yield
        elif self.is_main:
            passed = False
            try:
                yield
                passed = True
            finally:
                self.agree(passed)
        else:
            if not self.agree(False):
                raise SystemExit(1)
            yield

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


SINGLE = Ranks(rank=0, size=1, local_rank=0)  # every method is the identity and nothing is sent
