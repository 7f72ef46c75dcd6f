"""What all image sources share: 8-bit storage, the scale the model sees, one set of checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpc_runner.base.errors import UserError
from lpc_runner.base.tensors import generator
from lpc_runner.data.dataset import Binarisation, Dataset, Split


class ImageDataset(Dataset):
    """Images stored as uint8 (N, C, H, W) and shown to the model as float32 in [-1, 1].

    binarisation: of a set that offers it; its `identity` enters that of the set, `load` returns what it `applied`.
    """

    kind = "images"
    binarisation = Binarisation()

    @property
    def num_levels(self) -> int:
        """2 of binarised images, else 256."""
        return 256 if self.binarisation.mode == "none" else 2

    def to_model(self, values: Tensor) -> Tensor:
        """x = values / 127.5 - 1: uint8 (B, C, H, W) to float32 (B, C, H, W) in [-1, 1]."""
        return values.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """The nearest of the 256 levels: float (B, C, H, W) to uint8 (B, C, H, W).

    Decoder means are unbounded, so x is clamped first: 1.02 would otherwise wrap to level 2.
    """
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def check_images(where: str | Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Raise UserError (one line) unless dtype and shape are those of images: uint8 (N, C, H, W), C 1 or 3."""
    fault = _dtype_fault(dtype) or _layout_fault(shape)
    if fault:
        raise UserError(f"{where}: images must be uint8 (N, C, H, W) with 1 or 3 channels, {fault}")


def _dtype_fault(dtype: np.dtype) -> str:
    if dtype == np.uint8:
        return ""
    if dtype.hasobject:
        return "got an object array (often images of different sizes): resize and stack them into one array"
    if dtype.kind == "b":
        return "got bool: images.astype('uint8') * 255 makes them black and white"
    if dtype.kind == "f":
        return (
            f"got {dtype}: (images * 255).round().astype('uint8') converts values in [0, 1], "
            "images.round().astype('uint8') those in 0..255"
        )
    if dtype == np.uint16:
        return "got uint16: (images / 257).round().astype('uint8') converts values in 0..65535"
    return f"got {dtype}: images.astype('uint8') converts values in 0..255, images.astype('uint8') * 255 zeros and ones"


def _layout_fault(shape: tuple[int, ...]) -> str:
    if len(shape) == 3:
        return f"got shape {shape}: images[:, None] adds the channel axis"
    if len(shape) != 4:
        return f"got shape {shape}"
    if 0 in shape:
        return f"got shape {shape}, which holds no pixels"
    if shape[1] not in (1, 3):
        last = ", channels last: images.transpose(0, 3, 1, 2) puts them second" if shape[3] in (1, 3) else ""
        return f"got shape {shape}{last}"
    return ""


def check_labels(where: str | Path, dtype: np.dtype, shape: tuple[int, ...], count: int) -> None:
    """Raise UserError (one line) unless dtype and shape are those of one integer label per image."""
    if dtype.kind not in "iu" or shape != (count,):
        raise UserError(f"{where}: labels must be integers of shape ({count},), got {dtype} of shape {shape}")


def image_split(where: str | Path, images: np.ndarray, labels: np.ndarray | None = None) -> Split:
    """Checked arrays as a split: images uint8 (N, C, H, W), labels integers (N,); UserError names `where`."""
    check_images(where, images.dtype, images.shape)
    if (largest := int(images.max())) <= 1:  # looks black: booleans, or a failed conversion
        scaled = "" if largest == 0 else ": images of zeros and ones must be multiplied by 255"
        raise UserError(f"{where}: the largest level of all images is {largest}, of 255{scaled}")
    values = torch.from_numpy(np.ascontiguousarray(images))
    if labels is None:
        return Split(values)
    check_labels(where, labels.dtype, labels.shape, len(images))
    return Split(values, torch.from_numpy(labels.astype(np.int64)))


def hold_out(where: str | Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ascending indices (train, test) of a random 90/10 split that depends on `count`, on no run's seed."""
    if count < 2:
        raise UserError(f"{where}: {count} image cannot be split into train and test, at least 2 are needed")
    order = torch.randperm(count, generator=generator(0, "held-out test split", count)).numpy()
    num_test = max(1, count // 10)
    return np.sort(order[num_test:]), np.sort(order[:num_test])


def decode_all(decode: Callable[[Any], np.ndarray], items: Iterable[Any], out: np.ndarray) -> np.ndarray:
    """Fill and return out: out[i] = decode(items[i]), in threads: decoders release the interpreter lock."""
    with ThreadPoolExecutor() as pool:
        for row, image in zip(out, pool.map(decode, items), strict=True):
            row[...] = image
    return out


def square(image: Any, crop: int, size: int) -> Any:
    """The central crop x crop pixels of a PIL image, resized to size x size (antialiased bilinear)."""
    from PIL import Image

    left, top = (image.width - crop) // 2, (image.height - crop) // 2
    cropped = image.crop((left, top, left + crop, top + crop))  # resize(box=...) would blend in what lies outside
    return cropped.resize((size, size), Image.Resampling.BILINEAR)
