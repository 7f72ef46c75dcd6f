"""The user's own images as files in a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np

from lpc_runner.data.binarise import Binarisation, Binarise
from lpc_runner.data.dataset import Data, Split
from lpc_runner.data.images import ImageDataset, decode_all, hold_out, image_split
from lpc_runner.data.stored import content_hash
from lpc_runner.errors import UserError
from lpc_runner.schema import NonNegativeInt, PositiveInt, checked

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_VERSION = 1  # of decoding, crop, resize and split: raise it when one changes, for runs then see other data


class ImageFolder(ImageDataset):
    """Image files below `path`, cropped to the central square and resized to uint8 (N, channels, size, size).

    Subfolders `train` and `test` are the splits; without `test` a random 10 % is held out, always the same.
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
        """Files of the training split. Raises UserError if there are none."""
        return len(self._splits()[0])

    def identity(self) -> dict[str, object]:
        """How images are decoded and binarised, one SHA-256 over relative names and contents. UserError if none."""
        digest = hashlib.sha256()
        for path in sorted(path for paths in self._splits() for path in paths):
            digest.update(f"{path.relative_to(self._path).as_posix()}\0{content_hash(path)}\n".encode())
        decoded = {"name": self.name, "preprocessing": _VERSION, "shape": list(self.shape)}
        return {**decoded, "files": digest.hexdigest(), **self.binarisation.identity()}

    def prepare(self) -> None:
        """List the files; raise UserError if the folder is missing, empty or has `test` without `train`."""
        self._splits()

    def load(self) -> Data:
        """Decode both splits. Raises UserError naming the first file that cannot be read."""
        train, test = self._splits()
        classes = self._classes([*train, *test])
        return self.binarisation.applied(Data(self._decode(train, classes), self._decode(test, classes)))

    def _splits(self) -> tuple[list[Path], list[Path]]:
        if not self._path.is_dir():
            raise UserError(f"{self._path}: no such folder, expected one with images ({' '.join(SUFFIXES)})")
        has_train, has_test = self._root("train").is_dir(), self._root("test").is_dir()
        if has_test and not has_train:
            raise UserError(f"{self._path}: has a folder test but no folder train beside it")
        if has_train and has_test:
            return _images_in(self._root("train")), _images_in(self._root("test"))
        paths = _images_in(self._root("train") if has_train else self._path)
        train, test = hold_out(self._path, len(paths))
        return [paths[i] for i in train], [paths[i] for i in test]

    def _root(self, split: str) -> Path:
        return self._path / split

    def _class_of(self, path: Path) -> str | None:
        parts = path.relative_to(self._path).parts
        folders = parts[1:-1] if self._root("train").is_dir() else parts[:-1]
        return folders[0] if folders else None

    def _classes(self, paths: list[Path]) -> dict[str, int] | None:
        """Class names in sorted order to labels 0, 1, ...; None if some image lies in no class folder."""
        names = {self._class_of(path) for path in paths}
        return None if None in names else {name: label for label, name in enumerate(sorted(names))}

    def _decode(self, paths: list[Path], classes: dict[str, int] | None) -> Split:
        images = decode_all(self._decode_one, paths, np.empty((len(paths), *self.shape), np.uint8))
        labels = None if classes is None else np.array([classes[self._class_of(path)] for path in paths])
        return image_split(self._path, images, labels)

    def _decode_one(self, path: Path) -> np.ndarray:
        from PIL import Image, ImageOps

        try:
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)
                if image.mode[0] in "IF":  # converting these to 8 bits would clip, not scale, their range
                    raise UserError(f"{path}: pixels of type {image.mode}, expected 8 bits: convert the file first")
                image = image.convert("L" if self._channels == 1 else "RGB")
        except UserError:
            raise
        except Exception as error:  # Pillow's decoders raise almost anything on damaged files
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{path}: not a readable image ({reason}), mend or remove the file") from error
        pixels = np.asarray(square(image, min(image.size), self._size))
        return pixels.reshape(self._size, self._size, -1).transpose(2, 0, 1)


def square(image, crop: int, size: int):
    """The central crop x crop pixels of a PIL image, resized to size x size (antialiased bilinear)."""
    from PIL import Image

    left, top = (image.width - crop) // 2, (image.height - crop) // 2
    cropped = image.crop((left, top, left + crop, top + crop))  # resize(box=...) would blend in what lies outside
    return cropped.resize((size, size), Image.Resampling.BILINEAR)


def _images_in(folder: Path) -> list[Path]:
    visible = (path for path in folder.rglob("*") if not _is_hidden(path.relative_to(folder)))
    paths = sorted(path for path in visible if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise UserError(f"{folder}: holds no image files, expected {' '.join(SUFFIXES)}")
    return paths


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
