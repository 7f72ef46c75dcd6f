"""The protocols of the parts of an update, one for each group, with the defaults of what may be left out.

Abstract methods must be there. All else is read by `schema.declared`, so a class need not inherit from its protocol;
one that does has the defaults as its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lpc_runner.base.distributions import DiagonalGaussian
from lpc_runner.base.errors import UserError
from lpc_runner.base.schema import declared

Mean = Callable[[Tensor], Tensor]  # rows (b, ...) of this rank -> the mean over the batch of all ranks, (1, ...)


class Part:
    """What every part may define.

    A part of a chain (the sampler, its `step_size`, its `preconditioner`) may learn between updates. After a chain,
    `contribution` says what the part takes from it, the values are averaged over the ranks with the gradients, and once
    the update is made `observe` is told them. Such a part has `state_dict()` and `load_state_dict(state)` too, and its
    state is in the checkpoints. Within a chain it does not change.
    """

    needs_drift_square: bool = False  # whether `contribution` reads chain.drift_square

    def bind(self, model: Any, device: torch.device) -> None:
        """Told of the model before the first chain, when the run is checked (on the CPU) and again on its own device.

        model: see `models.latent.LatentVariableModel`; latent_dim, blocks. Raises ValueError, one line, where the two
        do not go together.
        """

    def contribution(self, chain: Any) -> dict[str, Tensor]:
        """What this part takes from one `chain.Chain` of this process's rows: means over the rows, of any shape."""
        return {}

    def usable(self, averaged: dict[str, Tensor]) -> Tensor | None:
        """Whether an update should be made from these chains, 0-d; None: this part has no objection to any."""
        return None

    def observe(self, averaged: dict[str, Tensor]) -> None:
        """An update was made; averaged: the contributions to it, means over the rows of all ranks."""

    def pass_over(self, averaged: dict[str, Tensor], finite: Tensor) -> bool:
        """Instead of `observe`: no update was made, for a part objected or numbers are not finite. Whether to go on."""
        return False

    def scalars(self) -> dict[str, Tensor]:
        """Values to log after an update, 0-d, the same on all ranks."""
        return {}


def parts_of(sampler: Any) -> list[Any]:
    """The sampler, and of its `step_size` and `preconditioner` those it has."""
    beside = (getattr(sampler, name, None) for name in ("step_size", "preconditioner"))
    return [sampler, *(part for part in beside if part is not None)]


class StepSize(Part, ABC):
    """γ(t) along one chain.

    constant_along_chain: whether γ(t) is the same for all t of a chain. needs_acceptance: whether `contribution` reads
    chain.acceptance.
    """

    constant_along_chain: bool = False
    needs_acceptance: bool = False

    @abstractmethod
    def __call__(self, t: int | Tensor) -> float | Tensor:
        """γ(t) > 0, a number or one per coordinate, (1, d).

        t: 1 .. T, an integer or, where one captured or compiled step serves all t, a 0-d float64 tensor: arithmetic in
        t, no branch on it.
        """


class Preconditioner(Part, ABC):
    """The diagonal G of a chain's steps, from the drift.

    Row b of G depends on row b of z, q and the drifts alone, for a batch may be spread over processes. Where that does
    not hold, `couples_batch` is True, and every mean over the batch is taken by `self.mean`, which the class has
    (`SharedAdam`): on several ranks it is replaced by the mean over all of them. Without a `mean` the part runs on one
    process only.

    constant_along_chain: whether G is the same at all steps of a chain, so that no Γ term is left out and each step has
    a Metropolis acceptance. constant_from: where not, the step from which on it is.
    """

    constant_along_chain: bool = False
    constant_from: int | None = None
    couples_batch: bool = False
    needs_encoder: bool = False  # whether init reads q
    mean: Mean | None = None

    @abstractmethod
    def init(self, z: Tensor, q: Any = None) -> Any:
        """The state before the first step: a tensor, None, or a tree of them. z: z(0), (B, d). q: q(z|x), or None."""

    @abstractmethod
    def update(self, state: Any, drift: Tensor, t: int | Tensor) -> tuple[Any, Tensor | float]:
        """The next state, and G > 0 that broadcasts against z. drift: ∇z log p(x, z), (B, d). t: as for a step size."""


