"""What a run keeps of its chains, for pictures: some training batches step by step, and trajectories of the result.

Every run records these, so that figures need no further runs.
"""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from lpc_runner.base.files import write_atomically
from lpc_runner.base.schema import NonNegativeInt, PositiveInt, at_least, checked, declared
from lpc_runner.base.tensors import generator
from lpc_runner.data.dataset import Batch
from lpc_runner.inference.chain import run_chain, to_the_end
from lpc_runner.inference.interfaces import Sampler
from lpc_runner.inference.samplers import Info, State
from lpc_runner.models.latent import LatentVariableModel

logger = logging.getLogger(__name__)


class Trace:
    """Per example and step of one batch's chain: log p(x, z(t-1)) in nats and the L2 norm of its gradient."""

    def __init__(self) -> None:
        self.log_joint: list[Tensor] = []
        self.drift_norm: list[Tensor] = []

    def __call__(self, state: State, info: Info) -> None:
        self.log_joint.append(info.log_joint)
        self.drift_norm.append(info.drift.norm(dim=1))


class Traces:
    """Which chains are kept.

    updates: training batches, counted from 1, whose chains are kept step by step (Figures 3, 7 and 8). num_chains:
    training examples whose chains are followed in the plane after training (Figures 1 and 6), 0 for none.
    grid_points: points of log p(x, z) along each axis of that plane.
    """

    @checked
    def __init__(
        self, updates: list[PositiveInt], num_chains: NonNegativeInt, grid_points: Annotated[int, at_least(2)]
    ) -> None:
        self.updates, self.num_chains, self.grid_points = frozenset(updates), num_chains, grid_points

    def watch(self, update: int) -> Trace | None:
        """What is called after every step of the chain of training batch `update`, None where nothing is kept of it."""
        return Trace() if update in self.updates else None

    def keep(self, folder: Path, update: int, trace: Trace | None) -> None:
        """Write `folder`/update-<update>.npz: log_joint and drift_norm, (T, B) float32; without a chain nothing."""
        if trace is not None and trace.log_joint:
            arrays = {name: torch.stack(parts).float().cpu().numpy() for name, parts in vars(trace).items()}
            _save(folder / f"update-{update:09d}.npz", arrays)

    def follow(
        self,
        path: Path,
        model: LatentVariableModel,
        encoder: nn.Module | None,
        sampler: Any,
        batch: Batch,
        seed: int,
        images: Tensor | None = None,
    ) -> None:
        """Write trajectories of one chain for each example of `batch` (see `trajectory`) to `path`, an .npz.

        Names: `langevin` for the sampler with its noise, `map` for the same steps without it (predictive coding),
        both from the same z(0). images: the examples as stored, to be shown beside them. Nothing is written where
        there is no chain, or none that stays finite.
        """
        if sampler.num_steps == 0 or len(batch.x) == 0:
            return
        arrays = {} if images is None else {"images": images.cpu().numpy()}
        without_noise = declared(sampler, Sampler, "noiseless")
        chains = {"langevin": sampler} | ({"map": without_noise()} if without_noise else {})
        for name, chosen in chains.items():
            if chosen.noisy == (name == "langevin"):
                plane = trajectory(model, encoder, chosen, batch, seed, self.grid_points)
                if plane is None:
                    logger.warning("a chain left the finite numbers: no trajectories are kept")
                    return
                arrays |= {f"{name}_{key}": value.float().cpu().numpy() for key, value in plane.items()}
        _save(path, arrays)


@torch.no_grad()
def trajectory(
    model: LatentVariableModel, encoder: nn.Module | None, sampler: Any, batch: Batch, seed: int, grid_points: int
) -> dict[str, Tensor] | None:
    """Chains of B examples seen in the plane of their two main directions (the paper's Appendix A.2).

    z(0) ~ q(z|x), or ~ p(z) without an encoder. The directions u1, u2 are the first two principal components of
    z(t) - z(T), t = 0 .. T, for each chain its own. Returns coordinates (T+1, B, 2) of z(t) - z(T) along them;
    explained (B, 2), their shares of the variance; log_joint (T+1, B), nats; grid (B, 2, G), positions along u1 and
    u2; potential (B, G, G) = -log p(x, z(T) + a u1 + b u2), nats. None if a state or its log p(x, z) is not finite.
    """
    shape, like = (len(batch.x), model.latent_dim), next(model.parameters())

    def normal(stream: str, *counters: int) -> Tensor:
        source = generator(seed, f"trajectories/{stream}", *counters, device=like.device)
        return torch.randn(shape, generator=source, device=like.device, dtype=like.dtype)

    def log_joint(z: Tensor) -> Tensor:
        return model.log_joint(batch.x, z)

    q = None if encoder is None else encoder(batch)
    start = model.prior.scale * normal("start") if q is None else q.rsample(normal("start"))
    states = [start]
    keep = lambda state, info: states.append(state.z)
    run_chain(log_joint, start, to_the_end(sampler), lambda t: normal("chain", t), q=q, on_step=keep)
    values = torch.stack([log_joint(z) for z in states])
    if not all(bool(tensor.isfinite().all()) for tensor in (*states, values)):
        return None
    moves = torch.stack(states) - states[-1]  # (T+1, B, d)
    coordinates, directions, explained = _main_plane(moves)

    low, high = coordinates.amin(0), coordinates.amax(0)  # (B, 2)
    margin = 0.25 * (high - low).amax(1, keepdim=True) + 1e-6  # one scale for both axes
    middle, half = (low + high) / 2, (high - low) / 2 + margin
    steps = torch.linspace(-1, 1, grid_points, device=like.device, dtype=like.dtype)
    grid = middle[:, :, None] + half[:, :, None] * steps  # (B, 2, G)
    surface = [
        -log_joint(states[-1] + grid[:, 0, i, None] * directions[:, 0] + grid[:, 1, j, None] * directions[:, 1])
        for i in range(grid_points)
        for j in range(grid_points)
    ]
    potential = torch.stack(surface, 1).unflatten(1, (grid_points, grid_points))
    return {
        "coordinates": coordinates,
        "explained": explained,
        "log_joint": values,
        "grid": grid,
        "potential": potential,
    }


def _main_plane(moves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates (T+1, B, 2), unit directions (B, 2, d) and shares of variance (B, 2) of moves (T+1, B, d)."""
    centred = (moves - moves.mean(0)).transpose(0, 1)
    _, scales, rows = torch.linalg.svd(centred, full_matrices=False)
    missing = max(0, 2 - rows.shape[1])  # a single step spans a line
    directions = torch.nn.functional.pad(rows[:, :2], (0, 0, 0, missing))
    shares = scales.square() / scales.square().sum(1, keepdim=True).clamp_min(torch.finfo(scales.dtype).tiny)
    explained = torch.nn.functional.pad(shares[:, :2], (0, missing))
    coordinates = torch.einsum("tbd,bkd->tbk", moves, directions)
    # A principal direction has no sign: chains come from the positive side.
    sign = torch.where(coordinates[0] < 0, -1.0, 1.0).to(moves.dtype)
    return coordinates * sign, directions * sign[:, :, None], explained


def _save(path: Path, arrays: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
