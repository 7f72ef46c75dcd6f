"""The user's own images as files in a folder."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lpc_runner.base.errors import UserError
from lpc_runner.base.schema import NonNegativeInt, PositiveInt, checked
from lpc_runner.data.dataset import Binarisation, Binarise, Data, Split
from lpc_runner.data.files import content_hash
from lpc_runner.data.image_files import (
    SUFFIXES,
    Found,
    counted,
    find_images,
    reason,
    refuse_deeper_splits,
    require_content,
    require_headers,
    require_pixels,
    shown,
    split_folders,
)
from lpc_runner.data.images import ImageDataset, decode_all, hold_out, image_split

_VERSION = 1  # of decoding, crop, resize and split: raise it when one changes, for runs then see other data


@dataclass(frozen=True)
class Listing:
    """Files of both splits, the folders they come from (test: None where a tenth of train is held out)."""

    train: list[Path]
    test: list[Path]
    folders: tuple[str | None, str | None]
    passed_over: Counter[str]
    num_animated: int


class ImageFolder(ImageDataset):
    """Image files below `path`, cropped to the central square and resized to uint8 (N, channels, size, size).

    Subfolders `train` and `test` are the splits, also under their other usual names (training, testing, Train) and
    with `val` in the place of a missing `test`; without either a random 10 % is held out, always the same.
    The first subfolder below that is an image's class; labels exist only if every image lies in one.
    Decoding: camera orientation applied, transparency dropped, antialiased bilinear resize (also enlarges).
    """

    name = "image_folder"

    @checked
    def __init__(
        self,
        path: str,
        image_size: PositiveInt,
        channels: Literal[1, 3],
        binarise: Binarise = "none",
        binarise_seed: NonNegativeInt = 0,
    ) -> None:
        self.binarisation = Binarisation(binarise, binarise_seed)
        self._path = Path(path).expanduser()
        self._size = image_size
        self._channels = channels

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, image_size, image_size)."""
        return (self._channels, self._size, self._size)

    @property
    def num_train(self) -> int:
        """Files of the training split. Raises UserError if there are none, or some have no content."""
        return len(self._listing.train)

    def identity(self) -> dict[str, object]:
        """How images are decoded and binarised, one SHA-256 over relative names and contents. UserError if none."""
        digest = hashlib.sha256()
        for path in sorted([*self._listing.train, *self._listing.test]):
            name = path.relative_to(self._path).as_posix().encode("utf-8", "surrogateescape")
            digest.update(name + f"\0{content_hash(path)}\n".encode())
        shape, (train, test) = list(self.shape), self._listing.folders
        facts: dict[str, object] = {
            "name": self.name,
            "preprocessing": _VERSION,
            "shape": shape,
            "files": digest.hexdigest(),
        }
        facts |= self.binarisation.identity()
        # Without it, a run from when such folders were classes, trained on both, would be taken for this one.
        return facts if test is None or (train, test) == ("train", "test") else facts | {"splits": [train, test]}

    def account(self) -> list[str]:
        """Images of each split and where from, classes, files passed over by reason. Raises UserError as num_train."""
        listing, where = self._listing, shown(self._path)
        train, test = listing.folders
        from_train = f" from {shown(train)}" if train else ""
        from_test = f" from {shown(test)}" if test else ", a tenth held out"
        classes = self._classes([*listing.train, *listing.test])
        kinds = f"{len(classes):,} classes" if classes else "no class folders"
        lines = [
            f"{where}: {len(listing.train):,} images to train on{from_train}, {len(listing.test):,} to measure on"
            f"{from_test}; {kinds}"
        ]
        if listing.passed_over:
            lines.append(f"{where}: passed over: {counted(listing.passed_over)}")
        if listing.num_animated:
            lines.append(f"{where}: of {listing.num_animated:,} files with several frames, the first is taken")
        trained = {content_hash(path) for path in listing.train}
        if twice := sum(content_hash(path) in trained for path in listing.test):
            lines.append(f"{where}: {twice:,} of the images to measure on are, byte for byte, among those to train on")
        return lines

    def prepare(self) -> None:
        """Decode every file once. Raises UserError: what is missing, which files cannot be read, or all are black."""
        if require_pixels([*self._listing.train, *self._listing.test]) <= 1:
            self.load()

    def load(self) -> Data:
        """Decode both splits. Raises UserError naming the first file that cannot be read."""
        train, test = self._listing.train, self._listing.test
        classes = self._classes([*train, *test])
        return self.binarisation.applied(Data(self._decode(train, classes), self._decode(test, classes)))

    @functools.cached_property
    def _listing(self) -> Listing:
        if not self._path.is_dir():
            raise UserError(_no_folder(self._path))
        found = find_images(self._path)
        require_content(self._path, found)
        listing = self._in_splits(found)
        animated = require_headers(sorted([*listing.train, *listing.test]))
        return Listing(listing.train, listing.test, listing.folders, listing.passed_over, animated)

    def _in_splits(self, found: Found) -> Listing:
        """Every image is of one split or counted as passed over. Raises UserError if the splits are not clear."""
        top = lambda path: path.relative_to(self._path).parts[0]
        names = {top(path) for path in found.images if path.parent != self._path}
        try:
            roles = split_folders(sorted(names))
            if "train" not in roles:
                if "test" in roles or (roles and len(roles) == len(names)):
                    only = roles["test" if "test" in roles else "valid"]
                    raise UserError(
                        f"has a folder {shown(only)} but no folder train beside it (to train on its images: "
                        f"dataset.path={shown(self._path / only)})"
                    )
                refuse_deeper_splits(self._path, found.images)
        except UserError as error:
            raise UserError(f"{shown(self._path)}: {error}") from None
        train, test = roles.get("train"), roles.get("test", roles.get("valid"))
        if train is None:
            return self._held_out(found.images, None, found.passed_over)
        parts: dict[str, list[Path]] = {name: [] for name in (train, test) if name}
        passed_over = Counter(found.passed_over)
        for path in found.images:
            name = "" if path.parent == self._path else top(path)
            if name in parts:
                parts[name].append(path)
            else:
                passed_over[f"images in {shown(name)}" if name else f"images beside {shown(train)}"] += 1
        if test is None:
            return self._held_out(parts[train], train, passed_over)
        return Listing(parts[train], parts[test], (train, test), passed_over, 0)

    def _held_out(self, paths: list[Path], folder: str | None, passed_over: Counter[str]) -> Listing:
        train, test = hold_out(self._path, len(paths))
        return Listing([paths[i] for i in train], [paths[i] for i in test], (folder, None), passed_over, 0)

    def _class_of(self, path: Path) -> str | None:
        parts = path.relative_to(self._path).parts
        folders = parts[1:-1] if self._listing.folders[0] else parts[:-1]
        return folders[0] if folders else None

    def _classes(self, paths: list[Path]) -> dict[str | None, int] | None:
        """Class names in sorted order to labels 0, 1, ...; None if some image lies in no class folder."""
        names = {self._class_of(path) for path in paths}
        named = sorted(name for name in names if name is not None)
        return None if len(named) < len(names) else {name: label for label, name in enumerate(named)}

    def _decode(self, paths: list[Path], classes: dict[str | None, int] | None) -> Split:
        images = decode_all(self._decode_one, paths, np.empty((len(paths), *self.shape), np.uint8))
        labels = None if classes is None else np.array([classes[self._class_of(path)] for path in paths])
        return image_split(self._path, images, labels)

    def _decode_one(self, path: Path) -> np.ndarray:
        from PIL import Image, ImageOps

        try:
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)
                image = image.convert("L" if self._channels == 1 else "RGB")
        except Exception as error:  # Pillow's decoders raise almost anything on damaged files
            raise UserError(f"{shown(path)}: not a readable image ({reason(error)}), mend or remove it") from error
        pixels = np.asarray(square(image, min(image.size), self._size))
        return pixels.reshape(self._size, self._size, -1).transpose(2, 0, 1)


def square(image, crop: int, size: int):
    """The central crop x crop pixels of a PIL image, resized to size x size (antialiased bilinear)."""
    from PIL import Image

    left, top = (image.width - crop) // 2, (image.height - crop) // 2
    cropped = image.crop((left, top, left + crop, top + crop))  # resize(box=...) would blend in what lies outside
    return cropped.resize((size, size), Image.Resampling.BILINEAR)


def _no_folder(path: Path) -> str:
    if path.is_file():
        return f"{shown(path)}: a file, expected a folder with images (unpack an archive first)"
    pointer = path.with_name(f"{path.name}.dvc")
    hint = "; dvc pull fetches it" if pointer.exists() else ""
    return f"{shown(path)}: no such folder, expected one with images ({' '.join(SUFFIXES)}){hint}"
