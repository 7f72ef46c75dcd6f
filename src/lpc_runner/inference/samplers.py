"""Chains in latent space: state, info, init, step.

`init(z, q)` starts a chain at z (B, d), whose preconditioner may read the encoder's q(z|x). A step receives
`potential`, which maps z (B, d) to log p(x, z) (B,) and its gradient (B, d) in one backward pass, and `noise` (B, d)
~ N(0, I), so that the same step serves every model, a slice of a batch, or a test. A sampler whose step is one
evaluation and then arithmetic has the latter as `move`, which engine=compiled fuses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor

from lpc_runner.base.distributions import DiagonalGaussian
from lpc_runner.base.errors import UserError
from lpc_runner.base.schema import PositiveInt, at_least, checked, declared
from lpc_runner.inference.interfaces import Mean, Preconditioner, Sampler

Potential = Callable[[Tensor], tuple[Tensor, Tensor]]
NumSteps = Annotated[int, at_least(1, "no steps at all: sampler=none")]


class State(NamedTuple):
    """z: (B, d) after t steps. metric: the preconditioner's state. t: steps made (0-d float64 where captured)."""

    z: Tensor
    metric: Any
    t: int | Tensor


class Info(NamedTuple):
    """What one step saw: log p(x, z(t-1)) (B,), its gradient (B, d), and 2γG, the variance of the noise it added."""

    log_joint: Tensor
    drift: Tensor
    noise_variance: Tensor | float


class Langevin(Sampler):
    """Preconditioned unadjusted Langevin dynamics (Eq. 5, 18): z(t) = z(t-1) + γ G g + sqrt(2 γ G) ξ.

    num_steps: T. theta_states: which states θ takes its gradient from, `all` z(0) .. z(T-1) or the `last`, z(T).
    theta_every: of `all`, only z(0), z(k), z(2k) ..; the other steps compute the drift alone. step_size: γ(t), a
    callable of t = 1 .. T. preconditioner: gives G from the drift. start: z(0) in training from q(z|x) (`encoder`; from
    the prior where the objective has none), from the prior, or `persistent`, from the last z of the same example. An
    example's first visit then starts at first_start, and is first_steps long (null: T) during the first epoch.
    """

    @checked
    def __init__(
        self,
        num_steps: NumSteps,
        theta_states: Literal["all", "last"],
        step_size: Any,
        preconditioner: Any,
        theta_every: PositiveInt = 1,
        start: Literal["encoder", "prior", "persistent"] = "encoder",
        first_start: Literal["encoder", "prior"] = "encoder",
        first_steps: PositiveInt | None = None,
    ) -> None:
        if start != "persistent" and (first_start, first_steps) != ("encoder", None):
            name = "first_start" if first_start != "encoder" else "first_steps"
            raise ValueError(f"{name} is of start=persistent, and start is {start}")
        self.num_steps, self.theta_states, self.theta_every = num_steps, theta_states, theta_every
        self.step_size, self.preconditioner = step_size, preconditioner
        self.start, self.first_start, self.first_steps = start, first_start, first_steps

    @property
    def couples_batch(self) -> bool:
        """Whether the preconditioner does."""
        return declared(self.preconditioner, Preconditioner, "couples_batch")

    def averaging_by(self, mean: Mean) -> Langevin:
        """The same sampler, whose preconditioner takes its means over the batch by `mean`; UserError if it has none."""
        if declared(self.preconditioner, Preconditioner, "mean") is None:
            raise UserError(
                f"preconditioning: {type(self.preconditioner).__name__} couples the chains of a batch and has no "
                "`mean` to take over several ranks: run it on one process, or see docs/extending.md"
            )
        sampler = copy.copy(self)
        sampler.preconditioner = copy.copy(self.preconditioner)
        sampler.preconditioner.mean = mean
        return sampler

    def noiseless(self) -> Map:
        """The same steps without their noise."""
        return Map(self.num_steps, self.theta_states, self.step_size, self.preconditioner)

    def init(self, z: Tensor, q: DiagonalGaussian | None = None) -> State:
        return State(z, self.preconditioner.init(z, q), 0)

    def step(self, state: State, potential: Potential, noise: Tensor | None) -> tuple[State, Info]:
        return self.move(state, *potential(state.z), noise)

    def move(self, state: State, log_joint: Tensor, drift: Tensor, noise: Tensor | None) -> tuple[State, Info]:
        t = state.t + 1
        metric, scale = self.preconditioner.update(state.metric, drift, t)
        rate = self.step_size(t) * scale  # γ G
        variance = 2 * rate if self.noisy else 0.0
        z = _ahead(state.z, rate, drift)
        if self.noisy:
            z = _ahead(z, variance**0.5, noise)
        return State(z, metric, t), Info(log_joint, drift, variance)


def _ahead(z: Tensor, rate: Tensor | float, direction: Tensor) -> Tensor:
    return torch.addcmul(z, rate, direction) if torch.is_tensor(rate) else z + rate * direction


class Map(Langevin):
    """Gradient ascent on log p(x, z): classic predictive coding (Eqs. 1-2), the Langevin step without its noise."""

    noisy = False


class NoSteps(Sampler):
    """No chain: θ takes its gradient at z(0), which with objective=reverse is a variational autoencoder."""

    num_steps = 0
    noisy = False
    theta_states = "last"

    @checked
    def __init__(self, step_size: Any, preconditioner: Any) -> None:
        """step_size and preconditioner are accepted, and unused, so that every sampler is built alike."""

    def init(self, z: Tensor, q: DiagonalGaussian | None = None) -> State:
        return State(z, None, 0)

    def step(self, state: State, potential: Potential, noise: Tensor | None) -> tuple[State, Info]:
        """Never asked for, as num_steps is 0."""
        raise NotImplementedError
