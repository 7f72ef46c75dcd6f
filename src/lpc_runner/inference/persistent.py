"""Chains that go on where an example's last one ended (persistent contrastive divergence's way of starting)."""

from __future__ import annotations

import torch
from torch import Tensor

from lpc_runner.base.errors import UserError


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

    def to(self, device: torch.device) -> PersistentStates:
        """Move what is kept."""
        self.z = self.z.to(device)
        return self

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
