"""How sharp samples are, from their grids: Fig. 5A and 9 as a number."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lpc_runner.report.study import Run

GAP = 2  # white pixels around every image of a grid
ENLARGED = 96  # small images are enlarged by whole pixels to about this side


def sharpness(run: Run) -> float | None:
    """Gradient energy of a run's final samples in multiples of its data's.

    Gradient energy: the mean over images, channels and pixels of (∂x/∂i)² + (∂x/∂j)², differences between neighbours
    within an image, in samples/final.png and samples/data.png. 1: as much detail as the data; below: blurred; noise
    counts as detail. None where a grid or the images' shape is missing, a grid is damaged, or the data are flat.
    """
    final, data = (_grid_energy(run.path / "samples" / name, run.shape) for name in ("final.png", "data.png"))
    return None if final is None or not data else final / data


def gradient_energy(images: np.ndarray) -> float:
    """Mean squared difference between vertical and between horizontal neighbours, added; images (N, H, W, C)."""
    return float(np.mean(np.diff(images, axis=1) ** 2) + np.mean(np.diff(images, axis=2) ** 2))


def _grid_energy(path: Path, shape: tuple[int, ...]) -> float | None:
    import matplotlib.image

    if len(shape) != 3 or min(shape[1:]) < 2:
        return None
    try:
        picture = matplotlib.image.imread(path)
    except (OSError, ValueError, SyntaxError):
        return None
    images = cut(np.asarray(picture, dtype=np.float64), *shape[1:])
    return None if images is None else gradient_energy(images)


def cut(picture: np.ndarray, height: int, width: int) -> np.ndarray | None:
    """The images (N, height, width, C) of a grid (rows, columns, C), at their own size; None where they do not fit."""
    picture = picture[..., None] if picture.ndim == 2 else picture[..., :3]
    side = max(1, round(ENLARGED / width))
    picture = picture[::side, ::side]
    rows, columns = ((size - GAP) // (own + GAP) for size, own in zip(picture.shape, (height, width)))
    expected = (rows * (height + GAP) + GAP, columns * (width + GAP) + GAP)
    if picture.shape[:2] != expected or not rows * columns:
        return None
    corners = [(GAP + i * (height + GAP), GAP + j * (width + GAP)) for i in range(rows) for j in range(columns)]
    images = [picture[top : top + height, left : left + width] for top, left in corners]
    images = [image for image in images if image.min() < picture.max()]  # the last row ends with empty places
    return np.stack(images) if images else None
