"""The interface of likelihoods p(x | η), and a base class for those of independent dimensions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Likelihood(Protocol):
    """p(x | η; θ): a module whose parameters are part of θ. η, the predictor, is what a model's network gives.

    x and η are (B, ...) of one shape; for a sequence (B, T, n), of any n of the neurons.

    data_kinds: kinds of dataset it fits. num_levels: where p(x | η) is a probability of x in [-1, 1] among so many
    equally spaced levels, their number, so that bits per dimension are measured; else None. initial_predictor: η at
    which the bias of a sequence's readout starts. observes: whether `observe` is to be called.
    """

    data_kinds: ClassVar[tuple[str, ...]]
    num_levels: int | None
    initial_predictor: float
    observes: bool

    def __call__(self, x: Tensor, predictor: Tensor) -> Tensor:
        """log p(x | η) in nats, (B,), summed over all dimensions; differentiable once in η and the parameters."""
        ...

    def mean(self, predictor: Tensor) -> Tensor:
        """E[x | η], (B, ...), in the units of x: what is drawn as a sample or a reconstruction."""
        ...

    def scalars(self) -> dict[str, Tensor]:
        """Quantities of its own, 0-d, logged as train/<name> and measured under their name at the end."""
        ...

    def observe(self, x: Tensor, mean: Tensor, average: Callable[[Tensor], Tensor]) -> None:
        """After an update, what is estimated without a gradient, from x and E[x | η] of this process's rows.

        average: the mean of a tensor over the processes that share the batch.
        """

    def gaussian_variance(self) -> Tensor | None:
        """σ², 0-d, where p(x | η) = N(η, σ²I), so that linear models have closed forms; else None."""


def draw(likelihood: Likelihood, predictor: Tensor, source: torch.Generator) -> Tensor | None:
    """x ~ p(x | η), of η's shape; None where the likelihood has no `sample(predictor, source)`, which is optional.

    source: on the device of η.
    """
    sample = getattr(likelihood, "sample", None)
    return None if sample is None else sample(predictor, source)


METHODS = tuple(name for name, member in vars(Likelihood).items() if callable(member) and not name.startswith("_"))
MEMBERS = (*Likelihood.__annotations__, *METHODS)


class Independent(nn.Module):
    """A `Likelihood` of independent dimensions, from `density` and `mean`; no scalars, nothing observed."""

    data_kinds: ClassVar[tuple[str, ...]] = ("images",)
    num_levels: int | None = None
    initial_predictor = 0.0
    observes = False

    def density(self, x: Tensor, predictor: Tensor) -> Tensor:
        """log p(x_i | η_i) in nats, elementwise."""
        raise NotImplementedError

    def mean(self, predictor: Tensor) -> Tensor:
        """E[x | η], elementwise: η itself."""
        return predictor

    def forward(self, x: Tensor, predictor: Tensor) -> Tensor:
        """log p(x | η) in nats, (B,), summed over all dimensions; x and η are (B, ...)."""
        values = self.density(x, predictor)
        if values.is_cuda:  # in memory's order: flattening an image whose channels are last would copy it
            return values.sum(tuple(range(1, values.ndim)))
        return values.flatten(1).sum(1)

    def scalars(self) -> dict[str, Tensor]:
        return {}

    def observe(self, x: Tensor, mean: Tensor, average: Callable[[Tensor], Tensor]) -> None:
        """Nothing."""

    def gaussian_variance(self) -> Tensor | None:
        return None


def lacking(likelihood: Any) -> str | None:
    """Which parts of `Likelihood` an object lacks, in words; None if it has all."""
    if not isinstance(likelihood, nn.Module):
        return "must be a torch.nn.Module"
    names = [name for name in MEMBERS if not hasattr(likelihood, name)]
    return f"lacks {', '.join(names)}" if names else None


def fault_of(likelihood: Likelihood, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a likelihood for examples of that shape, tried on a copy, in words; None if nothing is."""
    tried = copy.deepcopy(likelihood)
    x = torch.ones(2, *shape)  # a pixel's white, a spike: within the range of every kind of data
    predictor = torch.full_like(x, tried.initial_predictor).requires_grad_()
    try:
        value, mean = tried(x, predictor), tried.mean(predictor)
        if value.shape != (2,) or not value.requires_grad:
            return f"must give log p(x | η) of shape (2,) for a batch of 2, differentiable, got {tuple(value.shape)}"
        if mean.shape != x.shape:
            return f"must give means of shape {tuple(x.shape)} for η of that shape, got {tuple(mean.shape)}"
        value.sum().backward()
        if wrong := [name for name, scalar in tried.scalars().items() if scalar.ndim != 0]:
            return f"must give scalars without dimensions, {wrong[0]} has some"
        tried.gaussian_variance()
        if tried.observes:
            tried.observe(x, mean.detach(), lambda value: value)
    except Exception as error:  # a user's class may raise anything; it is reported before training starts
        return f"cannot be evaluated: {' '.join(f'{type(error).__name__}: {error}'.split())[:200]}"
    return None
