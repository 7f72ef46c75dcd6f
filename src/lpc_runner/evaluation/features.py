"""Images to feature vectors; every number about samples is computed from these."""

from __future__ import annotations

import hashlib
import http.client
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lpc_runner.base.errors import UserError
from lpc_runner.base.files import sha256_of, write_atomically
from lpc_runner.base.tensors import exact_arithmetic, hash_of_tensors, he_uniform, to_unit


class Extractor(ABC):
    """Features of images. name: how a user chooses it. fingerprint: SHA-256 of its weights, once it is prepared."""

    name: ClassVar[str]
    dimension: ClassVar[int]
    fingerprint = ""

    @abstractmethod
    def prepare(self) -> None:
        """What comes before the first call, and before any training. Raises UserError if something is missing."""

    def facts(self) -> dict[str, object]:
        """What to write beside its numbers."""
        return {"extractor": self.name, "extractor_hash": self.fingerprint}

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) to float32 (B, dimension) on the extractor's device."""


class RandomConv(Extractor):
    """Three blocks of 3x3 convolution, ReLU and 2x2 averaging, random but fixed; mean over positions: 64-d.

    Needs no download and no labels. Blur, noise and noise with the images' own moments raise its Fréchet
    distance and lower density and coverage, as they should; the scale means nothing outside this package.
    """

    name = "random_conv"
    dimension = 64
    MIN_SIZE = 8  # pixels a side: each of the three blocks halves it

    def __init__(self, num_channels: int, device: torch.device | str = "cpu") -> None:
        widths = (num_channels, 16, 32, self.dimension)
        weights = {f"conv{i}": he_uniform((widths[i + 1], widths[i], 3, 3), f"random_conv/{i}") for i in range(3)}
        self.fingerprint = hash_of_tensors(weights)
        self._weights, self._device = [weight.to(device) for weight in weights.values()], device

    def prepare(self) -> None:
        """Nothing can be missing."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        with exact_arithmetic():
            hidden = to_unit(images, self._device)
            for weight in self._weights:
                hidden = functional.avg_pool2d(functional.conv2d(hidden, weight, padding=1).relu(), 2)
            return hidden.mean((2, 3))


class Pretrained(Extractor):
    """A network with published weights, known by the beginning of their file's SHA-256."""

    HASH: ClassVar[str]
    WEIGHTS: ClassVar[str]  # what the file holds, in words
    REMEDY: ClassVar[str] = ""  # where it holds something else

    def __init__(self, num_channels: int, device: torch.device | str) -> None:
        self._num_channels, self._device = num_channels, device
        self._network: nn.Module | None = None

    def to_fetch(self) -> str | None:
        """What `prepare` would download, and where to; None if nothing."""
        return None

    def prepare(self) -> None:
        """Find or fetch the weights and build the network; UserError (one line) when there is no way to."""
        if self._num_channels not in (1, 3):
            raise UserError(
                f"metrics.extractor={self.name} takes images of 1 or 3 channels, the dataset has {self._num_channels}; "
                "use metrics.extractor=random_conv"
            )
        path = self._file()
        self.fingerprint = sha256_of(path)
        if not self.fingerprint.startswith(self.HASH):
            raise UserError(
                f"{path} does not hold {self.WEIGHTS} "
                f"(SHA-256 {self.fingerprint[:8]}..., expected {self.HASH[:8]}...){self.REMEDY}"
            )
        self._network = self._built(path).to(self._device)

    @abstractmethod
    def _file(self) -> Path:
        """Where the weights are."""

    @abstractmethod
    def _built(self, path: Path) -> nn.Module:
        """The network with these weights."""


INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


class Inception(Pretrained):
    """The 2048-d pool features of the 2015 Inception network, as converted from TensorFlow by torch-fidelity:
    FID's own.

    Only weights whose SHA-256 begins 6726825d are accepted; anything else would not be FID, and
    torch-fidelity itself does not look. weights: their file, or None for the published file in `cache_dir`,
    fetched there if it can be.
    """

    name = "inception"
    dimension = 2048
    HASH = "6726825d"
    WEIGHTS = "the Inception weights that define FID"
    GIVE = f"fetch {INCEPTION_URL} and give its path: metrics.weights=PATH"
    REMEDY = f"; remove it, {GIVE}"

    def __init__(
        self, num_channels: int, cache_dir: Path, weights: str | None, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(num_channels, device)
        self._path = Path(cache_dir) / INCEPTION_FILE if weights is None else Path(weights)
        self._may_fetch = weights is None

    def to_fetch(self) -> str | None:
        missing = self._may_fetch and not self._path.is_file()
        return f"Inception's weights into {self._path.parent}" if missing else None

    def _file(self) -> Path:
        if not self._path.is_file():
            if not self._may_fetch:
                raise UserError(f"no Inception weights at {self._path}; {self.GIVE}")
            self._fetch()
        return self._path

    def _built(self, path: Path) -> nn.Module:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # torch-fidelity unpickles the file without a guard, so hold it to be plain tensors first.
        torch.load(path, map_location="cpu", weights_only=True)
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Of 1 or 3 channels; the network itself resizes to 299 pixels as TensorFlow 1 did."""
        assert self._network is not None, "prepare() comes first"
        with exact_arithmetic():
            (features,) = self._network(images.to(self._device).expand(-1, 3, -1, -1))
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
        if not hashlib.sha256(content).hexdigest().startswith(self.HASH):
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
    shape: tuple[int, ...],
) -> Tensor:
    """Features (num_images, d) float32, on the extractor's device, of the first num_images of `images`, each (C, H, W)
    as `shape` says."""
    parts, missing = [], num_images
    for chunk in images:
        if chunk.dtype != torch.uint8 or chunk.shape[1:] != shape:
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
