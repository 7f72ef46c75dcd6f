"""Images drawn from a model, grids of them, and what the named blocks of z say, block by block."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpc_runner.base.files import write_atomically
from lpc_runner.base.ranks import SINGLE, Ranks
from lpc_runner.base.tensors import generator
from lpc_runner.data.dataset import Batch, Data, Dataset
from lpc_runner.data.images import to_uint8
from lpc_runner.evaluation.evaluator import Trained
from lpc_runner.models.latent import LatentVariableModel

GRID = 64  # images in a grid
CHUNK = 250  # images drawn at once; sample number i depends on it, so it is no setting


@torch.no_grad()
def sample_images(model: LatentVariableModel, num: int, seed: int, ranks: Ranks = SINGLE) -> Iterator[Tensor]:
    """Decoder means of z ~ p(z) as uint8 chunks (B, C, H, W); image i is the same whatever `num` is.

    Of several ranks, each draws its own share of the chunks: `share_of(num, ranks)[ranks.rank]` images.
    """
    device = next(model.parameters()).device
    for start in _starts(num, ranks.rank, ranks.size):
        source = generator(seed, "samples", start // CHUNK, device=device)
        z = model.prior.scale * torch.randn(CHUNK, model.latent_dim, generator=source, device=device)
        yield to_uint8(model.decode(z[: num - start]))


def _starts(num: int, rank: int, size: int) -> range:
    """First images of a rank's chunks, which follow one another."""
    per_rank = CHUNK * math.ceil(num / (CHUNK * size))
    return range(min(rank * per_rank, num), min((rank + 1) * per_rank, num), CHUNK)


def share_of(num: int, ranks: Ranks) -> list[int]:
    """How many of `num` images each rank draws, in the order of their indices."""
    return [sum(min(CHUNK, num - start) for start in _starts(num, rank, ranks.size)) for rank in range(ranks.size)]


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """A PNG grid of uint8 images (N, C, H, W), C = 1 or 3, row by row, two pixels apart; square unless told."""
    from PIL import Image
    from torchvision.utils import make_grid

    columns = columns or math.ceil(math.sqrt(len(images)))
    grid = make_grid(images.cpu(), nrow=columns, padding=2, pad_value=255)
    side = max(1, round(96 / images.shape[-1]))  # small images enlarged by whole pixels, so that one can see them
    grid = grid.repeat_interleave(side, 1).repeat_interleave(side, 2)
    buffer = io.BytesIO()
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def draw_data(dataset: Dataset, data: Data, folder: Path) -> None:
    """A grid of the first training images, or some training trials."""
    if dataset.kind == "images":
        save_grid(data.train.values[:GRID], folder / "data.png")
    else:
        from lpc_runner.evaluation.sequence_pictures import data_picture

        sequences: Any = dataset  # a SequenceDataset, being no images
        data_picture(data.train, sequences, folder / "data.png")


def draw_images(
    trained: Trained, dataset: Dataset, data: Data, seed: int, folder: Path, update: int | None
) -> dict[str, Path]:
    """The grid of the first samples, always of the same z, and at the end reconstructions of test images; by name."""
    pictures = {"samples": folder / ("final.png" if update is None else f"update-{update:09d}.png")}
    save_grid(torch.cat(list(sample_images(trained.model, GRID, seed))), pictures["samples"])
    if update is None and trained.encoder is not None and len(data.test) > 0:
        images = _reconstructed(trained, dataset, data.test.values[: GRID // 2], [0])
        pictures["reconstructions"] = folder / "reconstructions.png"
        save_grid(images.flatten(0, 1), pictures["reconstructions"], columns=8)
    return pictures


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
        starts = [block.start for block in reversed(list(trained.model.blocks.values()))]
        images = _reconstructed(trained, dataset, data.test.values[:SIDE], starts)
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
def _reconstructed(trained: Trained, dataset: Dataset, values: Tensor, starts: list[int]) -> Tensor:
    """(B, 1 + len(starts), C, H, W) uint8: values (B, C, H, W) as stored, then decoder means at the mean of q(z|x) from
    each start on, 0 before it."""
    assert trained.encoder is not None
    values = values.to(next(trained.model.parameters()).device)
    batch = Batch(dataset.to_model(values), torch.arange(len(values), device=values.device))
    mean, columns = trained.encoder(batch).mean, [values]
    for start in starts:
        z = torch.zeros_like(mean)
        z[:, start:] = mean[:, start:]
        columns.append(to_uint8(trained.model.decode(z)))
    return torch.stack(columns, 1)
