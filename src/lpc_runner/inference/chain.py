"""One batch's chain: the states are visited once, and only what the update needs is kept.

Memory does not grow with T: of the states z(1) .. z(T) two running sums remain, of the gradients of θ one sum.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lpc_runner.base.distributions import DiagonalGaussian
from lpc_runner.base.schema import declared
from lpc_runner.base.tensors import generator
from lpc_runner.inference.interfaces import Part, Sampler, parts_of
from lpc_runner.inference.samplers import NOISE_BLOCK, Info, State, block_length, log_acceptance


class Acceptance:
    """Over a chain's steps and its rows, the mean of min(1, exp(-e)) and of |e|, e the steps' energy errors.

    first: the first t whose info has one, 1 or 2. nan: what an error of NaN counts as.
    """

    def __init__(self, first: int, nan: float = math.inf) -> None:
        self.first, self.nan, self.count = first, nan, 0
        self.probability: Any = 0.0  # 0-d tensors from the first step on
        self.size: Any = 0.0

    def add(self, errors: Tensor, t: int) -> None:
        """Those that steps t, t + 1 .. saw, (k, B)."""
        errors = errors[max(0, self.first - t) :].nan_to_num(nan=self.nan, posinf=torch.inf, neginf=-torch.inf)
        if len(errors):
            self.probability = self.probability + errors.neg().exp().clamp(max=1).mean(1).sum()
            self.size = self.size + errors.abs().mean(1).sum()
            self.count += len(errors)

    def means(self) -> tuple[Tensor | None, Tensor | None]:
        """0-d each; None where no step was judged."""
        return (self.probability / self.count, self.size / self.count) if self.count else (None, None)


class ShadowMetropolis(Acceptance):
    """Mean over a chain's steps of min(1, exp(log_acceptance)): MALA's acceptance at the unadjusted chain's states.

    Called after every step with the chain's state and info, it needs no decoder pass: density and drift at z(t) are
    known one step later, so the last step is not judged. Exact as MALA's probability where G and γ are constant along
    the chain (none, encoder, a frozen Adam). Where G adapts, v' is the next step's, with a memory that a proposal from
    z' would not have: an approximation. NaN once a chain has diverged, which is no state to reject steps at.
    """

    def __init__(self, z: Tensor) -> None:
        super().__init__(first=2, nan=math.nan)
        self.z, self.last = z, None

    def __call__(self, state: State, info: Info) -> None:
        left = (self.z, info)  # the step started at the z before it
        if self.last is not None:
            self.add(-log_acceptance(self.last, left)[None], 2)
        self.z, self.last = state.z, left


class FusedPotential:
    """log p(x, z), ∇z and, summed over calls, ∇θ from one backward pass.

    log_joint: z (B, d) -> (B,) nats. parameters: θ. The gradient with respect to z is per sample, because samples do
    not interact; the gradient of θ is the sum over the batch.
    """

    def __init__(self, log_joint: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]) -> None:
        self.log_joint, self.parameters = log_joint, list(parameters)
        self.sums = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.num_evaluations = 0

    def __call__(self, z: Tensor, accumulate: bool) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        with torch.enable_grad(), nullcontext() if accumulate else constant(self.parameters):
            value = self.log_joint(z)
            wanted = [z, *self.parameters] if accumulate else [z]
            drift, *theta = torch.autograd.grad(value, wanted, torch.ones_like(value))
        if theta:
            torch._foreach_add_(self.sums, theta)
        self.num_evaluations += 1
        return value.detach(), drift


@contextmanager
def constant(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Inside, nothing is kept for gradients of θ: a compiled function would otherwise compute them all the same."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in zip(parameters, before):
            parameter.requires_grad_(required)


class Moments:
    """Σ_t (z(t) - centre) and Σ_t (z(t) - centre)² over `count` states, each (B, d).

    The centre is the encoder's mean: sums of raw squares would lose the variance to rounding in float32. kept: some of
    the states themselves, each (B, d): num_kept of every `period` steps, evenly apart and the last with them.
    """

    def __init__(self, centre: Tensor, num_kept: int = 0, period: int = 1) -> None:
        self.centre, self.num_kept, self.period = centre, num_kept, period
        self.first, self.second = torch.zeros_like(centre), torch.zeros_like(centre)
        self.count = 0
        self.kept: list[Tensor] = []

    def add(self, states: Tensor) -> None:
        """The next states, (k, B, d)."""
        difference = states - self.centre
        self.first += difference.sum(0)
        self.second += difference.square().sum(0)
        places = set(_evenly(self.period, self.num_kept))
        self.kept += [z.clone() for t, z in enumerate(states, self.count) if t % self.period + 1 in places]
        self.count += len(states)

    def thin(self) -> None:
        """Of the kept states num_kept at most, evenly apart and the last with them."""
        self.kept = [self.kept[place - 1] for place in _evenly(len(self.kept), self.num_kept)]


def _evenly(total: int, count: int) -> list[int]:
    """`count` of 1 .. total, or all, evenly apart and the last with them."""
    count = min(count, total)
    return [number * total // count for number in range(1, count + 1)]


class ChainNoise:
    """ξ(t) ~ N(0, I) for t = 1, 2 .., drawn in blocks from generators named by (seed, stream, update, block), and ξ(0).

    shape: (B, d) of the global batch; rows: the slice of it that this process works on. stream: what the chain is for.
    """

    def __init__(
        self,
        seed: int,
        update: int,
        shape: tuple[int, ...],
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        rows: slice = slice(None),
        stream: str = "chain",
    ) -> None:
        self.seed, self.update, self.shape, self.rows, self.stream = seed, update, shape, rows, stream
        self.device, self.dtype = device, dtype
        self.block_index: int | None = None
        self.block = torch.empty(0)

    def __call__(self, t: int) -> Tensor:
        index, offset = divmod(t - 1, NOISE_BLOCK)
        if index != self.block_index:
            source = generator(self.seed, self.stream, self.update, index, device=self.device)
            count = NOISE_BLOCK if index >= 0 else 1  # ξ(0) is alone
            draw = torch.randn(count, *self.shape, generator=source, device=self.device, dtype=self.dtype)
            self.block_index, self.block = index, draw[:, self.rows]
        return self.block[offset if index >= 0 else 0]


@dataclass
class Chain:
    """What a chain leaves behind.

    z: z(T), (B, d). theta_gradient: mean over the batch and over the states used of ∇θ log p(x, z; θ), one tensor per
    parameter. moments: sums over z(1) .. z(T). first: log p and drift at z(0), with the first step. trace: per step,
    means over the batch of log p(x, z(t-1)) and of the norm of its gradient, and the largest 2γG; each (T,).
    num_evaluations: gradients of log p(x, z) of one example that it took. drift_square: mean over batch and steps of
    g⊙g, g = ∇z log p at z(0) .. z(T-1), (1, d); None where no part of the sampler needs it. acceptance, energy_error:
    0-d means over batch and steps (see `Acceptance`); None where the sampler's steps have no energy error.
    target_acceptance: the sampler's.
    """

    z: Tensor
    theta_gradient: list[Tensor]
    moments: Moments
    first: tuple[Tensor, Tensor]
    trace: dict[str, Tensor]
    num_evaluations: int
    drift_square: Tensor | None = None
    acceptance: Tensor | None = None
    energy_error: Tensor | None = None
    target_acceptance: float | None = None


def run_chain(
    log_joint: Callable[[Tensor], Tensor],
    z: Tensor,
    sampler,
    noise: Callable[[int], Tensor],
    *,
    parameters: Sequence[Tensor] = (),
    centre: Tensor | None = None,
    q: DiagonalGaussian | None = None,
    on_step: Callable[[State, Info], None] | None = None,
    num_kept: int = 0,
) -> Chain:
    """Run `sampler` from z(0) = z on log p(x, z) and gather what Algorithm 1 needs from its states.

    log_joint: z (B, d) -> (B,) nats. noise: t -> ξ(t), (B, d). parameters: θ, empty for sampling only. centre: about
    which the moments are taken (the encoder's mean; zero without one). q: the encoder's, for preconditioning=encoder.
    on_step: called after every step, for pictures. num_kept: see `Moments`.
    """
    potential, z = FusedPotential(log_joint, parameters), z.detach()
    along, gathered = theta_along(sampler, parameters), Gathered(sampler, z, centre, num_kept)
    state = begin(sampler, z, q, potential, noise, along)
    for t in range(1, sampler.num_steps + 1):
        accumulate = along and (t - 1) % sampler.theta_every == 0
        drawn = draws(sampler, noise, t) if sampler.noisy else None
        state, info = advance(sampler, sampler.step, state, potential, accumulate, drawn)
        error = None if info.energy_error is None else info.energy_error[None]
        gathered.add(state.z[None], info.log_joint[None], info.drift[None], largest(info.noise_variance), error)
        if on_step is not None:
            on_step(state, info)
        if gathered.ended():
            break
    return gathered.chain(potential, state.z)


class Gathered:
    """What is kept of a chain's steps, told of one or of several at a time.

    num_kept: see `Moments`; where chains may end with any block, so many are kept of each, and thinned at the end.
    """

    def __init__(self, sampler: Any, z: Tensor, centre: Tensor | None, num_kept: int) -> None:
        self.sampler, self.block = sampler, block_length(sampler)
        self.stops = declared(sampler, Sampler, "stop") == "settled"
        period = self.block if self.stops else sampler.num_steps
        self.moments = Moments(torch.zeros_like(z) if centre is None else centre.detach(), num_kept, max(1, period))
        names = ("log_joint", "drift_norm", "noise_variance")
        self.trace = {name: torch.empty(sampler.num_steps, dtype=z.dtype, device=z.device) for name in names}
        judged = declared(sampler, Sampler, "energy_error_of")
        self.judged = None if judged is None else Acceptance({"this": 1, "before": 2}[judged])
        squares = any(declared(part, Part, "needs_drift_square") for part in parts_of(sampler))
        self.square = torch.zeros_like(z[:1]) if squares and sampler.num_steps > 0 else None
        self.first: tuple[Tensor, Tensor] | None = None
        self.recent: list[Tensor] = []  # log p(x, z) of the steps of a block, where chains may end with it

    def add(
        self, states: Tensor, log_joints: Tensor, drifts: Tensor, variances: Tensor | float, errors: Tensor | None
    ) -> None:
        """Of k steps: z after them, (k, B, d), log p(x, z) (k, B) and drift (k, B, d) before them, `largest` 2γG and
        energy errors (k, B), where the sampler has any."""
        made = self.moments.count
        steps = slice(made, made + len(states))
        self.moments.add(states)
        self.trace["log_joint"][steps] = log_joints.mean(1)
        self.trace["drift_norm"][steps] = drifts.norm(dim=2).mean(1)
        self.trace["noise_variance"][steps] = variances
        self.first = self.first or (log_joints[0].clone(), drifts[0].clone())
        if self.square is not None:
            self.square += drifts.square().sum((0, 1))
        if self.judged is not None:
            assert errors is not None  # as the sampler declares
            self.judged.add(errors, made + 1)
        if self.stops:
            self.recent.append(log_joints)

    def ended(self) -> bool:
        """Whether the chains end here, before T: after a block without a trend. Waits for the device, once a block."""
        made = self.moments.count
        if not self.stops or made % self.block or made == self.sampler.num_steps:
            return False
        block, self.recent = torch.cat(self.recent), []
        return bool(settled(block))

    def chain(self, potential: FusedPotential, z: Tensor) -> Chain:
        """The last state's gradient where it is wanted, and means instead of sums."""
        self.moments.thin()
        first, num_steps = self.first, self.moments.count  # T, or fewer where chains have settled
        num_states = -(-num_steps // self.sampler.theta_every)
        if self.sampler.theta_states == "last":
            last = potential(z, accumulate=bool(potential.parameters))
            first, num_states = first or last, 1
        assert first is not None  # without steps, only the last state's gradient can be asked for
        gradient = [total / (num_states * len(z)) for total in potential.sums]
        trace = {name: values[:num_steps] for name, values in self.trace.items()}
        square = None if self.square is None else self.square / (num_steps * len(z))
        acceptance = (None, None) if self.judged is None else self.judged.means()
        spent, target = potential.num_evaluations * len(z), declared(self.sampler, Sampler, "target_acceptance")
        return Chain(z, gradient, self.moments, first, trace, spent, square, *acceptance, target)


def draws(sampler, noise: Callable[[int], Tensor], t: int) -> Tensor:
    """What step t of a noisy sampler takes of ξ(1), ξ(2) ..: one, (B, d), or the next num_draws, (num_draws, B, d)."""
    count = declared(sampler, Sampler, "num_draws")
    return noise(t) if count == 1 else torch.stack([noise(count * (t - 1) + k) for k in range(1, count + 1)])


def begin(
    sampler, z: Tensor, q: DiagonalGaussian | None, potential: FusedPotential, noise: Callable[[int], Tensor], along
) -> State:
    """The State at t = 0. along: whether θ evaluates z(0), which is done here for adjusted steps if not."""
    first = (noise(0),) if declared(sampler, Sampler, "draws_at_start") else ()
    state = sampler.init(z, q, *first)
    if declared(sampler, Sampler, "adjusted"):
        seen = (torch.zeros_like(z[:, 0]), torch.zeros_like(z)) if along else potential(z, accumulate=False)
        state = state._replace(seen=seen)
    return state


def advance(
    sampler,
    step: Callable[..., tuple[State, Info]],
    state: State,
    potential: FusedPotential,
    accumulate: bool,
    noise: Tensor | None,
) -> tuple[State, Info]:
    """One step. accumulate: whether θ takes its gradient at the state that it leaves, never at a proposal."""
    if accumulate and declared(sampler, Sampler, "adjusted"):
        state, accumulate = state._replace(seen=potential(state.z, accumulate=True)), False
    return step(state, partial(potential, accumulate=accumulate), noise)


def to_the_end(sampler):
    """The same sampler, all of whose chains make T steps, for measurements and pictures."""
    if declared(sampler, Sampler, "stop") == "settled":
        sampler = copy.copy(sampler)
        sampler.stop = "never"
    return sampler


def settled(log_joint: Tensor) -> Tensor:
    """Whether the batch's mean log p(x, z) has no trend beyond its own noise in a block of steps (k, B), 0-d bool.

    Per chain, the mean of the block's second half less that of its first; chains are independent, so that the mean of
    these differences is known to their standard deviation over sqrt(B). No trend: within two of these.
    """
    half = len(log_joint) // 2
    rise = log_joint[half:].mean(0) - log_joint[:half].mean(0)
    return rise.mean().abs() < 2 * rise.std() / len(rise) ** 0.5


def theta_along(sampler, parameters: Sequence[Tensor]) -> bool:
    """Whether steps of the chain compute gradients of θ."""
    return sampler.theta_states == "all" and bool(parameters)


def largest(variance: Tensor | float) -> Tensor | float:
    """The largest 2γG of a step, 0-d or a float."""
    return variance.max() if torch.is_tensor(variance) else variance
