"""The user's own images in .npz files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from lpc_runner.base.errors import UserError
from lpc_runner.base.schema import NonNegativeInt, checked
from lpc_runner.data.dataset import Binarisation, Binarise, Data
from lpc_runner.data.files import Header, content_hash, damage_named, file_state, no_npz, npz_header
from lpc_runner.data.images import ImageDataset, check_images, check_labels, hold_out, image_split

_MAKE = "np.savez(path, images=images) with uint8 images (N, C, H, W) makes one"
_SOUND: set[tuple] = set()  # states of files that were read and are sound; each cell of a sweep asks


class Arrays(ImageDataset):
    """Images from .npz files with `images` uint8 (N, C, H, W) and, if wanted, `labels` integers (N,).

    train: one file or several, which are joined in the order given (all of them have labels or none has).
    test: one file; null holds out a random 10 % of train, the same ones in every run whatever its seed.
    """

    name = "arrays"

    @checked
    def __init__(
        self,
        train: str | list[str],
        test: str | None = None,
        binarise: Binarise = "none",
        binarise_seed: NonNegativeInt = 0,
    ) -> None:
        self.binarisation = Binarisation(binarise, binarise_seed)
        names = [train] if isinstance(train, str) else train
        if not names:
            raise UserError("train must name at least one .npz file")
        self._train = [Path(name).expanduser() for name in names]
        self._test = None if test is None else Path(test).expanduser()

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) from the header of the first file. Raises UserError if that file is missing or wrong."""
        return _headers(self._train[0])["images"].shape[1:]

    @property
    def num_train(self) -> int:
        """Images in the training files, less those held out. Raises UserError if a file is missing or wrong."""
        count = sum(_headers(path)["images"].shape[0] for path in self._train)
        return count if self._test is not None else len(hold_out(self._train[0], count)[0])

    def identity(self) -> dict[str, object]:
        """SHA-256 of every file, no paths; rule for the test split; binarisation. UserError if a file is missing."""
        for path in self._files():
            _must_exist(path)
        test = "a tenth of train" if self._test is None else content_hash(self._test)
        train = [content_hash(path) for path in self._train]
        return {"name": self.name, "train": train, "test": test, **self.binarisation.identity()}

    def account(self) -> list[str]:
        """Images of each split and their files, keys that are not read. Raises UserError as `prepare`."""
        train, test = ", ".join(map(str, self._train)), self._test
        images = {path: _headers(path)["images"].shape[0] for path in self._files()}
        num_test = sum(images[path] for path in self._train) - self.num_train if test is None else images[test]
        where = "a tenth held out" if test is None else f"from {test}"
        lines = [f"{train}: {self.num_train:,} images {self.shape} to train on, {num_test:,} to measure on, {where}"]
        for path in dict.fromkeys(self._files()):
            with damage_named(path), zipfile.ZipFile(path) as archive:
                others = {name.removesuffix(".npy") for name in archive.namelist()} - {"images", "labels"}
            if others:
                lines.append(f"{path}: not read: {', '.join(sorted(others))}")
        return lines

    def prepare(self) -> None:
        """Read and check everything once. Raises UserError naming the file at fault."""
        self._check_headers()
        states = tuple(file_state(path) for path in self._files())
        if states not in _SOUND:
            self.load()
            _SOUND.add(states)

    def _check_headers(self) -> None:
        """dtypes, shapes and labels, from the headers. Raises UserError naming the file at fault."""
        headers = {path: _headers(path) for path in self._files()}
        first = self._train[0]
        for path, header in headers.items():
            if header["images"].shape[1:] != headers[first]["images"].shape[1:]:
                raise UserError(
                    f"{path}: images of shape {header['images'].shape[1:]} do not fit those of {first}, "
                    f"{headers[first]['images'].shape[1:]}: all files need one (C, H, W)"
                )
        with_labels = {path: "labels" in headers[path] for path in self._train}
        if len(set(with_labels.values())) > 1:
            path = next(path for path, has in with_labels.items() if not has)
            raise UserError(f"{path}: no key 'labels', other train files have it: give labels to all or none")

    def load(self) -> Data:
        """Read and check all files. Raises UserError naming the file that is damaged or wrong."""
        return self.binarisation.applied(self._grey())

    def _grey(self) -> Data:
        self._check_headers()
        where, parts = self._train[0], [_read(path) for path in self._train]
        train = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        if self._test is not None:
            return Data(image_split(where, **train), image_split(self._test, **_read(self._test)))
        splits = ({key: array[rows] for key, array in train.items()} for rows in hold_out(where, len(train["images"])))
        return Data(*(image_split(where, **split) for split in splits))

    def _files(self) -> list[Path]:
        return self._train if self._test is None else [*self._train, self._test]


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected an .npz: {_MAKE}")


def _headers(path: Path) -> dict[str, Header]:
    """dtype and shape of `images` and, where present, `labels`, checked; the arrays are not read."""
    _must_exist(path)
    if not zipfile.is_zipfile(path):
        if kind := no_npz(path):
            raise UserError(f"{path}: not an .npz file but {kind}")
        raise UserError(f"{path}: not an .npz file or cut short (no zip directory at its end): {_MAKE}")
    with damage_named(path), zipfile.ZipFile(path) as archive:
        keys = [name.removesuffix(".npy") for name in archive.namelist()]
        if "images" not in keys:
            raise UserError(f"{path}: no key 'images', found {', '.join(keys) or 'none'}: {_MAKE}")
        headers = {key: npz_header(archive, key) for key in ("images", "labels") if key in keys}
    check_images(path, headers["images"].dtype, headers["images"].shape)
    if "labels" in headers:
        check_labels(path, headers["labels"].dtype, headers["labels"].shape, headers["images"].shape[0])
    return headers


def _read(path: Path) -> dict[str, np.ndarray]:
    """`images` and, where present, `labels`; reading to the end makes zipfile compare its checksums."""
    with damage_named(path), np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in ("images", "labels") if key in file}
