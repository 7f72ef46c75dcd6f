"""Batches without a loader: the whole split lives on the device, the order is a function of (seed, epoch)."""

from __future__ import annotations

import torch
from torch import Tensor

from lpc_runner.base.errors import UserError
from lpc_runner.base.randomness import generator
from lpc_runner.data.binarise import binary_draw
from lpc_runner.data.dataset import Batch, Dataset, Split


class Batches:
    """Random access to batch (epoch, position); nothing to save, for the same arguments give the same bits.

    values: the split as stored (N, ...), in its own dtype, moved to `device` once; of a `redrawn` split its grey images
    are too, and a batch draws its values from them by (seed, epoch, position), alike for any rows. The incomplete last
    batch of an epoch is dropped. rows: the part of every batch that this process works on. Raises UserError if the
    split is smaller than one batch.
    """

    def __init__(
        self,
        split: Split,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        rows: slice = slice(None),
    ) -> None:
        if len(split) < batch_size:
            raise UserError(
                f"{dataset.name} has {len(split)} training examples, fewer than one batch: "
                f"batch_size must be at most {len(split)}, got {batch_size}"
            )
        self.values = split.values.to(device)
        self._grey = split.grey.to(device) if split.redrawn else None
        self.batch_size = batch_size
        self.num_batches = len(split) // batch_size
        self._dataset = dataset
        self._seed = seed
        self._rows = rows
        self._epoch: int | None = None
        self._order = torch.empty(0, dtype=torch.int64)

    def batch(self, epoch: int, position: int) -> Batch:
        """Batch `position` (0 to num_batches - 1) of an epoch: x float32 (B, ...), index int64 (B,)."""
        assert 0 <= position < self.num_batches, f"position {position} of {self.num_batches}"
        start = position * self.batch_size
        index = self.order(epoch)[start : start + self.batch_size]
        if self._grey is None:
            return self._take(index[self._rows])
        source = generator(self._seed, "binarise", epoch, position, device=self.values.device)
        drawn = binary_draw(self._grey.index_select(0, index), source)
        return Batch(x=self._dataset.to_model(drawn[self._rows]), index=index[self._rows])

    def fixed(self, count: int) -> Batch:
        """The first `count` examples in stored order, for pictures. Raises UserError if there are fewer."""
        if count > len(self.values):
            raise UserError(f"{self._dataset.name} has {len(self.values)} examples, {count} were asked for")
        return self._take(torch.arange(count, device=self.values.device))

    def order(self, epoch: int) -> Tensor:
        """perm(seed, epoch), int64 (N,) on the device; drawn on the CPU, so all devices see one order."""
        if epoch != self._epoch:
            order = torch.randperm(len(self.values), generator=generator(self._seed, "batches", epoch))
            self._order, self._epoch = order.to(self.values.device), epoch
        return self._order

    def _take(self, index: Tensor) -> Batch:
        return Batch(x=self._dataset.to_model(self.values.index_select(0, index)), index=index)
