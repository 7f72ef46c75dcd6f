"""Chains in latent space: state, info, init, step.

`init(z, q)` starts a chain at z (B, d), whose preconditioner may read the encoder's q(z|x). A step receives
`potential`, which maps z (B, d) to log p(x, z) (B,) and its gradient (B, d) in one backward pass, and `noise` (B, d)
~ N(0, I), so that the same step serves every model, a slice of a batch, or a test. A sampler whose step is one
evaluation and then arithmetic has the latter as `move`, which engine=compiled fuses.

γ means the same in all of them: a leapfrog step of length h has γ = h²/2, so that each is stable for γGλ < 2, λ the
curvature of -log p(x, z).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor

from lpc_runner.base.distributions import DiagonalGaussian
from lpc_runner.base.errors import UserError
from lpc_runner.base.schema import PositiveFloat, PositiveInt, at_least, checked, declared
from lpc_runner.inference.interfaces import Mean, Preconditioner, Sampler, StepSize

Potential = Callable[[Tensor], tuple[Tensor, Tensor]]


NOISE_BLOCK = 32  # steps of noise drawn at once


class State(NamedTuple):
    """A chain after t steps.

    z: (B, d). metric: the preconditioner's state. t: 0-d float64 where captured. memory: what else the sampler keeps, a
    tensor, None, or a tree of them. seen: of an adjusted sampler, log p(x, z) (B,) and its gradient (B, d).
    """

    z: Tensor
    metric: Any
    t: int | Tensor
    memory: Any = None
    seen: tuple[Tensor, Tensor] | None = None


class Info(NamedTuple):
    """What one step saw: log p(x, z(t-1)) (B,), its gradient (B, d), and 2γG, the variance of independent noise.

    energy_error: (B,) nats, of the step that the sampler's `energy_error_of` says; a Metropolis test accepts it with
    probability min(1, exp(-energy_error)). NaN counts as infinite.
    """

    log_joint: Tensor
    drift: Tensor
    noise_variance: Tensor | float
    energy_error: Tensor | None = None


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


class MarkovChain(Sampler):
    """What the samplers with steps have in common.

    num_steps: T. theta_states: which states θ takes its gradient from, `all` z(0) .. z(T-1) or the `last`, z(T).
    theta_every: of `all`, only z(0), z(k), z(2k) ..; the other steps compute the drift alone. step_size: γ(t), a
    callable of t = 1 .. T. preconditioner: gives G from the drift. start: z(0) in training from q(z|x) (`encoder`; from
    the prior where the objective has none), from the prior, or `persistent`, from the last z of the same example. An
    example's first visit then starts at first_start, and is first_steps long (null: T) during the first epoch. stop:
    `settled` ends a batch's chains before T, after a block of steps without a trend of log p(x, z) (`chain.settled`).
    """

    @checked
    def __init__(
        self,
        num_steps: Annotated[int, at_least(1, "no steps at all: sampler=none")],
        theta_states: Literal["all", "last"],
        step_size: Any,
        preconditioner: Any,
        theta_every: PositiveInt = 1,
        start: Literal["encoder", "prior", "persistent"] = "encoder",
        first_start: Literal["encoder", "prior"] = "encoder",
        first_steps: PositiveInt | None = None,
        stop: Literal["never", "settled"] = "never",
    ) -> None:
        if start != "persistent" and (first_start, first_steps) != ("encoder", None):
            name = "first_start" if first_start != "encoder" else "first_steps"
            raise ValueError(f"{name} is of start=persistent, and start is {start}")
        self.num_steps, self.theta_states, self.theta_every = num_steps, theta_states, theta_every
        self.step_size, self.preconditioner = step_size, preconditioner
        self.start, self.first_start, self.first_steps, self.stop = start, first_start, first_steps, stop
        if stop == "settled" and num_steps <= block_length(self):
            raise ValueError(f"stop=settled ends chains after blocks of {NOISE_BLOCK} steps, num_steps is {num_steps}")
        if self.adjusted:
            _require_constant(self)

    @property
    def couples_batch(self) -> bool:
        """Whether the preconditioner does, or the chains of a batch end together."""
        return self.stop == "settled" or declared(self.preconditioner, Preconditioner, "couples_batch")

    def averaging_by(self, mean: Mean) -> MarkovChain:
        """The same sampler, whose preconditioner takes its means over the batch by `mean`; UserError if it has none."""
        if self.stop == "settled":
            raise UserError(
                "sampler.stop=settled goes by all chains of a batch: run it on one process, or take stop=never"
            )
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
        """Steps of the same γ and G, uphill and without noise."""
        return Map(self.num_steps, self.theta_states, self.step_size, self.preconditioner)

    def init(self, z: Tensor, q: DiagonalGaussian | None = None, noise: Tensor | None = None) -> State:
        memory = None if noise is None else (noise, torch.zeros_like(z[:, 0]))  # see `baoab`
        return State(z, self.preconditioner.init(z, q), 0, memory)

    def step(self, state: State, potential: Potential, noise: Tensor | None) -> tuple[State, Info]:
        assert self.move is not None  # or the class has a step of its own
        return self.move(state, *potential(state.z), noise)


def block_length(sampler) -> int:
    """Steps of a block: all, or about NOISE_BLOCK, a multiple of theta_every."""
    return min(sampler.num_steps, sampler.theta_every * max(1, NOISE_BLOCK // sampler.theta_every))


def _require_constant(sampler: MarkovChain) -> None:
    """Raises UserError (one line) where G or γ are not constant along a chain, in the end at least."""
    metric, size, name = sampler.preconditioner, sampler.step_size, type(sampler).__name__
    constant_from = declared(metric, Preconditioner, "constant_from")
    always = declared(metric, Preconditioner, "constant_along_chain")
    adapts_again = sampler.start == "persistent"  # at every visit
    if not always and (constant_from is None or constant_from >= sampler.num_steps or adapts_again):
        raise UserError(
            f"sampler: {name} tests every step, for which G must be constant along a chain, and "
            f"{type(metric).__name__} adapts it: preconditioning=none, encoder and fisher fit, and adam and "
            "adam_shared with preconditioning.freeze_after below sampler.num_steps, chains that persist excepted"
        )
    if not declared(size, StepSize, "constant_along_chain"):
        raise UserError(
            f"sampler: {name} tests every step, for which γ must be constant along a chain, and {type(size).__name__} "
            "changes it: step_size=constant, annealed and blocks fit"
        )


def _ahead(z: Tensor, rate: Tensor | float, direction: Tensor) -> Tensor:
    return torch.addcmul(z, rate, direction) if torch.is_tensor(rate) else z + rate * direction


class Map(MarkovChain):
    """Gradient ascent on log p(x, z): classic predictive coding (Eqs. 1-2), the Langevin step without its noise."""

    noisy = False

    def move(self, state: State, log_joint: Tensor, drift: Tensor, noise: None) -> tuple[State, Info]:
        t = state.t + 1
        metric, scale = self.preconditioner.update(state.metric, drift, t)
        return State(_ahead(state.z, self.step_size(t) * scale, drift), metric, t), Info(log_joint, drift, 0.0)


class Langevin(MarkovChain):
    """Preconditioned unadjusted Langevin dynamics (Eq. 5, 18): z(t) = z(t-1) + γ G g + sqrt(2 γ G) ξ.

    noise: ξ is ξ(t), `independent` from step to step, or `averaged`, (ξ(t-1) + ξ(t))/2 (Leimkuhler and Matthews 2013),
    whose variance on a Gaussian is exact at any stable γ. The rest: see `MarkovChain`.
    """

    @checked
    def __init__(self, *first: Any, noise: Literal["independent", "averaged"] = "independent", **shared: Any) -> None:
        super().__init__(*first, **shared)
        self.noise, self.draws_at_start = noise, noise == "averaged"
        # Of averaged noise, as `Underdamped`; of independent noise MALA's, where the step size asks for it.
        judged = self.draws_at_start or declared(self.step_size, StepSize, "needs_acceptance")
        self.energy_error_of = "before" if judged else None

    def init(self, z: Tensor, q: DiagonalGaussian | None = None, noise: Tensor | None = None) -> State:
        state = super().init(z, q, noise)
        if self.noise == "averaged" or self.energy_error_of is None:
            return state
        before = Info(torch.zeros_like(z[:, 0]), torch.zeros_like(z), torch.ones_like(z))
        return state._replace(memory=(z, before))

    def move(self, state: State, log_joint: Tensor, drift: Tensor, noise: Tensor) -> tuple[State, Info]:
        t = state.t + 1
        metric, scale = self.preconditioner.update(state.metric, drift, t)
        rate = self.step_size(t) * scale  # γ G
        variance = 2 * rate
        if self.noise == "averaged":  # the limit of infinite friction; ξ(t-1) is the velocity
            z, memory, error = baoab(state, log_joint, drift, variance**0.5, noise, 1.0, 0.0)
            return State(z, metric, t, memory), Info(log_joint, drift, variance, error)
        info, memory = Info(log_joint, drift, variance), state.memory
        if memory is not None:
            left = (state.z, info._replace(noise_variance=torch.ones_like(drift) * variance))
            memory, info = left, info._replace(energy_error=-log_acceptance(memory, left))
        z = _ahead(_ahead(state.z, rate, drift), variance**0.5, noise)
        return State(z, metric, t, memory), info


def baoab(
    state: State,
    log_joint: Tensor,
    drift: Tensor,
    length: Tensor | float,
    noise: Tensor,
    closing: Tensor | float,
    kept: Tensor | float,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """One step of the BAOAB splitting (Leimkuhler and Matthews 2013), unit mass: z, what is kept, an energy error (B,).

    The last half kick of a step waits for the gradient at the new z, so it is made in the next step, and a step is one
    evaluation. state.memory: the velocity without that kick (B, d), and the energy error of its step so far (B,), which
    is complete now. length: h sqrt(G). closing: 0 where no kick is due (t = 1), else 1. kept: exp(-f h), what friction
    leaves of the velocity. The energy error leaves out the heat that noise and friction exchange (Sivak, Chodera and
    Crooks 2013).
    """
    waiting, work = state.memory
    closed = _ahead(waiting, closing * length / 2, drift)
    error = work - log_joint + closed.square().sum(1) / 2
    kicked = _ahead(closed, length / 2, drift)
    velocity = _ahead(kept * kicked, (1 - kept**2) ** 0.5, noise)
    z = _ahead(state.z, length / 2, kicked + velocity)
    work = log_joint + (kicked.square() - closed.square() - velocity.square()).sum(1) / 2
    return z, (velocity, work), error


class Underdamped(MarkovChain):
    """Underdamped Langevin dynamics by the BAOAB splitting (Leimkuhler and Matthews 2013), steps of h = sqrt(2 γ).

    dz = sqrt(G) v dt, dv = sqrt(G) g dt - f v dt + sqrt(2 f) dW; v(0) ~ N(0, I). friction: f; 2 sqrt(Gλ) is critical.
    z's variance on a Gaussian is exact at any stable γ. The rest: see `MarkovChain`.
    """

    draws_at_start = True
    energy_error_of = "before"

    @checked
    def __init__(self, *first: Any, friction: PositiveFloat = 0.5, **shared: Any) -> None:
        super().__init__(*first, **shared)
        self.friction = friction

    def move(self, state: State, log_joint: Tensor, drift: Tensor, noise: Tensor) -> tuple[State, Info]:
        t = state.t + 1
        metric, scale = self.preconditioner.update(state.metric, drift, t)
        size = 2 * self.step_size(t)  # h²
        variance, decay = size * scale, -self.friction * size**0.5
        decay = decay.exp() if torch.is_tensor(decay) else math.exp(decay)
        closing = (t > 1).to(drift) if torch.is_tensor(t) else float(t > 1)
        z, memory, error = baoab(state, log_joint, drift, variance**0.5, noise, closing, decay)
        return State(z, metric, t, memory), Info(log_joint, drift, variance, error)


def leapfrog(
    z: Tensor, momentum: Tensor, drift: Tensor, length: Tensor | float, potential: Potential, num_steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leapfrog steps for momenta of unit mass: z, momentum (B, d), and log p (B,) and drift (B, d) there.

    drift: at z. length: ε sqrt(G) of a step. Reversible and volume-preserving; the energy's error is O(ε²).
    """
    for _ in range(num_steps):
        momentum = _ahead(momentum, length / 2, drift)
        z = _ahead(z, length, momentum)
        log_joint, drift = potential(z)
        momentum = _ahead(momentum, length / 2, drift)
    return z, momentum, log_joint, drift


