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
