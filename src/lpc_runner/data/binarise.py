"""Grey images as binary ones, each pixel white with the probability that its level is of 255."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lpc_runner.base.randomness import generator
from lpc_runner.data.dataset import Data, Split

Binarise = Literal["none", "static", "dynamic"]
CHUNK = 1000  # images drawn at once; part of which draw it is, so it is no setting


def binary_draw(grey: Tensor, source: torch.Generator) -> Tensor:
    """uint8 levels (B, ...) to draws of 0 or 255 of the same shape; P(255) = level/255, exact at 0 and 255."""
    uniform = torch.rand(grey.shape, generator=source, device=grey.device)
    return (255 * uniform < grey).to(torch.uint8) * 255


@dataclass(frozen=True)
class Binarisation:
    """How a set of images is binarised: `none`; `static`, drawn once; `dynamic`, drawn anew at every visit in training.

    seed: which static draw. Whatever is measured of a dynamic set is measured on its static draw.
    """

    mode: Binarise = "none"
    seed: int = 0

    def identity(self) -> dict[str, object]:
        """Its part of `Dataset.identity`; of `none`, nothing."""
        return {} if self.mode == "none" else {"binarise": self.mode, "binarise_seed": self.seed}

    def applied(self, data: Data) -> Data:
        """Both splits with values of 0 and 255, the grey images beside them; for `none` the data as they are."""
        if self.mode == "none":
            return data
        train = replace(self._drawn(data.train, "train"), redrawn=self.mode == "dynamic")
        return Data(train, self._drawn(data.test, "test"))

    def _drawn(self, split: Split, name: str) -> Split:
        parts = [
            binary_draw(grey, generator(self.seed, f"binarise/{name}", number))
            for number, grey in enumerate(split.values.split(CHUNK))
        ]
        return replace(split, values=torch.cat(parts), grey=split.values)
