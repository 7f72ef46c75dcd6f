"""What is learned: the model's θ, the encoder's φ, and their optimisers."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lpc_runner.data.dataset import Batch
from lpc_runner.errors import UserError
from lpc_runner.inference.engine import Eager
from lpc_runner.inference.importance import ImportanceWeighted
from lpc_runner.inference.objectives import Objective
from lpc_runner.inference.preconditioning import SharedAdam
from lpc_runner.models.latent import LatentVariableModel
from lpc_runner.models.sequence_encoders import FreeTable
from lpc_runner.randomness import generator
from lpc_runner.training.distributed import SINGLE, Ranks
from lpc_runner.training.optimizers import Adam
from lpc_runner.training.update import (
    STEP_BY_STEP,
    Combine,
    Gradients,
    UpdateNoise,
    compute_gradients,
    compute_importance_gradients,
    encoder_gradients,
)


class Learner:
    """Model, encoder (None where the objective uses none), sampler, objective, and an optimiser each for θ and φ.

    ranks: the processes that share every batch. sampler: as configured; in training, what it averages over the batch
    is averaged over all ranks. engine: runs the chains.
    """

    def __init__(
        self,
        model: LatentVariableModel,
        encoder: nn.Module | None,
        sampler: Any,
        objective: Objective | ImportanceWeighted,
        optimizer: Adam,
        ranks: Ranks = SINGLE,
        engine: Eager = STEP_BY_STEP,
    ) -> None:
        self.model, self.encoder, self.sampler, self.objective = model, encoder, sampler, objective
        self.ranks = ranks
        self._training_sampler, self.engine = sampler, engine
        if ranks.size > 1 and isinstance(getattr(sampler, "preconditioner", None), SharedAdam):
            # A message at every step is Python's to send.
            self._training_sampler, self.engine = _averaging_over(ranks, sampler), engine.step_by_step()
        self.theta_optimizer = optimizer.build(model.parameters())
        self.phi_optimizer = None
        if isinstance(encoder, FreeTable):
            self.phi_optimizer = optimizer.build_by_row(encoder.parameters(), encoder.learning_rate)
        elif encoder is not None:
            self.phi_optimizer = optimizer.build(encoder.parameters())

    def gradients(
        self,
        batch: Batch,
        seed: int,
        update: int,
        start_from_prior: bool,
        observe=None,
        judge: bool = False,
        stop: bool = False,
    ) -> Gradients:
        """Algorithm 1 for one batch; the random numbers are those of (seed, update).

        The E-steps that variational EM makes on φ alone come first, as long as they are finite. batch: this rank's
        rows; the gradients are those of all ranks' rows. observe, judge: see compute_gradients. stop: whether this rank
        was signalled.
        """
        like, ranks = next(self.model.parameters()), self.ranks
        num_rows = len(batch.x) * ranks.size
        shape = (num_rows, self.model.latent_dim)
        noise = UpdateNoise(seed, update, shape, like.device, like.dtype, ranks.rows(num_rows))
        combine = partial(ranks.combine, stop=stop)
        with self.engine.arithmetic():
            if isinstance(self.objective, ImportanceWeighted):
                return compute_importance_gradients(
                    self.model, self.encoder, self.objective, batch, noise, combine, self.engine
                )
            finite, spent = self._encoder_steps(batch, noise, combine)
            gradients = compute_gradients(
                self.model,
                self.encoder,
                self._training_sampler,
                self.objective,
                batch,
                noise,
                start_from_prior,
                observe,
                judge,
                combine,
                self.engine,
            )
        return replace(gradients, finite=gradients.finite & finite, num_evaluations=gradients.num_evaluations + spent)

    def _encoder_steps(self, batch: Batch, noise: UpdateNoise, combine: Combine) -> tuple[bool, int]:
        """The E-steps of one batch: whether all of them were finite, and the evaluations that they took."""
        num_evaluations = 0
        for step in range(self.objective.num_encoder_steps):
            own = replace(noise, seed=generator(noise.seed, "encoder_steps", step).initial_seed())
            finite, spent = encoder_gradients(
                self.model, self.encoder, batch, own, self.objective.num_samples, combine, self.engine
            )
            num_evaluations += spent
            if not bool(finite):
                return False, num_evaluations
            self.phi_optimizer.step()
        return True, num_evaluations

    def apply(self, batch: Batch, gradients: Gradients) -> None:
        """The optimisers' steps; only ever called with finite gradients."""
        self.theta_optimizer.step()
        if self.phi_optimizer is not None:
            self.phi_optimizer.step()
        with self.engine.arithmetic():
            self.model.observe(batch.x, gradients.z, self.ranks.mean)

    def _parts(self) -> dict[str, Any]:
        parts = {
            "model": self.model,
            "encoder": self.encoder,
            "theta_optimizer": self.theta_optimizer,
            "phi_optimizer": self.phi_optimizer,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """Everything learned, for a checkpoint."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint of the same configuration."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def start_from(self, state: dict[str, Any], source: str) -> None:
        """Take the weights, and no optimiser state, from another run's checkpoint; UserError if they do not fit."""
        for name, part in (("model", self.model), ("encoder", self.encoder)):
            if part is None or name not in state:
                continue
            try:
                part.load_state_dict(state[name])
            except RuntimeError as error:
                detail = str(error).strip().splitlines()[-1].strip()
                raise UserError(f"trainer.init_from={source}: its {name} does not fit this one: {detail}") from None

    def to(self, device: torch.device) -> Learner:
        """Move model and encoder; call before the optimisers have state."""
        self.model.to(device)
        if self.encoder is not None:
            self.encoder.to(device)
        return self


def _averaging_over(ranks: Ranks, sampler: Any) -> Any:
    """The same sampler, its shared second moment that of the global batch."""
    sampler = copy.copy(sampler)
    sampler.preconditioner = copy.copy(sampler.preconditioner)
    sampler.preconditioner.mean = ranks.mean_over_batch
    return sampler
