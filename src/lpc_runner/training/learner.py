"""What is learned: the model's θ, the encoder's φ, and their optimisers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lpc_runner.data.dataset import Batch
from lpc_runner.errors import UserError
from lpc_runner.inference.engine import Eager
from lpc_runner.inference.objectives import Objective
from lpc_runner.models.latent import LatentVariableModel
from lpc_runner.training.optimizers import Adam
from lpc_runner.training.update import STEP_BY_STEP, Gradients, UpdateNoise, compute_gradients


class Learner:
    """Model, encoder (None where the objective uses none), sampler, objective, and an optimiser each for θ and φ.

    engine: runs the chains.
    """

    def __init__(
        self,
        model: LatentVariableModel,
        encoder: nn.Module | None,
        sampler: Any,
        objective: Objective,
        optimizer: Adam,
        engine: Eager = STEP_BY_STEP,
    ) -> None:
        self.engine = engine
        self.model, self.encoder, self.sampler, self.objective = model, encoder, sampler, objective
        self.theta_optimizer = optimizer.build(model.parameters())
        self.phi_optimizer = optimizer.build(encoder.parameters()) if encoder is not None else None

    def gradients(self, batch: Batch, seed: int, update: int, start_from_prior: bool, observe=None) -> Gradients:
        """Algorithm 1 for one batch; the random numbers are those of (seed, update)."""
        like = next(self.model.parameters())
        noise = UpdateNoise(seed, update, (len(batch.x), self.model.latent_dim), like.device, like.dtype)
        with self.engine.arithmetic():
            return compute_gradients(
                self.model,
                self.encoder,
                self.sampler,
                self.objective,
                batch,
                noise,
                start_from_prior,
                observe,
                engine=self.engine,
            )

    def apply(self, batch: Batch, gradients: Gradients) -> None:
        """The optimisers' steps; only ever called with finite gradients."""
        self.theta_optimizer.step()
        if self.phi_optimizer is not None:
            self.phi_optimizer.step()
        self.model.observe(batch.x, gradients.chain.z)

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
