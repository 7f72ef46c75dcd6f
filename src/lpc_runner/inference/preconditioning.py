"""Diagonal preconditioners G of the Langevin chain, from the drift g alone (`interfaces.Preconditioner`).

The chain drops the Γ term (derivatives of G), as the paper does; where G is constant along a chain there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from lpc_runner.base.distributions import DiagonalGaussian
from lpc_runner.base.schema import PositiveFloat, PositiveInt, between, checked
from lpc_runner.inference.interfaces import Mean, Preconditioner

Decay = Annotated[float, between(0, 1, "no preconditioning is preconditioning=none")]


def _smaller(t: int | Tensor, bound: int) -> int | Tensor:
    return t.clamp(max=bound) if torch.is_tensor(t) else min(t, bound)


class Identity(Preconditioner):
    """G = 1: plain unadjusted Langevin, bit for bit."""

    constant_along_chain = True

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
        self.constant_from = freeze_after

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
    constant_along_chain = True

    @checked
    def __init__(self, cap: PositiveFloat) -> None:
        self.cap = cap

    def init(self, z: Tensor, q: DiagonalGaussian | None = None) -> Tensor:
        assert q is not None, "preconditioning=encoder without an encoder"
        return q.variance.detach().clamp(max=self.cap)

    def update(self, state: Tensor, drift: Tensor, t: int) -> tuple[Tensor, Tensor]:
        return state, state


class Fisher(Preconditioner):
    """G = 1 / (m + 1/s²), m = memory · m + (1 - memory) · (mean of g⊙g over batch and chain), once per update.

    Where chains sample p(z|x), E[g_j²] is the curvature of coordinate j (Fisher's identity; the prior's included), so
    that γ has no unit. A chain is stable for γ < 2/λmax(G^½ΛG^½), Λ an example's own curvature: 2 where coordinates do
    not correlate and examples are alike, less by up to d where they correlate, and by Λ over its mean where examples
    differ. memory: weight of the past, in (0, 1). prior_scale: s. m is one vector, (1, d), constant along a chain. The
    first batch sets it: until then no curvature is known, and the chains of that batch stay where they start.
    """

    constant_along_chain = True
    needs_drift_square = True

    @checked
    def __init__(self, memory: Decay, prior_scale: PositiveFloat) -> None:
        self.memory, self.prior_scale = memory, prior_scale
        self.second_moment: Tensor | None = None  # m
        self.blocks: Mapping[str, slice] = {}

    def bind(self, model: Any, device: torch.device) -> None:
        """model.blocks: coordinates of z by name, of which m is logged."""
        self.blocks = model.blocks

    def init(self, z: Tensor, q: DiagonalGaussian | None = None) -> Tensor:
        if self.second_moment is None:
            return torch.full_like(z[:1], torch.finfo(z.dtype).tiny)
        return (self.second_moment.to(z) + self.prior_scale**-2).reciprocal()

    def update(self, state: Tensor, drift: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        return state, state

    def contribution(self, chain: Any) -> dict[str, Tensor]:
        """Mean of g⊙g over batch and chain, (1, d)."""
        return {"second_moment": chain.drift_square}

    def observe(self, averaged: dict[str, Tensor]) -> None:
        new = averaged["second_moment"]
        past = new if self.second_moment is None else self.second_moment.to(new)  # from a checkpoint, perhaps on a CPU
        self.second_moment = torch.lerp(new, past, self.memory)

    def scalars(self) -> dict[str, Tensor]:
        """The smallest and the largest of m, and its mean over each named block of z."""
        m = self.second_moment
        assert m is not None  # set by the update's `observe`
        means = {f"chain/fisher_{name}": m[:, block].mean() for name, block in self.blocks.items()}
        return {"chain/fisher_min": m.min(), "chain/fisher_max": m.max(), **means}

    def state_dict(self) -> dict[str, Tensor | None]:
        return {"second_moment": self.second_moment}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        self.second_moment = state["second_moment"]
