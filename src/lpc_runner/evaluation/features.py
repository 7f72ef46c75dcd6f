"""Images to feature vectors; every number about samples is computed from these.

Each extractor offers `name`, `metric_suffix` (what its numbers are called: `fid`, `coverage_random_conv`),
`prepare()` (before any training; UserError if something is missing), `fingerprint` (SHA-256 of its weights),
`dimension`, `to(device)`, `facts()`, and calling it: uint8 (B, C, H, W) -> float32 (B, dimension).
"""

from __future__ import annotations

import hashlib
import http.client
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from lpc_runner.base.errors import UserError
from lpc_runner.base.files import sha256_of, write_atomically
from lpc_runner.base.tensors import exact_arithmetic, hash_of_tensors, he_uniform, to_unit
from lpc_runner.data.dataset import Data
from lpc_runner.evaluation.classifier import Classifier
from lpc_runner.evaluation.imagenet import ImageNet

ExtractorName = Literal["random_conv", "classifier", "inception", "imagenet"]
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_HASH = "6726825d"  # how the SHA-256 of the only weights that may be called FID begins


class Extractor(Protocol):
    """What every extractor offers; see the module."""

    name: str
    metric_suffix: str
    dimension: int
    fingerprint: str

    def prepare(self) -> None: ...
    def to(self, device: torch.device | str) -> Extractor: ...
    def facts(self) -> dict[str, object]: ...
    def __call__(self, images: Tensor) -> Tensor: ...


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

    data, identity: what the classifier trains on and is cached under. weights: file with the weights of Inception,
    None for the published ones in `cache_dir`, or of imagenet's network, None for those of its package.
    """
    num_channels, height, width = data.train.values.shape[1:]
    if name == "random_conv":
        if min(height, width) < RandomConv.MIN_SIZE:
            raise UserError(
                f"metrics.extractor=random_conv needs at least {RandomConv.MIN_SIZE} pixels a side, "
                f"got {height} x {width}; use metrics.extractor=classifier"
            )
        return RandomConv(num_channels).to(device)
    if name == "classifier":
        return Classifier(data, identity, cache_dir).to(device)
    network = pretrained(name, num_channels, cache_dir, weights)
    assert network is not None  # as every other name is of a network with published weights
    return network.to(device)


def pretrained(
    name: ExtractorName, num_channels: int, cache_dir: Path, weights: str | None
) -> Inception | ImageNet | None:
    """The extractor called `name`, not yet prepared, if it is a network with published weights; else None."""
    if name == "inception":
        return Inception(num_channels, cache_dir, weights)
    return ImageNet(num_channels, weights) if name == "imagenet" else None


class RandomConv:
    """Three blocks of 3x3 convolution, ReLU and 2x2 averaging, random but fixed; mean over positions: 64-d.

    Needs no download and no labels. Blur, noise and noise with the images' own moments raise its Fréchet
    distance and lower density and coverage, as they should; the scale means nothing outside this package.
    """

    name = "random_conv"
    metric_suffix = "_random_conv"
    dimension = 64
    MIN_SIZE = 8  # pixels a side: each of the three blocks halves it

    def __init__(self, num_channels: int) -> None:
        widths = (num_channels, 16, 32, self.dimension)
        self._weights = {f"conv{i}": he_uniform((widths[i + 1], widths[i], 3, 3), f"random_conv/{i}") for i in range(3)}
        self.fingerprint = hash_of_tensors(self._weights)

    def prepare(self) -> None:
        """Nothing can be missing."""

    def to(self, device: torch.device | str) -> RandomConv:
        """Move the weights; returns itself."""
        self._weights = {name: weight.to(device) for name, weight in self._weights.items()}
        return self

    def facts(self) -> dict[str, object]:
        """What to write beside its numbers."""
        return {"extractor": self.name, "extractor_hash": self.fingerprint}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W), to float32 (B, 64)."""
        with exact_arithmetic():
            hidden = to_unit(images, self._weights["conv0"].device)
            for weight in self._weights.values():
                hidden = functional.avg_pool2d(functional.conv2d(hidden, weight, padding=1).relu(), 2)
            return hidden.mean((2, 3))


