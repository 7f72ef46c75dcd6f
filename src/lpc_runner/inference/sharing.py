"""Whether the chains of a batch may be spread over processes, and how those that a batch couples are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lpc_runner.base.distributions import DiagonalGaussian
from lpc_runner.base.errors import UserError
from lpc_runner.base.schema import declared
from lpc_runner.inference.chain import FusedPotential, advance, begin, draws
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

    def record(rows: Tensor) -> Tensor:
        taken.append(rows.mean(0, keepdim=True))
        return taken[-1]

    def replay(rows: Tensor) -> Tensor:
        return taken.pop(0) if taken else torch.full_like(rows[:1], torch.nan)

    whole, part = sampler, sampler
    if declared(sampler, Sampler, "couples_batch"):
        whole, part = over_ranks(sampler, record), over_ranks(sampler, replay)
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

    def normal(seed: int, *more: int) -> Tensor:
        return torch.randn(*more, 4, dim, generator=torch.Generator().manual_seed(seed))[..., rows, :]

    start, goal, mean, raw = normal(0, 4)
    scale = torch.tensor([0.1, 1.0, 10.0, 100.0])[rows, None]

    def log_joint(z: Tensor) -> Tensor:  # log cosh, of a bounded drift: no step size makes these chains overflow
        away = goal - z
        return -(scale * (away + softplus(-2 * away))).sum(1)

    potential, noise = FusedPotential(log_joint, ()), lambda t: normal(t + 1)
    state = begin(sampler, start, DiagonalGaussian(mean, raw.square() + 0.1), potential, noise, along=False)
    for t in range(1, min(sampler.num_steps, NUM_STEPS) + 1):
        drawn = draws(sampler, noise, t) if sampler.noisy else None
        state, _ = advance(sampler, sampler.step, state, potential, False, drawn)
    return state.z - start
