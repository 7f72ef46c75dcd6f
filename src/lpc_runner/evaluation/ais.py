"""log p(x) by annealed importance sampling (Neal 2001; Wu et al. 2017), between a lower and an upper bound.

    p_b(z) ∝ q(z)^(1-b) p(x, z)^b,    0 = b_0 < b_1 < ... < b_S = 1

Forward, z_0 ~ q, z_s ~ T_s(z_{s-1}) with T_s of invariant law p_{b_s}, and log w = Σ_{s=1..S} (b_s - b_{s-1})
(log p(x, z_{s-1}) - log q(z_{s-1})), has E[w] = p(x): the log of a mean of K weights is a lower bound in expectation.
Backward from an exact draw of p(z|x), as data simulated from the model have one, E[1/w] = 1/p(x), and -log of a mean of
K values 1/w is an upper one (bidirectional Monte Carlo, Grosse et al. 2015).

T_s is Hamiltonian Monte Carlo with a Metropolis test. Its step size per example and temperature is found by chains of
its own beforehand and then held: a kernel that adapts to its own past would leave p_{b_s} invariant only in the limit.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lpc_runner.base.distributions import LOG_2PI, DiagonalGaussian
from lpc_runner.base.schema import PositiveInt, checked
from lpc_runner.base.tensors import generator
from lpc_runner.evaluation import linear_gaussian
from lpc_runner.evaluation.bounds import FreeFit, descend, mean_weight
from lpc_runner.models.latent import LatentVariableModel

# Results depend on these, so they are no settings. Chains of an example that share one draw of noise and run at once:
CHAINS = 8
PILOTS = 4  # chains of an example that find its step sizes
TARGET, RATE, FIRST_STEP = 0.65, 0.4, 0.5  # acceptance, change of log step per unit of it, the first step in units of q
JITTER = 0.2  # each step is drawn from (1 - JITTER, 1 + JITTER) times its size, so that no orbit closes on itself
SLOPE = 4.0  # of the sigmoid schedule
FREE = FreeFit(num_steps=250, num_samples=8, learning_rate=0.02)  # of q where start=free


def schedule(num_temperatures: int) -> list[float]:
    """b_0 .. b_S, a sigmoid over [-SLOPE, SLOPE], scaled to end at 0 and 1: small increments at both ends."""
    sigmoid = lambda s: 1 / (1 + math.exp(-SLOPE * (2 * s / num_temperatures - 1)))
    low, high = sigmoid(0), sigmoid(num_temperatures)
    inner = [(sigmoid(s) - low) / (high - low) for s in range(1, num_temperatures)]
    return [0.0, *inner, 1.0]


class Point(NamedTuple):
    """Of C chains for each of B examples: u (C, B, d), log p(x, z) (C, B) float64 and its gradient by u (C, B, d)."""

    u: Tensor
    log_joint: Tensor
    drift: Tensor


class Annealing:
    """The laws p_b of a chunk of examples, in u = (z - mean of q)/(standard deviation of q): under p_0, N(0, I).

    x: (B, *data_shape). q: over (B, d). A pass is one forward and backward of the decoder. num_leapfrog: passes of a
    move.
    """

    def __init__(self, model: LatentVariableModel, x: Tensor, q: DiagonalGaussian, num_leapfrog: int) -> None:
        self.model, self.x, self.num_leapfrog = model, x, num_leapfrog
        self.mean, self.scale = q.mean.detach(), q.variance.detach().sqrt()
        self.log_volume = self.scale.double().log().sum(1)

    def point(self, u: Tensor) -> Point:
        """What a chain needs to know at u, by one pass."""
        x = self.x.repeat(len(u), *[1] * (self.x.ndim - 1))
        z = self.z_of(u).flatten(0, 1).requires_grad_()
        with torch.enable_grad():
            value = self.model.log_joint(x, z)
        (drift,) = torch.autograd.grad(value.sum(), z)
        return Point(u, value.detach().double().view(u.shape[:2]), drift.view_as(u) * self.scale)

    def z_of(self, u: Tensor) -> Tensor:
        """z of u, of its shape."""
        return self.mean + self.scale * u

    def whiten(self, z: Tensor) -> Tensor:
        """u of z (B, d)."""
        return (z - self.mean) / self.scale

    def log_ratio(self, point: Point) -> Tensor:
        """log p(x, z) - log q(z), (C, B) float64."""
        u = point.u.double()
        return point.log_joint + 0.5 * (u.square().sum(2) + u.shape[2] * LOG_2PI) + self.log_volume

    def normal(self, count: int, source: torch.Generator) -> Tensor:
        """(count, B, d) of N(0, I)."""
        shape, like = (count, *self.mean.shape), self.mean
        return torch.randn(shape, generator=source, device=like.device, dtype=like.dtype)

    def uniform(self, count: int, source: torch.Generator) -> Tensor:
        """(count, B) of U(0, 1)."""
        shape, like = (count, len(self.mean)), self.mean
        return torch.rand(shape, generator=source, device=like.device, dtype=like.dtype)

    def transition(self, point: Point, b: float, step: Tensor, source: torch.Generator) -> tuple[Point, Tensor]:
        """One step of Hamiltonian Monte Carlo that leaves p_b invariant, and its acceptance probability (C, B).

        step: ε in units of u, (B,). A path that leaves the range of numbers is rejected.
        """
        count = len(point.u)
        energy = lambda at, p: 0.5 * (p.double().square() + (1 - b) * at.u.double().square()).sum(2) - b * at.log_joint
        force = lambda at: b * at.drift - (1 - b) * at.u
        size = (step * (1 + JITTER * (2 * self.uniform(count, source) - 1))).unsqueeze(2)
        momentum = self.normal(count, source)
        before, p, new = energy(point, momentum), momentum + 0.5 * size * force(point), point
        for move in range(1, self.num_leapfrog + 1):
            new = self.point(new.u + size * p)
            p = p + (size if move < self.num_leapfrog else 0.5 * size) * force(new)
        acceptance = torch.exp(before - energy(new, p)).clamp(max=1).nan_to_num(nan=0.0)
        accepted = self.uniform(count, source) < acceptance
        kept = [torch.where(accepted.view(*accepted.shape, *[1] * (a.ndim - 2)), a, b) for a, b in zip(new, point)]
        return Point(*kept), acceptance

    def tuning(
        self, count: int, temperatures: Sequence[float], source: torch.Generator
    ) -> Iterator[tuple[Point, Tensor]]:
        """`count` chains that move once at each b: where they are, and ε (B,), whose log follows their acceptance."""
        point, log_step = self.point(self.normal(count, source)), torch.full_like(self.mean[:, 0], math.log(FIRST_STEP))
        for b in temperatures:
            point, acceptance = self.transition(point, b, log_step.exp(), source)
            log_step = log_step + RATE * (acceptance.mean(0).to(log_step) - TARGET)
            yield point, log_step.exp()

    def log_weights(
        self,
        u: Tensor,
        temperatures: list[float],
        steps: list[Tensor],
        source: torch.Generator,
        backward: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """log w (C, B) float64, and the mean acceptance of the moves (B,) (1 where there are none).

        u: z_0 ~ q, or, backward, exact draws of p(z|x) (C, B, d). steps: ε (B,) of each inner temperature.
        """
        point, total = self.point(u), torch.zeros(u.shape[:2], dtype=torch.float64, device=u.device)
        accepted, num_increments = torch.zeros_like(total[0]), len(temperatures) - 1
        order = range(num_increments, 0, -1) if backward else range(1, num_increments + 1)
        for number, s in enumerate(order):
            total += (temperatures[s] - temperatures[s - 1]) * self.log_ratio(point)
            if number < num_increments - 1:
                at = s - 1 if backward else s  # the temperature whose law the move leaves as it is
                point, acceptance = self.transition(point, temperatures[at], steps[at - 1], source)
                accepted += acceptance.mean(0)
        moves = num_increments - 1
        return total, accepted / moves if moves else torch.ones_like(accepted)


class Bounds(NamedTuple):
    """Of every example, (B,) float64 in nats: lower in expectation at most log p(x), upper at least that (None without
    an exact draw of z). effective_samples: (Σ w)² / Σ w² of the K forward weights. acceptance: of the forward moves."""

    lower: Tensor
    effective_samples: Tensor
    acceptance: Tensor
    upper: Tensor | None


class AnnealedImportance:
    """How log p(x) is estimated.

    num_chains: K. num_temperatures: S; 1 is importance sampling from q. num_leapfrog: L, passes per move. start: q is
    the encoder's q(z|x), or the prior, which it is too where there is no encoder for new examples, or a Gaussian
    fitted to every example (`free_q`).
    """

    @checked
    def __init__(
        self,
        *,
        num_chains: PositiveInt,
        num_temperatures: PositiveInt,
        num_leapfrog: PositiveInt,
        start: Literal["encoder", "free", "prior"],
    ) -> None:
        self.num_chains, self.num_temperatures, self.num_leapfrog = num_chains, num_temperatures, num_leapfrog
        self.start, self.temperatures = start, schedule(num_temperatures)

    def bounds(
        self,
        model: LatentVariableModel,
        x: Tensor,
        q: DiagonalGaussian,
        seed: int,
        stream: str,
        z: Tensor | None = None,
    ) -> Bounds:
        """Bounds on log p(x) of x (B, *data_shape). seed, stream: name the noise. z: exact draws of p(z|x), (B, d).

        Memory holds CHAINS chains of every example at once, whatever K and S are.
        """
        path = Annealing(model, x, q, self.num_leapfrog)
        source = lambda *names: generator(seed, "/".join(("ais", stream, *map(str, names))), device=x.device)
        steps = []
        if self.num_temperatures > 1:
            steps = [step for _, step in path.tuning(PILOTS, self.temperatures[1:-1], source("pilot"))]
        forward, backward, accepted = [], [], torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for number, count in enumerate(self._groups()):
            noise = source("forward", number)
            log_w, acceptance = path.log_weights(path.normal(count, noise), self.temperatures, steps, noise)
            forward.append(log_w)
            accepted += count * acceptance / self.num_chains
            if z is not None:
                start, noise = path.whiten(z).expand(count, *z.shape), source("backward", number)
                backward.append(path.log_weights(start, self.temperatures, steps, noise, backward=True)[0])
        lower, effective_samples = mean_weight(torch.cat(forward))
        upper = -mean_weight(-torch.cat(backward))[0] if backward else None
        return Bounds(lower, effective_samples, accepted, upper)

    def free_q(self, model: LatentVariableModel, x: Tensor, start: DiagonalGaussian, seed: int) -> DiagonalGaussian:
        """A Gaussian fitted to every example of x (B, ...), from the best end of PILOTS chains annealed from `start`.

        From there, for a narrow posterior is out of a fit's reach from the prior, or from a q that is far from it.
        """
        if linear_gaussian.is_linear_gaussian(model):
            return linear_gaussian.best_factorised(model, x)
        path, source = Annealing(model, x, start, self.num_leapfrog), generator(seed, "ais/free", device=x.device)
        ((point, step),) = deque(path.tuning(PILOTS, self.temperatures[1:], source), maxlen=1)
        best = point.log_joint.argmax(0), torch.arange(len(x), device=x.device)
        start = DiagonalGaussian(path.z_of(point.u)[best], (step.unsqueeze(1) * path.scale).square())
        return descend(model, x, start, seed, FREE)[1]

    def fit_passes(self, model: LatentVariableModel) -> int:
        """Decoder gradients of one example that its q costs beforehand."""
        if self.start != "free" or linear_gaussian.is_linear_gaussian(model):
            return 0
        return PILOTS * (1 + self.num_leapfrog * self.num_temperatures) + FREE.num_steps * FREE.num_samples

    def posterior_chains(
        self,
        model: LatentVariableModel,
        x: Tensor,
        q: DiagonalGaussian,
        num_chains: int,
        num_moves: int,
        source: torch.Generator,
    ) -> Tensor:
        """States (C, N, B, d) of C chains of N moves at b = 1 from q, kept in the CPU's memory.

        As many moves before them find the step size of every example, which is then held: they leave p(z|x) invariant.
        """
        path, states = Annealing(model, x, q, self.num_leapfrog), []
        ((point, step),) = deque(path.tuning(num_chains, [1.0] * num_moves, source), maxlen=1)
        for _ in range(num_moves):
            point, _ = path.transition(point, 1.0, step, source)
            states.append(path.z_of(point.u).cpu())
        return torch.stack(states, 1)

    def num_moves(self, model: LatentVariableModel, backward: bool) -> int:
        """Moves of a group of chains, L passes each, that are at least as much work as one call of `bounds` and what
        its q costs beforehand."""
        pilots, fit = 1, 0
        if self.fit_passes(model):  # whose pilots are not fewer moves for being fewer than a group
            pilots, fit = 2, FREE.num_steps * FREE.num_samples
        ways = pilots + len(self._groups()) * (2 if backward else 1)
        return ways * self.num_temperatures + math.ceil(fit / (self.num_leapfrog * self._largest_group()))

    def passes_per_example(self, backward: bool) -> int:
        """Decoder gradients of one example that `bounds` costs."""
        chains = self.num_chains * (2 if backward else 1) + (PILOTS if self.num_temperatures > 1 else 0)
        return chains * (1 + self.num_leapfrog * (self.num_temperatures - 1))

    def seconds_per_move(self, model: LatentVariableModel, x: Tensor, q: DiagonalGaussian) -> float:
        """The slowest of three moves of a full group on these examples, after one that pays for the first use."""
        path, source = Annealing(model, x, q, self.num_leapfrog), generator(0, "ais/timing", device=x.device)
        step = torch.full((len(x),), 1e-3, dtype=x.dtype, device=x.device)
        point, seconds = path.point(path.normal(self._largest_group(), source)), []
        for _ in range(4):
            started = time.perf_counter()
            point, acceptance = path.transition(point, 0.5, step, source)
            float(acceptance.sum())  # waits for the device
            seconds.append(time.perf_counter() - started)
        return max(seconds[1:])

    def _largest_group(self) -> int:
        return min(CHAINS, max(self.num_chains, PILOTS))

    def _groups(self) -> list[int]:
        """Chains that are run at once, group by group."""
        return [min(CHAINS, self.num_chains - start) for start in range(0, self.num_chains, CHAINS)]