class Inception:
    """The 2048-d pool features of the 2015 Inception network, as converted from TensorFlow by torch-fidelity:
    FID's own.

    Only weights whose SHA-256 begins 6726825d are accepted; anything else would not be FID, and
    torch-fidelity itself does not look. weights: their file, or None for the published file in `cache_dir`,
    fetched there if it can be.
    """

    name = "inception"
    metric_suffix = ""
    dimension = 2048

    def __init__(self, num_channels: int, cache_dir: Path, weights: str | None) -> None:
        self._num_channels = num_channels
        self._path = Path(cache_dir) / INCEPTION_FILE if weights is None else Path(weights)
        self._may_fetch = weights is None
        self._device: torch.device | str = "cpu"
        self._network: nn.Module | None = None
        self.fingerprint = ""

    def to_fetch(self) -> str | None:
        """What `prepare` would download, and where to; None if nothing."""
        missing = self._may_fetch and not self._path.is_file()
        return f"Inception's weights into {self._path.parent}" if missing else None

    def prepare(self) -> None:
        """Find or fetch the weights and build the network; UserError (one line) when there is no way to."""
        if self._num_channels not in (1, 3):
            raise UserError(
                f"metrics.extractor=inception takes images of 1 or 3 channels, "
                f"the dataset has {self._num_channels}; use metrics.extractor=random_conv"
            )
        remedy = f"fetch {INCEPTION_URL} and give its path: metrics.weights=PATH"
        if not self._path.is_file():
            if not self._may_fetch:
                raise UserError(f"no Inception weights at {self._path}; {remedy}")
            self._fetch()
        self.fingerprint = sha256_of(self._path)
        if not self.fingerprint.startswith(INCEPTION_HASH):
            raise UserError(
                f"{self._path} does not hold the Inception weights that define FID "
                f"(SHA-256 {self.fingerprint[:8]}..., expected {INCEPTION_HASH}...); remove it, {remedy}"
            )
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # torch-fidelity unpickles the file without a guard, so hold it to be plain tensors first.
        torch.load(self._path, map_location="cpu", weights_only=True)
        self._network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(self._path)
        )
        self.to(self._device)

    def to(self, device: torch.device | str) -> Inception:
        """Move the network, once it is built; returns itself."""
        self._device = device
        if self._network is not None:
            self._network.to(device)
        return self

    def facts(self) -> dict[str, object]:
        """What to write beside its numbers."""
        return {"extractor": self.name, "extractor_hash": self.fingerprint}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, 1 or 3, H, W) to float32 (B, 2048); the network itself resizes to 299 pixels as
        TensorFlow 1 did."""
        assert self._network is not None, "prepare() comes first"
        images = images.to(self._device)
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        with exact_arithmetic():
            (features,) = self._network(images)
        return features

    def _fetch(self) -> None:
        try:
            with urllib.request.urlopen(INCEPTION_URL, timeout=30) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"the Inception weights are missing and could not be fetched ({error}); "
                f"put {INCEPTION_URL} at {self._path}, or give its path: metrics.weights=PATH; "
                "without them: metrics.extractor=random_conv"
            ) from None
        if not hashlib.sha256(content).hexdigest().startswith(INCEPTION_HASH):
            raise UserError(
                f"{INCEPTION_URL} gave something else than the published Inception weights; try again later"
            )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, content)


def extract(
    extractor: Extractor,
    images: Iterable[Tensor],
    num_images: int,
    batch_size: int,
    shape: tuple[int, ...] | None = None,
) -> Tensor:
    """Features (num_images, d) float32, on the extractor's device, of the first num_images of `images`."""
    parts, missing = [], num_images
    for chunk in images:
        if chunk.dtype != torch.uint8 or (shape is not None and tuple(chunk.shape[1:]) != shape):
            raise ValueError(f"expected uint8 images (B, *{shape}), got {chunk.dtype} {tuple(chunk.shape)}")
        kept = chunk[:missing]
        parts += [extractor(batch) for batch in kept.split(batch_size)]
        missing -= len(kept)
        if missing <= 0:
            break
    if missing > 0:
        raise ValueError(f"{num_images} images were promised, {num_images - missing} came")
    features = torch.cat(parts) if parts else torch.empty(0, extractor.dimension)
    assert features.isfinite().all(), "uint8 images cannot give features that are not finite"
    return features
