"""What the named blocks of an image model's z say, block by block: of a hierarchy, its levels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lpc_runner.base.tensors import generator
from lpc_runner.data.dataset import Batch, Data, Dataset
from lpc_runner.data.images import to_uint8
from lpc_runner.evaluation.evaluator import Trained
from lpc_runner.evaluation.samples import save_grid
from lpc_runner.models.latent import LatentVariableModel

SIDE = 8  # rows of a grid, and of samples its columns


def draw_levels(trained: Trained, dataset: Dataset, data: Data, seed: int, folder: Path) -> dict[str, Path]:
    """Pictures by name, of a model with several blocks of z; without, none.

    level-l.png: a row has the same blocks above the l-th, which is drawn anew in every column with those below it.
    level-reconstructions.png: a row is a test image, then the means of p(x|z) from the mean of q in the last block, the
    last two .. all of them, 0 in the others.
    """
    pictures = {}
    if len(trained.model.blocks) < 2:
        return pictures
    for name, images in _sampled(trained.model, seed):
        pictures[name] = folder / f"{name}.png"
        save_grid(images, pictures[name], columns=SIDE)
    if trained.encoder is not None and len(data.test) > 0:
        images = _reconstructed(trained, dataset, data.test.values[:SIDE])
        pictures["level-reconstructions"] = folder / "level-reconstructions.png"
        save_grid(images.flatten(0, 1), pictures["level-reconstructions"], columns=images.shape[1])
    return pictures


@torch.no_grad()
def _sampled(model: LatentVariableModel, seed: int) -> Iterator[tuple[str, Tensor]]:
    """For each block but the last, (SIDE², C, H, W) uint8."""
    like = next(model.parameters())
    source = generator(seed, "levels", device=like.device)
    shape = (2, SIDE, SIDE, model.latent_dim)
    common, own = model.prior.scale * torch.randn(shape, generator=source, device=like.device, dtype=like.dtype)
    for number, block in enumerate(list(model.blocks.values())[:-1], 1):
        z = common[:, :1].expand_as(own).clone()
        z[..., : block.stop] = own[..., : block.stop]
        yield f"level-{number}", to_uint8(model.decode(z.flatten(0, 1)))


@torch.no_grad()
def _reconstructed(trained: Trained, dataset: Dataset, values: Tensor) -> Tensor:
    """(B, 1 + number of blocks, C, H, W) uint8, of values (B, C, H, W) as stored."""
    values = values.to(next(trained.model.parameters()).device)
    batch = Batch(dataset.to_model(values), torch.arange(len(values), device=values.device))
    assert trained.encoder is not None
    mean, columns = trained.encoder(batch).mean, [values]
    for block in reversed(list(trained.model.blocks.values())):
        z = torch.zeros_like(mean)
        z[:, block.start :] = mean[:, block.start :]
        columns.append(to_uint8(trained.model.decode(z)))
    return torch.stack(columns, 1)
