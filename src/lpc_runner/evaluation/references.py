"""What is kept of the real images: features and all that no generated image changes, in one sealed file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lpc_runner.evaluation.distances import FeatureMoments, frechet_distance, moments, squared_radii, within_term
from lpc_runner.evaluation.features import Extractor, extract
from lpc_runner.store.checkpoints import read_sealed, write_sealed

VERSION = 1  # of the cached references; raise when what is stored or how it is computed changes


@dataclass(frozen=True)
class Reference:
    """Everything about the real images that no generated one changes.

    features: (N, d) float32. radii: (N,) float64, squared, to the k-th neighbour. within: the real part of
    the kernel distance. floor: Fréchet distance to num_floor real images of the other split, None where that
    has fewer than 2.
    """

    features: Tensor
    radii: Tensor
    moments: FeatureMoments
    within: float
    floor: float | None
    num_floor: int

    @classmethod
    def compute(cls, extractor: Extractor, real: Tensor, floor: Tensor, k: int, batch_size: int) -> Reference:
        """From real (N, C, H, W) and disjoint floor (n, C, H, W) uint8 images."""
        features = extract(extractor, real.split(batch_size), len(real), batch_size)
        summary = moments(features)
        distance = None
        if len(floor) >= 2:
            others = extract(extractor, floor.split(batch_size), len(floor), batch_size)
            distance = frechet_distance(summary, moments(others))
        radii, within = squared_radii(features, k), within_term(features)
        return cls(features.cpu(), radii.cpu(), summary.to("cpu"), within, distance, len(floor))

    @classmethod
    def read(cls, path: Path, key: str) -> Reference | None:
        """The reference kept under `key`; None, with a warning, when the file is not whole or not its."""
        stored = read_sealed(path, key, "the reference")
        if stored is None:
            return None
        within, floor, num_floor = stored["scalars"].tolist()
        return cls(
            stored["features"],
            stored["radii"],
            FeatureMoments(stored["mean"], stored["covariance"]),
            within,
            None if num_floor < 2 else floor,
            int(num_floor),
        )

    def write(self, path: Path, key: str) -> None:
        """Keep it in one file, sealed with a hash over its content and `key`."""
        floor = -1.0 if self.floor is None else self.floor
        stored = {
            "features": self.features,
            "radii": self.radii,
            "mean": self.moments.mean,
            "covariance": self.moments.covariance,
            "scalars": torch.tensor([self.within, floor, self.num_floor], dtype=torch.float64),
        }
        write_sealed(path, stored, key)
