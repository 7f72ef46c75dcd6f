"""Images measured and drawn: features of real and generated images once, every number about them from those.

`SampleQuality` holds what a user chooses; `prepare` turns it, before any training, into a `Measurer` that
holds the references; `measure` is called as often as one likes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lpc_runner.base.errors import UserError
from lpc_runner.base.ranks import SINGLE, Ranks
from lpc_runner.base.schema import NonNegativeInt, PositiveInt, checked
from lpc_runner.base.tensors import generator, hash_of_tensors
from lpc_runner.data.dataset import Data, Dataset, Split
from lpc_runner.evaluation.bounds import encoder_bound
from lpc_runner.evaluation.classifier import Classifier
from lpc_runner.evaluation.distances import (
    FeatureMoments,
    compare_neighbours,
    coverage_ceiling,
    frechet_distance,
    kernel_distance,
    moments,
    squared_radii,
    within_term,
)
from lpc_runner.evaluation.evaluator import Evaluator, Metrics, Setup, Trained, finite
from lpc_runner.evaluation.features import Extractor, Inception, Pretrained, RandomConv, extract
from lpc_runner.evaluation.imagenet import ImageNet
from lpc_runner.evaluation.samples import draw_data, draw_images, draw_levels, sample_images, share_of
from lpc_runner.store.checkpoints import read_sealed, write_sealed

VERSION = 1  # of the cached references; raise when what is stored or how it is computed changes
ExtractorName = Literal["random_conv", "classifier", "inception", "imagenet"]


def make_extractor(
    name: ExtractorName,
    *,
    data: Data,
    identity: dict[str, object],
    cache_dir: Path,
    weights: str | None,
    device: torch.device | str,
) -> Extractor:
    """The extractor called `name`, not yet prepared; UserError when images are too small for it.

    data, identity: what the classifier trains on and is cached under. weights: see `pretrained`.
    """
    num_channels, height, width = data.train.values.shape[1:]
    if name == "random_conv":
        if min(height, width) < RandomConv.MIN_SIZE:
            raise UserError(
                f"metrics.extractor=random_conv needs at least {RandomConv.MIN_SIZE} pixels a side, "
                f"got {height} x {width}; use metrics.extractor=classifier"
            )
        return RandomConv(num_channels, device)
    network = pretrained(name, num_channels, cache_dir, weights, device)
    return network or Classifier(data, identity, cache_dir, device)


def pretrained(
    name: ExtractorName, num_channels: int, cache_dir: Path, weights: str | None, device: torch.device | str = "cpu"
) -> Pretrained | None:
    """The extractor called `name`, not yet prepared, if it is a network with published weights; else None.

    weights: the file of Inception's, None for the published one in `cache_dir`, or of imagenet's network, None for that
    of its package.
    """
    if name == "inception":
        return Inception(num_channels, cache_dir, weights, device)
    return ImageNet(num_channels, weights, device) if name == "imagenet" else None


def name_of(number: str, extractor: str) -> str:
    """What a number from that extractor's features is called: coverage_random_conv; of Inception's, coverage, and fid
    for fd."""
    if extractor == "inception":
        return "fid" if number == "fd" else number
    return f"{number}_{extractor}"


@dataclass(frozen=True)
class Reference:
    """Everything about the real images that no generated one changes, as it is kept in a file.

    features: (N, d) float32. radii: (N,) float64, squared, to the k-th neighbour. mean, covariance: the features'
    moments. scalars: the real part of the kernel distance, the Fréchet distance to n real images of the other split,
    and n; (3,) float64.
    """

    features: Tensor
    radii: Tensor
    mean: Tensor
    covariance: Tensor
    scalars: Tensor

    @classmethod
    def compute(cls, extractor: Extractor, real: Tensor, floor: Tensor, k: int, batch_size: int) -> Reference:
        """From real (N, C, H, W) and disjoint floor (n, C, H, W) uint8 images."""
        features = extract(extractor, real.split(batch_size), len(real), batch_size, real.shape[1:])
        summary, distance = moments(features), -1.0
        if len(floor) >= 2:
            others = extract(extractor, floor.split(batch_size), len(floor), batch_size, floor.shape[1:])
            distance = frechet_distance(summary, moments(others))
        scalars = torch.tensor([within_term(features), distance, len(floor)], dtype=torch.float64)
        parts = (features, squared_radii(features, k), summary.mean, summary.covariance, scalars)
        return cls(*(part.cpu() for part in parts))

    @classmethod
    def read(cls, path: Path, key: str) -> Reference | None:
        """The reference kept under `key`; None, with a warning, when the file is not whole or not its."""
        stored = read_sealed(path, key, "the reference")
        return None if stored is None else cls(**stored)

    def write(self, path: Path, key: str) -> None:
        """Keep it in one file, sealed with a hash over its content and `key`."""
        write_sealed(path, vars(self), key)


_log = logging.getLogger(__name__)


class SampleQuality(Metrics):
    """Fréchet and kernel distance, precision, recall, density and coverage of generated images.

    extractor, weights: see `make_extractor`. k: neighbours that make a ball. num_samples: generated
    images at the end, None for as many as references. max_references: cap on the real images, None for all.
    reference: the split they come from. every_epochs: measure during training too, 0 for only at the end,
    then with num_samples_during images against the same references. Raises ValueError where a count is too
    small for k.
    """

    data_kinds = ("images",)

    @checked
    def __init__(
        self,
        *,
        extractor: ExtractorName,
        weights: str | None,
        k: PositiveInt,
        num_samples: PositiveInt | None,
        max_references: PositiveInt | None,
        reference: Literal["train", "test"],
        batch_size: PositiveInt,
        every_epochs: NonNegativeInt,
        num_samples_during: PositiveInt,
    ) -> None:
        if weights is not None and extractor not in ("inception", "imagenet"):
            _log.warning("metrics.weights has no effect with metrics.extractor=%s", extractor)
        self.extractor: ExtractorName = extractor
        self.weights, self.k = weights, k
        self.num_samples, self.max_references, self.reference = num_samples, max_references, reference
        self.batch_size, self.every_epochs = batch_size, every_epochs
        self.num_samples_during = num_samples_during
        for name in ("num_samples", "max_references", "num_samples_during"):
            if (count := getattr(self, name)) is not None and count <= k:
                raise ValueError(f"{name} must be above k = {k}, the neighbours looked for, got {count}")

    def check(self, num_available: int) -> None:
        """UserError when the reference split, of num_available images, is too small for k."""
        if num_available <= self.k:
            raise UserError(
                f"metrics.k={self.k} needs at least {self.k + 1} {self.reference} images to measure against, "
                f"there are {num_available}; lower metrics.k or use more data"
            )

    def require(self, dataset: Dataset, cache_dir: Path) -> None:
        """UserError (one line) when the extractor's weights cannot be fetched or images are too few; loads no data."""
        network = pretrained(self.extractor, dataset.shape[0], cache_dir, self.weights)
        if network is not None:
            network.prepare()
        if self.reference == "train":
            self.check(dataset.num_train)

    def to_fetch(self, dataset: Dataset, cache_dir: Path) -> str | None:
        network = pretrained(self.extractor, dataset.shape[0], cache_dir, self.weights)
        return None if network is None else network.to_fetch()

    def evaluator(self, setup: Setup) -> Evaluator:
        measurer = self.prepare(setup.data, setup.dataset.identity(), setup.cache_dir, setup.device)
        return ImageEvaluator(setup, measurer)

    def names(self) -> tuple[str, ...]:
        quality = ("fd", "kid", "precision", "recall", "density", "coverage")
        of_samples = (name_of(number, self.extractor) for number in quality)
        return *of_samples, "elbo", "kl", "active_units", "bits_per_dim", "sigma"

    def label(self, facts: dict[str, object]) -> str:
        return f"{self.extractor}-n{facts['num_samples']}-k{facts['k']}-{facts['reference']}"

    def prepare(self, data: Data, identity: dict[str, object], cache_dir: Path, device: torch.device | str) -> Measurer:
        """Extractor and reference features, read from `cache_dir` or computed and kept there.

        identity: the dataset's. UserError (one line) when weights, labels or images are missing.
        """
        split, other = data.train, data.test
        if self.reference == "test":
            split, other = other, split
        if split.values.dtype != torch.uint8 or split.values.ndim != 4:
            raise UserError(
                "metrics measure images stored as uint8 (N, C, H, W), the dataset holds "
                f"{split.values.dtype} {tuple(split.values.shape)}; use metrics=none"
            )
        self.check(len(split))
        extractor = make_extractor(
            self.extractor,
            data=data,
            identity=identity,
            cache_dir=cache_dir,
            weights=self.weights,
            device=device,
        )
        extractor.prepare()
        real = _choose(split, self.max_references, "references")
        floor = _choose(other, len(real), "floor")
        key = {
            "version": VERSION,
            "identity": identity,
            "split": self.reference,
            "images": hash_of_tensors({"real": real, "floor": floor}),  # whatever the identity says
            "num_references": len(real),
            "num_floor": len(floor),
            "extractor": extractor.name,
            "extractor_hash": extractor.fingerprint,
            "k": self.k,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        path = Path(cache_dir) / f"references-{extractor.name}-{digest[:16]}.npz"
        reference = Reference.read(path, digest) if path.exists() else None
        if reference is None:
            reference = Reference.compute(extractor, real, floor, self.k, self.batch_size)
            reference.write(path, digest)
        return Measurer(extractor, reference, tuple(real.shape[1:]), self)


@dataclass(frozen=True)
class Measurer:
    """Measures generated images of one shape (C, H, W) against one fixed reference."""

    extractor: Extractor
    reference: Reference
    shape: tuple[int, ...]
    settings: SampleQuality

    @property
    def num_samples(self) -> int:
        """How many images it wants at the end."""
        return self.settings.num_samples or len(self.reference.features)

    @property
    def num_samples_during(self) -> int:
        """How many it wants during training."""
        return min(self.settings.num_samples_during, self.num_samples)

    def measure(self, images: Iterable[Tensor], num_samples: int, ranks: Ranks = SINGLE) -> dict[str, float]:
        """All numbers of the first `num_samples` of `images`, uint8 chunks (B, C, H, W) of any size.

        Named with the extractor's suffix, `fid` for inception and `fd_...` otherwise. ValueError when the
        images run out. Of several ranks, each brings its own share of the images, and rank 0 gets the numbers.
        """
        shares = share_of(num_samples, ranks)
        samples = extract(self.extractor, images, shares[ranks.rank], self.settings.batch_size, self.shape)
        samples = ranks.gather_rows(samples, shares)
        if not ranks.is_main:
            return {}
        real, radii, *summary, scalars = (part.to(samples.device) for part in vars(self.reference).values())
        numbers = {
            "fd": frechet_distance(FeatureMoments(*summary), moments(samples)),
            "kid": kernel_distance(real, samples, reference_term=scalars[0].item()),
            **compare_neighbours(real, samples, self.settings.k, reference_radii=radii),
        }
        return {name_of(number, self.extractor.name): value for number, value in numbers.items()}

    def facts(self, num_samples: int) -> dict[str, object]:
        """What to write beside the numbers: counts, extractor, the best coverage to expect, the Fréchet
        floor.

        The floor is the distance between the references and num_floor real images of the other split: with
        finite sets even real images are not at 0.
        """
        num_references = len(self.reference.features)
        _, floor, num_floor = self.reference.scalars.tolist()
        return {
            "num_samples": num_samples,
            "num_references": num_references,
            "k": self.settings.k,
            "reference": self.settings.reference,
            **self.extractor.facts(),
            "coverage_ceiling": coverage_ceiling(num_references, num_samples, self.settings.k),
            f"{name_of('fd', self.extractor.name)}_floor": floor if num_floor >= 2 else None,
            "num_floor": int(num_floor),
        }


def _choose(split: Split, limit: int | None, stream: str) -> Tensor:
    """All values of a split, or `limit` of them drawn without replacement: the same ones in every run."""
    if limit is None or limit >= len(split):
        return split.means.cpu()
    chosen = torch.randperm(len(split), generator=generator(0, f"quality/{stream}"))[:limit]
    return split.means.cpu()[chosen.sort().values]


class ImageEvaluator(Evaluator):
    """Sample quality by features, and on the test split what the encoder says; seed: which images are drawn."""

    def __init__(self, setup: Setup, measurer: Measurer) -> None:
        self.dataset, self.data, self.measurer = setup.dataset, setup.data, measurer
        self.seed, self.ranks = setup.seed, setup.ranks

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
        draw_data(self.dataset, self.data, folder)

    def draw(self, trained: Trained, folder: Path, update: int | None) -> dict[str, Path]:
        pictures = draw_images(trained, self.dataset, self.data, self.seed, folder, update)
        levels = draw_levels(trained, self.dataset, self.data, self.seed, folder) if update is None else {}
        return pictures | levels
