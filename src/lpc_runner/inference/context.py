"""What an objective is given for one batch, where its chains start, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lpc_runner.base.errors import UserError
from lpc_runner.base.schema import declared
from lpc_runner.inference.chain import Chain
from lpc_runner.inference.engine import Eager
from lpc_runner.inference.interfaces import Sampler


class PersistentStates:
    """The last z of every training example, (N, d); NaN where an example was never visited.

    like: of the device and type wanted.
    """

    def __init__(self, num_examples: int, latent_dim: int, like: Tensor) -> None:
        self.z = like.new_full((num_examples, latent_dim), torch.nan).detach()

    def resume(self, index: Tensor, first: Tensor) -> Tensor:
        """z(0) of the examples index (B,): their last z, and `first` (B, d) where there is none."""
        last = self.z[index]
        return torch.where(last.isnan(), first.detach(), last)

    def keep(self, index: Tensor, z: Tensor) -> None:
        """Remember z (B, d), all finite, of the examples index (B,)."""
        self.z[index] = z

    def state_dict(self) -> dict[str, Tensor]:
        return {"z": self.z}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises UserError (one line) if the states are those of other data, or of another model."""
        if state["z"].shape != self.z.shape:
            (count, dim), (num_examples, latent_dim) = state["z"].shape, self.z.shape
            raise UserError(
                f"the checkpoint keeps z of {count} training examples, {dim} numbers each, and here are {num_examples} "
                f"examples with {latent_dim}: it belongs to other data or another model"
            )
        self.z.copy_(state["z"])


STEP_BY_STEP = Eager()


@dataclass
class Gradients:
    """What one batch says, of this process's rows; nothing is set on the parameters yet.

    theta, phi: gradients to descend, one tensor per parameter, means over the rows. z: (B, d), the latents that the
    likelihood's own estimates are made from. scalars: values to log, 0-d, means over the rows. maxima: the same, of
    which the largest over ranks counts. chain: None without one. num_evaluations: gradients of log p(x, z) of one
    example. finite: False where something went wrong before these gradients.
    """

    theta: Sequence[Tensor]
    phi: Sequence[Tensor]
    z: Tensor
    num_evaluations: int
    scalars: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)
    chain: Chain | None = None
    finite: bool = True


def _no_encoder_steps(gradients: Sequence[Tensor]) -> bool:
    raise RuntimeError("only a learner makes steps of the encoder alone")


@dataclass(frozen=True)
class Context:
    """One batch with all that an objective may use for it.

    encoder: None where the objective uses none. sampler: complete. batch: this process's rows, x (B, *data_shape) and
    index (B,). noise: `training.update.UpdateNoise`, the update's random numbers. start_from_prior: z(0) ~ p(z)
    instead of q. engine: runs chains, and is the arithmetic of log p(x, z). on_step: called after every step of the
    chain. judge: whether the acceptance that MALA would have had is wanted. update_encoder: takes gradients of φ (means
    over this process's rows), averages them over the ranks and makes one step of φ alone; False, without a step, where
    they are not finite. kept: where the examples' chains ended, with sampler.start=persistent.
    """

    model: Any
    encoder: Any
    sampler: Any
    batch: Any
    noise: Any
    start_from_prior: bool = False
    engine: Eager = STEP_BY_STEP
    on_step: Callable[[Any, Any], None] | None = None
    judge: bool = False
    update_encoder: Callable[[Sequence[Tensor]], bool] = _no_encoder_steps
    kept: PersistentStates | None = None

    @property
    def theta(self) -> list[Tensor]:
        """The model's parameters."""
        return list(self.model.parameters())

    @property
    def phi(self) -> list[Tensor]:
        """The encoder's parameters; none without an encoder."""
        return [] if self.encoder is None else list(self.encoder.parameters())

    def q(self) -> Any:
        """q(z|x; φ) of the batch, differentiable; None without an encoder."""
        return None if self.encoder is None else self.encoder(self.batch)

    def start(self, warm: Tensor | None) -> Tensor:
        """z(0) of the chain, (B, d), where the sampler's `start` says. warm: a draw z ~ q, None without an encoder."""
        place = declared(self.sampler, Sampler, "start")
        place = declared(self.sampler, Sampler, "first_start") if place == "persistent" else place
        if warm is None or (self.sampler.num_steps > 0 and (self.start_from_prior or place == "prior")):
            first = self.model.prior.scale * self.noise.normal("prior_start")
        else:
            first = warm
        return first if self.kept is None else self.kept.resume(self.batch.index, first)

    def log_joint(self, z: Tensor) -> Tensor:
        """log p(x, z; θ) in nats, (..., B), differentiable; z (..., B, d), any number of draws for each example."""
        x, draws = self.batch.x, z[..., 0, 0].numel()
        x = x if draws == 1 else x.repeat(draws, *[1] * (x.ndim - 1))
        with self.engine.autocast():
            return self.model.log_joint(x, z.reshape(-1, z.shape[-1])).reshape(z.shape[:-1])

    def descend(self, loss: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of a 0-d loss, of θ and of φ, by one backward pass."""
        theta, phi = self.theta, self.phi
        gradients = torch.autograd.grad(loss, [*theta, *phi])
        return list(gradients[: len(theta)]), list(gradients[len(theta) :])