class Sampler(Part, ABC):
    """A chain in latent space; `samplers.State` and `samplers.Info` are what it passes on.

    num_steps: T. noisy: whether a step takes noise. theta_states, theta_every, start, first_start, first_steps, stop:
    see `samplers.MarkovChain`. num_draws: draws N(0, I) that a step takes; where there are several, noise is
    (num_draws, B, d). draws_at_start: whether `init` takes one too, as a third argument.

    adjusted: whether steps end with a Metropolis test. Such a step does not evaluate the state that it leaves: log p
    and drift there are in state.seen, and it leaves those of the next one; θ's gradient is taken before the step.
    energy_error_of: whether info.energy_error is that of `this` step, or of the one `before` (nothing then at t = 1).
    target_acceptance: of step_size=adapted, where the user names none.
    """

    num_steps: int
    noisy: bool = True
    theta_states: str = "all"
    theta_every: int = 1
    start: str = "encoder"
    first_start: str = "encoder"
    first_steps: int | None = None
    stop: str = "never"
    num_draws: int = 1
    draws_at_start: bool = False
    adjusted: bool = False
    energy_error_of: Literal["this", "before"] | None = None
    target_acceptance: float = 0.574
    couples_batch: bool = False  # as for a preconditioner
    averaging_by: Callable[[Mean], Any] | None = None  # mean -> the same sampler, its means over the batch taken by it
    noiseless: Callable[[], Any] | None = None  # -> the same steps without noise, for the pictures of trajectories
    move: Callable[..., Any] | None = None  # a step's arithmetic after its one evaluation; engine=compiled fuses it

    @abstractmethod
    def init(self, z: Tensor, q: Any = None) -> Any:
        """The State at t = 0."""

    @abstractmethod
    def step(self, state: Any, potential: Callable, noise: Tensor | None) -> tuple[Any, Any]:
        """The next State, and Info of the one it left. potential: z (B, d) -> log p(x, z) (B,) and drift (B, d)."""


class Objective(Part, ABC):
    """What θ and φ learn from one batch.

    needs_chain: whether there is nothing to learn from z(0) alone. allows_chain: whether a chain means anything.
    needs_factorised_q: whether q(z|x) must be a DiagonalGaussian. capturable: whether, without a chain, `gradients`
    launches the same kernels for every batch: it reads no value of the device, takes random numbers by
    context.noise.normal alone and reads nothing of Python's that changes; then a CUDA graph may capture it once.
    """

    uses_encoder: bool = True
    needs_chain: bool = False
    allows_chain: bool = False
    needs_factorised_q: bool = False
    capturable: bool = False

    @abstractmethod
    def gradients(self, context: Any) -> Any:
        """`context.Gradients` of one `context.Context`: means over the rows of this process's batch, to descend."""


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
    source = torch.Generator().manual_seed(0)
    start, goal, mean, raw = torch.randn(4, 4, dim, generator=source)[:, rows]
    scale = torch.tensor([0.1, 1.0, 10.0, 100.0])[rows, None]

    def potential(z: Tensor) -> tuple[Tensor, Tensor]:
        away = goal - z  # a bounded drift: no step size makes these chains overflow
        return -(scale * away.cosh().log()).sum(1), scale * away.tanh()

    def draw(count: int) -> Tensor:
        draws = torch.randn(count, 4, dim, generator=source)[:, rows]
        return draws if count > 1 else draws[0]

    asks = {name: declared(sampler, Sampler, name) for name in ("num_draws", "draws_at_start", "adjusted")}
    first = (draw(1),) if asks["draws_at_start"] else ()
    state = sampler.init(start, DiagonalGaussian(mean, raw.square() + 0.1), *first)
    if asks["adjusted"]:
        state = state._replace(seen=potential(start))
    for _ in range(min(sampler.num_steps, NUM_STEPS)):
        noise = draw(asks["num_draws"]) if sampler.noisy else None
        state, _ = sampler.step(state, potential, noise)
    return state.z - start
