"""The interface of metrics: `Metrics`, what a user chooses, makes an `Evaluator`, which measures a trained model."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from lpc_runner.base.errors import UserError
from lpc_runner.base.ranks import SINGLE, Ranks
from lpc_runner.base.schema import declared
from lpc_runner.data.dataset import Data, Dataset
from lpc_runner.models.latent import EncoderInterface, LatentVariableModel

logger = logging.getLogger(__name__)


class Trained(Protocol):
    """What is measured: a model p(x, z; θ), its encoder (None where there is none) and its sampler."""

    model: LatentVariableModel
    encoder: nn.Module | None
    sampler: Any


def finite(numbers: dict[str, float]) -> dict[str, float]:
    """What of the numbers is finite; a warning names the others, which a diverged run may have."""
    left_out = [name for name, value in numbers.items() if not math.isfinite(value)]
    if left_out:
        logger.warning("not finite and left out: %s", ", ".join(left_out))
    return {name: value for name, value in numbers.items() if name not in left_out}


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error (standard deviation over n - 1, divided by √n) of values (n,)."""
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def is_amortised(encoder: nn.Module | None) -> TypeGuard[nn.Module]:
    """Whether an encoder answers for examples that it was not trained on."""
    return encoder is not None and declared(encoder, EncoderInterface, "amortised")


def evenly_spaced(available: int, count: int | None, device: torch.device | str = "cpu") -> Tensor:
    """Indices of `count` of the available examples, evenly spaced; of all where count is None or more."""
    count = available if count is None else min(count, available)
    return torch.linspace(0, available - 1, count, device=device).round().long()


def without_held_out(x: Tensor, count: int) -> Tensor:
    """x (B, T, N) with its last `count` neurons as NaN, so that a model that reads one is noticed."""
    if count:
        x = x.clone()
        x[..., -count:] = torch.nan
    return x


@contextmanager
def evaluating(*modules: nn.Module | None) -> Iterator[None]:
    """Evaluation mode inside, in which no model reads held-out neurons; then whatever mode it was."""
    present = [module for module in modules if module is not None]
    modes = [module.training for module in present]
    for module in present:
        module.eval()
    try:
        yield
    finally:
        for module, mode in zip(present, modes):
            module.train(mode)


class Evaluator(ABC):
    """Measures a model against one dataset; holds whatever does not change from one measurement to the next.

    Of several ranks, all call `during` and `final`, and what rank 0 gets counts; rank 0 alone draws.
    """

    @abstractmethod
    def during(self, trained: Trained) -> dict[str, float]:
        """Numbers worth having while training goes on."""

    @abstractmethod
    def final(self, trained: Trained) -> tuple[dict[str, float], dict[str, object]]:
        """All finite numbers, and the facts to write beside them: counts, split, what measured them."""

    @abstractmethod
    def draw_data(self, folder: Path) -> None:
        """A picture of training examples, for comparison."""

    @abstractmethod
    def draw(self, trained: Trained, folder: Path, update: int | None) -> dict[str, Path]:
        """Pictures of what the model generates after `update` (None: at the end), by name."""

    def draw_measurement(self, path: Path) -> None:
        """A picture of what `final` has just measured, where numbers alone do not show it; by default none."""
        del path


class Idle(Evaluator):
    """What a rank other than 0 has to do where rank 0 measures alone: nothing."""

    def during(self, trained: Trained) -> dict[str, float]:
        return {}

    def final(self, trained: Trained) -> tuple[dict[str, float], dict[str, object]]:
        return {}, {}

    def draw_data(self, folder: Path) -> None:
        """Nothing."""

    def draw(self, trained: Trained, folder: Path, update: int | None) -> dict[str, Path]:
        return {}


@dataclass(frozen=True)
class Setup:
    """What an evaluator measures on.

    data: both splits of `dataset`. cache_dir: for what can be computed again. seed: the run's, which names its draws.
    ranks: the processes that measure together.
    """

    dataset: Any
    data: Data
    cache_dir: Path
    device: torch.device | str
    seed: int
    ranks: Ranks = SINGLE


def require_examples(setup: Setup, option: str) -> None:
    """Raises UserError (one line) where there are too few test examples for a standard error."""
    if (count := len(setup.data.test)) < 2:
        raise UserError(f"{setup.dataset.name} has {count} test example, metrics={option} needs at least 2")


class Metrics(ABC):
    """What a user chooses to measure (the group `metrics`); constructing it loads nothing.

    data_kinds: kinds of dataset it measures. every_epochs: measure during training too, 0 for only at the end.
    """

    data_kinds: ClassVar[tuple[str, ...]]
    every_epochs: int

    def require(self, dataset: Dataset, cache_dir: Path) -> None:
        """UserError (one line) when weights or examples are missing; loads no data. By default nothing is needed."""
        del dataset, cache_dir

    def to_fetch(self, dataset: Dataset, cache_dir: Path) -> str | None:
        """What `require` would download, and where to; None if nothing."""
        del dataset, cache_dir
        return None

    @abstractmethod
    def evaluator(self, setup: Setup) -> Evaluator:
        """What measures, its references read from the cache or computed. Raises UserError."""

    def names(self) -> tuple[str, ...] | None:
        """Every name that a number of `Evaluator.final` can have; None where they are not known before it."""
        return None

    @abstractmethod
    def label(self, facts: dict[str, object]) -> str:
        """A short name, safe in a file's, for a measurement with these facts."""
