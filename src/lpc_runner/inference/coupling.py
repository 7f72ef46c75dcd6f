"""Whether the chains of a batch may be spread over processes: no row's steps depend on others, but by `mean`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lpc_runner.base.distributions import DiagonalGaussian
from lpc_runner.base.errors import UserError
from lpc_runner.base.schema import declared
from lpc_runner.inference.interfaces import Mean, Sampler

NUM_STEPS = 16  # of the chains that are compared, at most
ROWS = torch.tensor([3, 1])  # of four, in another order


def over_ranks(sampler: Any, mean: Mean) -> Any:
    """The sampler, whose means over the batch are taken by `mean`. Raises UserError (one line) if it offers none."""
    averaging_by = declared(sampler, Sampler, "averaging_by")
    if averaging_by is None:
        name = type(sampler).__name__
        raise UserError(f"sampler: {name} couples the chains of a batch and has no averaging_by: run it on one process")
    return averaging_by(mean)


def require_shareable(sampler: Any, latent_dim: int) -> None:
    """Raises UserError (one line) where chains would depend on which rows share a process.

    Four chains of random drifts are run, and two of them by themselves, with the means that the four took: they must
    go the same way.
    """
    if sampler.num_steps == 0:
        return
    taken: list[Tensor] = []
    whole, part = sampler, sampler
    if declared(sampler, Sampler, "couples_batch"):
        whole = over_ranks(sampler, lambda rows: taken.append(rows.mean(0, keepdim=True)) or taken[-1])
        part = over_ranks(sampler, lambda rows: taken.pop(0) if taken else torch.full_like(rows[:1], torch.nan))
    together = _moves(whole, latent_dim, torch.arange(4))[ROWS]
    alone = _moves(part, latent_dim, ROWS)
    rounding = 1e-4 * float(together.abs().mean())
    if taken or not torch.allclose(alone, together, rtol=1e-4, atol=rounding, equal_nan=True):
        names = " with ".join(
            type(part).__name__ for part in (sampler, getattr(sampler, "preconditioner", None)) if part is not None
        )
        raise UserError(
            f"sampler: the chains of a batch depend on one another in {names}, other than by the means that it says it "
            "takes: run it on one process, or see couples_batch in docs/extending.md"
        )


def _moves(sampler: Any, dim: int, rows: Tensor) -> Tensor:
    """z(T) - z(0) of the chains `rows` of four, whose drifts differ in size; (len(rows), d)."""
    source = torch.Generator().manual_seed(0)
    start, goal, mean, raw = torch.randn(4, 4, dim, generator=source)[:, rows]
    scale = torch.tensor([0.1, 1.0, 10.0, 100.0])[rows, None]

    def potential(z: Tensor) -> tuple[Tensor, Tensor]:
        away = goal - z  # a bounded drift: no step size makes these chains overflow
        return -(scale * away.cosh().log()).sum(1), scale * away.tanh()

    state = sampler.init(start, DiagonalGaussian(mean, raw.square() + 0.1))
    for _ in range(min(sampler.num_steps, NUM_STEPS)):
        noise = torch.randn(4, dim, generator=source)[rows] if sampler.noisy else None
        state, _ = sampler.step(state, potential, noise)
    return state.z - start
