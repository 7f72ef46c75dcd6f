"""Diagonal preconditioners G of the Langevin chain, from the drift g alone (`interfaces.Preconditioner`).

The chain drops the Γ term (derivatives of G), as the paper does.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from lpc_runner.distributions import DiagonalGaussian
from lpc_runner.inference.interfaces import Mean, Preconditioner
from lpc_runner.schema import PositiveFloat, PositiveInt, between, checked

Decay = Annotated[float, between(0, 1, "no preconditioning is preconditioning=none")]


def _smaller(t: int | Tensor, bound: int) -> int | Tensor:
    return t.clamp(max=bound) if torch.is_tensor(t) else min(t, bound)


class Identity(Preconditioner):
    """G = 1: plain unadjusted Langevin, bit for bit."""

    def init(self, z: Tensor, q: DiagonalGaussian | None = None) -> None:
        return None

    def update(self, state: None, drift: Tensor, t: int | Tensor) -> tuple[None, float]:
        return None, 1.0


class Adam(Preconditioner):
    """G = 1 / (sqrt(m̂) + eps), m = β m + (1 - β) g⊙g, m̂ = m / (1 - β^t) (Algorithm 1; second moment per sample).

    beta: β in (0, 1). eps: added to sqrt(m̂). freeze_after: keep m̂ as it is after that many steps, null for never;
    a frozen G makes the rest of the chain an ordinary Langevin chain. G <= 1/eps is the only bound: a coordinate whose
    drift happened to be near 0 until then keeps its large G for the rest of the chain.
    """

    @checked
    def __init__(self, beta: Decay, eps: PositiveFloat, freeze_after: PositiveInt | None) -> None:
        self.beta, self.eps, self.freeze_after = beta, eps, freeze_after

    def second_moment(self, drift: Tensor) -> Tensor:
        """g⊙g, (B, d)."""
        return drift.square()

    def init(self, z: Tensor, q: DiagonalGaussian | None = None) -> Tensor:
        return self.second_moment(torch.zeros_like(z))

    def update(self, state: Tensor, drift: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        last = t if self.freeze_after is None else _smaller(t, self.freeze_after)
        if torch.is_tensor(t) or t == last:
            moved = torch.lerp(self.second_moment(drift), state, self.beta)
            state = torch.where(t > last, state, moved) if torch.is_tensor(t) and last is not t else moved
        corrected = state / (1 - self.beta**last)
        return state, (corrected.sqrt() + self.eps).reciprocal()


class SharedAdam(Adam):
    """`Adam` with g⊙g averaged over the batch, (1, d): one metric for all chains, at the price of coupling them.

    mean: (B, d) -> (1, d), the mean over the batch; where the batch is spread over processes, over all of them.
    """

    couples_batch = True
    mean: Mean = staticmethod(lambda rows: rows.mean(0, keepdim=True))

    def second_moment(self, drift: Tensor) -> Tensor:
        """Mean of g⊙g over the batch, (1, d)."""
        return self.mean(drift.square())

    def init(self, z: Tensor, q: DiagonalGaussian | None = None) -> Tensor:
        return torch.zeros_like(z[:1])


class EncoderVariance(Preconditioner):
    """G = min(variance of q(z|x), cap), one constant per chain: steps in proportion to what q says of the posterior.

    cap: the prior's variance, where no coordinate of a posterior under log-concave p(x|z) is wider. Detached from φ.
    """

    needs_encoder = True

    @checked
    def __init__(self, cap: PositiveFloat) -> None:
        self.cap = cap

    def init(self, z: Tensor, q: DiagonalGaussian | None = None) -> Tensor:
        assert q is not None, "preconditioning=encoder without an encoder"
        return q.variance.detach().clamp(max=self.cap)

    def update(self, state: Tensor, drift: Tensor, t: int) -> tuple[Tensor, Tensor]:
        return state, state
