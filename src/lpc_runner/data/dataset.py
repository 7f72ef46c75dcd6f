"""What every dataset offers: name, shape, identity, two splits; grey images made binary; batches on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from lpc_runner.base.errors import UserError
from lpc_runner.base.tensors import generator

Binarise = Literal["none", "static", "dynamic"]
CHUNK = 1000  # images drawn at once; the draws depend on it, so it is no setting


def binary_draw(grey: Tensor, source: torch.Generator) -> Tensor:
    """uint8 levels (B, ...) to draws of 0 or 255 of the same shape; P(255) = level/255, exact at 0 and 255."""
    uniform = torch.rand(grey.shape, generator=source, device=grey.device)
    return (255 * uniform < grey).to(torch.uint8) * 255


@dataclass(frozen=True)
class Binarisation:
    """How a set of images is binarised: `none`; `static`, drawn once; `dynamic`, drawn anew at every visit in training.

    seed: which static draw. Whatever is measured of a dynamic set is measured on its static draw.
    """

    mode: Binarise = "none"
    seed: int = 0

    def identity(self) -> dict[str, object]:
        """Its part of `Dataset.identity`; of `none`, nothing."""
        return {} if self.mode == "none" else {"binarise": self.mode, "binarise_seed": self.seed}

    def applied(self, data: Data) -> Data:
        """Both splits with values of 0 and 255, the grey images beside them; for `none` the data as they are."""
        if self.mode == "none":
            return data
        train = replace(self._drawn(data.train, "train"), redrawn=self.mode == "dynamic")
        return Data(train, self._drawn(data.test, "test"))

    def _drawn(self, split: Split, name: str) -> Split:
        parts = [
            binary_draw(grey, generator(self.seed, f"binarise/{name}", number))
            for number, grey in enumerate(split.values.split(CHUNK))
        ]
        return replace(split, values=torch.cat(parts), grey=split.values)


@dataclass(frozen=True)
class Split:
    """Examples of one split as stored: `values` (N, ...) in their own dtype, `labels` (N,) int64 if any.

    extras: what is known of the examples and never shown to a model (true rates, latents, inputs), each (N, ...).
    grey: of binarised images, the levels (N, ...) from which the values were drawn. redrawn: whether every visit in
    training draws its own values from them.
    """

    values: Tensor
    labels: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    grey: Tensor | None = None
    redrawn: bool = False

    def __len__(self) -> int:
        return len(self.values)

    @property
    def means(self) -> Tensor:
        """Expected values, (N, ...), which means of p(x|z) are compared with: grey levels, else the values."""
        return self.values if self.grey is None else self.grey


@dataclass(frozen=True)
class Data:
    """The two splits of a dataset; models see `train` only, `test` is for measuring."""

    train: Split
    test: Split


@dataclass(frozen=True)
class Batch:
    """x: what the model sees, float32 (B, ...). index: (B,) int64 position of each example in its split."""

    x: Tensor
    index: Tensor


class Dataset(ABC):
    """A source of examples; constructing one reads no data."""

    kind: str  # what an example is, in words for messages: "images", "spike counts", "real-valued series"
    name: str
    num_levels: int | None = None  # of a value that the model sees, equally spaced in [-1, 1]; None: any value or count
    num_held_out: int = 0  # last neurons of a sequence that no encoder and no chain may see

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of one example, known without loading all of them. Raises UserError when the data are missing."""

    @property
    @abstractmethod
    def num_train(self) -> int:
        """Number of training examples, known without loading them. Raises UserError when the data are missing."""

    @abstractmethod
    def identity(self) -> dict[str, object]:
        """What identifies the data, independent of their place: name, preprocessing, SHA-256 of user files."""

    @abstractmethod
    def prepare(self) -> None:
        """Make sure the data are there, by a download if need be; raise UserError (one line) if not."""

    def to_fetch(self) -> str | None:
        """What `prepare` would download, and where to; None if nothing."""
        return None

    def account(self) -> list[str]:
        """What of a user's files is taken, for what, and what is passed over and why: one line each.

        Raises UserError where the files are missing or wrong.
        """
        return []

    @abstractmethod
    def load(self) -> Data:
        """Read both splits; raise UserError (one line: which file, what was expected) if damaged."""

    @abstractmethod
    def to_model(self, values: Tensor) -> Tensor:
        """Stored values (B, ...) to what the model sees, float32 (B, ...)."""


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
        self._grey: Tensor | None = None
        if split.redrawn:
            assert split.grey is not None  # what the values of a batch are drawn from
            self._grey = split.grey.to(device)
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
