"""What a Metropolis test would have said of a chain that makes none."""

from __future__ import annotations

import torch
from torch import Tensor

from lpc_runner.inference.samplers import Info, State


def log_acceptance(start: tuple[Tensor, Info], end: tuple[Tensor, Info]) -> Tensor:
    """log of p(x, z') q(z|z') / (p(x, z) q(z'|z)), MALA's log ratio of a proposal from z to z', nats, (B,).

    q(z'|z) = N(z'; z + v g/2, v), v = 2γG at z and g = ∇z log p(x, z); q(z|z') has v' and g' of z'. start, end: z
    (B, d) and what the step that left it saw.
    """
    (z, info), (moved, after) = start, end
    forward, back = (torch.as_tensor(of.noise_variance, dtype=z.dtype, device=z.device) for of in (info, after))
    difference = moved - z
    forward_term = (difference - forward / 2 * info.drift).square() / forward + forward.log()
    back_term = (difference + back / 2 * after.drift).square() / back + back.log()
    return after.log_joint - info.log_joint + 0.5 * (forward_term - back_term).sum(1)


class ShadowMetropolis:
    """Mean over a chain's steps of min(1, exp(log_acceptance)): MALA's acceptance at the unadjusted chain's states.

    Called after every step with the chain's state and info, it needs no decoder pass: density and drift at z(t) are
    known one step later, so the last step is not judged. Exact as MALA's probability where G and γ are constant along
    the chain (none, encoder, a frozen Adam). Where G adapts, v' is the next step's, with a memory that a proposal from
    z' would not have: an approximation.
    """

    def __init__(self, z: Tensor) -> None:
        self.z, self.last = z, None
        self.total, self.count = torch.zeros((), dtype=z.dtype, device=z.device), 0

    def __call__(self, state: State, info: Info) -> None:
        left = (self.z, info)  # the step started at the z before it
        if self.last is not None:
            self.total += log_acceptance(self.last, left).clamp(max=0).exp().mean()
            self.count += 1
        self.z, self.last = state.z, left

    def mean(self) -> Tensor:
        """0-d; NaN if there were fewer than two steps."""
        return self.total / self.count if self.count else torch.full_like(self.total, torch.nan)
