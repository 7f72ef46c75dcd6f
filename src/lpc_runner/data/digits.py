"""The digits that come with this package: the dataset that needs no download.

digits.npz: images (1797, 8, 8), 0 to 16, and labels, as scikit-learn has them: the test set of Optdigits (E. Alpaydin,
C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, doi 10.24432/C50P49, CC BY 4.0).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lpc_runner.base.schema import NonNegativeInt, checked
from lpc_runner.base.tensors import generator
from lpc_runner.data.dataset import Binarisation, Binarise, Data
from lpc_runner.data.images import ImageDataset, image_split

_VERSION = 1  # of resizing and split: raise it when either changes, for runs then see other data
_NUM_TEST = 360


class Digits(ImageDataset):
    """1,797 handwritten digits (UCI Optdigits), uint8 (N, 1, 28, 28): 1,437 train, 360 test, stratified."""

    name = "digits"

    @checked
    def __init__(self, binarise: Binarise = "none", binarise_seed: NonNegativeInt = 0) -> None:
        self.binarisation = Binarisation(binarise, binarise_seed)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(1, 28, 28)."""
        return (1, 28, 28)

    @property
    def num_train(self) -> int:
        """1,437."""
        return 1437

    def identity(self) -> dict[str, object]:
        """Name, version of resizing and split, binarisation."""
        return {"name": self.name, "preprocessing": _VERSION, **self.binarisation.identity()}

    def prepare(self) -> None:
        """Nothing to do: the images lie beside this module."""

    def load(self) -> Data:
        """Both splits with labels 0..9, resized from 8x8 by `enlarge`."""
        with np.load(Path(__file__).with_name("digits.npz")) as file:
            images, labels = enlarge(file["images"]), file["labels"].astype(np.int64)
        train, test = stratified_split(labels)
        data = Data(
            train=image_split("digits", images[train], labels[train]),
            test=image_split("digits", images[test], labels[test]),
        )
        return self.binarisation.applied(data)


def enlarge(images: np.ndarray) -> np.ndarray:
    """Values 0..16 (N, 8, 8) to uint8 (N, 1, 28, 28): one black pixel around, then bicubic, 10x10 to 28x28.

    The border lets strokes that touch the frame fade out. Pillow resizes 8-bit images in integer arithmetic,
    so the bytes are the same on every processor.
    """
    from PIL import Image

    levels = np.pad((images * 255.0 / 16).round().astype(np.uint8), ((0, 0), (1, 1), (1, 1)))

    # Images so small take longer to hand to threads than to resize.
    resized = (Image.fromarray(image).resize((28, 28), Image.Resampling.BICUBIC) for image in levels)
    return np.stack([np.asarray(image) for image in resized])[:, None]


def stratified_split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending indices (train, test): each class gives its share of the 360 test images, to within one."""
    counts = np.bincount(labels)
    shares = counts * _NUM_TEST / len(labels)
    quota = np.floor(shares).astype(int)
    largest_remainders = np.argsort(quota - shares, kind="stable")[: _NUM_TEST - quota.sum()]
    quota[largest_remainders] += 1
    chosen = []
    for label, num_test in enumerate(quota):
        members = np.flatnonzero(labels == label)
        order = torch.randperm(len(members), generator=generator(0, "digits test split", label)).numpy()
        chosen.append(members[order[:num_test]])
    test = np.sort(np.concatenate(chosen))
    return np.setdiff1d(np.arange(len(labels)), test), test
