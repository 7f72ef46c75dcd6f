"""Images measured and drawn: sample quality, the encoder's bound, grids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lpc_runner.base.ranks import Ranks
from lpc_runner.data.dataset import Batch, Data, Dataset
from lpc_runner.evaluation.evaluator import Evaluator, Trained, finite
from lpc_runner.evaluation.likelihood import encoder_bound
from lpc_runner.evaluation.samples import reconstruct, sample_images, save_grid

if TYPE_CHECKING:
    from lpc_runner.evaluation.quality import Measurer

GRID = 64  # images in a grid


class ImageEvaluator(Evaluator):
    """Sample quality by features, and on the test split what the encoder says; seed: which images are drawn."""

    def __init__(self, dataset: Dataset, data: Data, measurer: Measurer, seed: int, ranks: Ranks) -> None:
        self.dataset, self.data, self.measurer, self.seed, self.ranks = dataset, data, measurer, seed, ranks

    def during(self, trained: Trained) -> dict[str, float]:
        count = self.measurer.num_samples_during
        return self._quality(trained, count) | {"num_samples": float(count)}

    def final(self, trained: Trained) -> tuple[dict[str, float], dict[str, object]]:
        count, model = self.measurer.num_samples, trained.model
        metrics = self._quality(trained, count)
        facts = self.measurer.facts(count)
        if not self.ranks.is_main:
            return metrics, facts
        if trained.encoder is not None and len(self.data.test) > 0:
            metrics |= encoder_bound(model, trained.encoder, self.dataset, self.data.test, self.seed)
            facts |= {"bound_split": "test", "num_bound": len(self.data.test)}
        metrics |= {name: float(value) for name, value in model.likelihood.scalars().items()}
        return finite(metrics), facts

    def _quality(self, trained: Trained, count: int) -> dict[str, float]:
        """Sample quality of `count` images, which all ranks draw and rank 0 compares."""
        images = sample_images(trained.model, count, self.seed, self.ranks)
        return self.measurer.measure(images, count, self.ranks)

    def draw_data(self, folder: Path) -> None:
        save_grid(self.data.train.values[:GRID], folder / "data.png")

    def draw(self, trained: Trained, folder: Path, update: int | None) -> dict[str, Path]:
        """The grid of the first samples, always of the same z, and at the end reconstructions of test images."""
        pictures = {"samples": folder / ("final.png" if update is None else f"update-{update:09d}.png")}
        save_grid(torch.cat(list(sample_images(trained.model, GRID, self.seed))), pictures["samples"])
        if update is None and trained.encoder is not None and len(self.data.test) > 0:
            device = next(trained.model.parameters()).device
            values = self.data.test.values[: GRID // 2].to(device)
            batch = Batch(self.dataset.to_model(values), torch.arange(len(values), device=device))
            images = reconstruct(trained.model, trained.encoder, batch)
            pictures["reconstructions"] = folder / "reconstructions.png"
            save_grid(torch.stack([values, images], 1).flatten(0, 1), pictures["reconstructions"], columns=8)
        return pictures
