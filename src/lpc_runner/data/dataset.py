"""What every dataset offers: a name, a shape, an identity, and its examples as two splits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor


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

    kind: ClassVar[str]  # what an example is, in words for messages: "images", "spike counts", "real-valued series"
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
        """What makes two datasets the same, wherever they lie: name, preprocessing, SHA-256 of user files."""

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