class MALA(MarkovChain):
    """Metropolis-adjusted Langevin (Roberts and Tweedie 1996): the Langevin step, accepted by exp(log_acceptance).

    As Hamiltonian Monte Carlo whose trajectories have one leapfrog step. G and γ must be constant along a chain.
    """

    adjusted = True
    energy_error_of = "this"
    num_draws = 2  # the momentum, and for the test another, of which one coordinate is used
    num_leapfrog = 1

    def step(self, state: State, potential: Potential, noise: Tensor) -> tuple[State, Info]:
        t = state.t + 1
        assert state.seen is not None  # as `chain.begin` leaves it
        (momentum, other), (log_joint, drift) = noise, state.seen
        metric, scale = self.preconditioner.update(state.metric, drift, t)
        variance = 2 * (self.step_size(t) * scale)
        length = variance**0.5  # ε sqrt(G)
        z, p, value, gradient = leapfrog(state.z, momentum, drift, length, potential, self.num_leapfrog)
        error = log_joint - value + (p.square() - momentum.square()).sum(1) / 2
        accepted = torch.special.log_ndtr(other[:, 0]) < -error  # log of a uniform number; never where it is NaN
        row = accepted[:, None]
        seen = torch.where(accepted, value, log_joint), torch.where(row, gradient, drift)
        moved = State(torch.where(row, z, state.z), metric, t, None, seen)
        return moved, Info(log_joint, drift, variance, error)


class HMC(MALA):
    """Hamiltonian Monte Carlo (Duane et al. 1987; Hoffman 2017 in training): num_leapfrog steps, then the test.

    Momenta are N(0, 1/G), leapfrog steps sqrt(2 γ). A step is num_leapfrog evaluations. The rest: see `MALA`.
    """

    target_acceptance = 0.65

    @checked
    def __init__(self, *first: Any, num_leapfrog: PositiveInt = 5, **shared: Any) -> None:
        super().__init__(*first, **shared)
        self.num_leapfrog = num_leapfrog


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
