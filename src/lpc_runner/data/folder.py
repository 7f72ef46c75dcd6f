"""The user's own images as files in a folder: which files are images or passed over, which folders are splits."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from lpc_runner.base.errors import UserError, one_line
from lpc_runner.base.schema import NonNegativeInt, PositiveInt, checked
from lpc_runner.data.dataset import Binarisation, Binarise, Data, Split
from lpc_runner.data.files import content_hash, once_per_state
from lpc_runner.data.images import ImageDataset, decode_all, hold_out, image_split, square

_T = TypeVar("_T")

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_ROLES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "valid": ("val", "valid", "validation", "eval", "dev"),
}
_ROLE_OF = {word: role for role, words in _ROLES.items() for word in words}
# What git-lfs and git-annex leave in place of a file; the last where symbolic links became text.
_POINTERS = (b"version https://git-lfs", b"/annex/objects/", b".git/annex/objects/")
_FETCH = "git lfs pull, git annex get, datalad get or dvc pull fetches it"


def find_images(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Image files below `folder`, sorted, links followed; how many others there are, by reason.

    Raises UserError if a folder cannot be listed, files are only named in it, their content not being there, or none is
    an image.
    """
    images: list[Path] = []
    missing: list[Path] = []
    passed_over: Counter[str] = Counter()

    def walk(folder: Path, above: frozenset[tuple[int, int]]) -> None:
        try:
            state, entries = folder.stat(), sorted(folder.iterdir())
        except OSError as error:
            raise UserError(f"{shown(folder)}: cannot be listed ({error.strerror})") from error
        if (place := (state.st_dev, state.st_ino)) in above:
            passed_over["link to a folder above it"] += 1
            return
        for path in entries:
            suffix = path.suffix.lower()
            if suffix == ".icloud":  # a hidden placeholder of a file in the cloud
                missing.append(path)
            elif path.name.startswith(".") or path.name == "__MACOSX":
                passed_over["hidden"] += 1
            elif path.is_dir():
                walk(path, above | {place})
            elif suffix == ".dvc":
                if not path.with_suffix("").exists():
                    missing.append(path.with_suffix(""))
            elif not path.exists() and (suffix in SUFFIXES or not suffix):  # a dangling link, of a file or a folder
                missing.append(path)
            elif suffix in SUFFIXES and path.is_file():
                (missing if _is_pointer(path) else images).append(path)
            else:
                passed_over[suffix or "without a suffix"] += 1

    walk(folder, frozenset())
    if missing:
        raise UserError(
            f"{shown(folder)}: the content of {len(missing):,} of {len(missing) + len(images):,} files is not there "
            f"(dangling links, pointers), such as {shown(missing[0].relative_to(folder))}: {_FETCH}; or remove them"
        )
    if not images:
        others = f", found {counted(passed_over)}" if passed_over else ""
        raise UserError(f"{shown(folder)}: holds no image files{others}, expected {' '.join(SUFFIXES)}")
    return sorted(images), passed_over


@once_per_state
def _is_pointer(path: Path) -> bool:
    if path.stat().st_size > 1024:
        return False
    content = path.read_bytes()
    return content.startswith(_POINTERS[:2]) or _POINTERS[2] in content


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The PIL image in a file. Raises UserError naming the file where it, or what is done with it, fails."""
    from PIL import Image

    try:
        if not path.stat().st_size:
            raise UserError(f"{shown(path)}: empty, mend or remove it")
        with Image.open(path) as image:
            yield image
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise UserError(f"{shown(path)}: not a readable image ({one_line(error)}), mend or remove it") from error


@once_per_state
def _has_frames(path: Path) -> bool:
    """Whether an image file has several frames, from its header."""
    with _opened(path) as image:
        if image.mode[0] in "IF":  # converting these to 8 bits would clip, not scale, their range
            raise UserError(
                f"{shown(path)}: pixels of type {image.mode}, expected 8 bits: convert the file, mend or remove it"
            )
        # A photograph's second frame (MPO) is its preview or the other eye's.
        return image.format != "MPO" and getattr(image, "is_animated", False)


@once_per_state
def _largest_level(path: Path) -> int:
    """About the largest grey level of an image file; it is read to its end."""
    with _opened(path) as image:
        image.draft("L", (64, 64))  # of a JPEG, all of it is read and little of it computed
        return int(np.asarray(image.convert("L")).max())


def _of_each(question: Callable[[Path], _T], paths: list[Path]) -> list[_T]:
    """What `question` says of every file. Raises its first UserError, with the number of others."""
    from PIL import Image

    Image.init()  # formats register themselves once, and not while threads ask for them
    faults: list[UserError] = []

    def answer(path: Path) -> Any:
        try:
            return question(path)
        except UserError as error:
            faults.append(error)

    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(answer, paths))
    if faults:
        others = f", and {len(faults) - 1:,} more like it" if len(faults) > 1 else ""
        raise UserError(f"{min(map(str, faults))}{others}")
    return answers


def split_folders(names: Iterable[str]) -> dict[str, str]:
    """Which of these folders is `train`, which `test`, which `valid`, by the usual names in any case.

    Longer names, such as test_images or trainA, count only where both a training and another split are named. Raises
    UserError if two folders would be the same split.
    """
    names = sorted(names)
    role_of = {name: role for name in names if (role := _ROLE_OF.get(name.casefold()))}
    longer = {name: role for name in names if (role := _role_within(name))}
    if "train" in longer.values() and set(longer.values()) != {"train"}:
        role_of |= {name: role for name, role in longer.items() if role not in role_of.values()}
    roles: dict[str, str] = {}
    for name, role in role_of.items():
        if role in roles:
            raise UserError(f"folders {shown(roles[role])} and {shown(name)} both look like the split {role}: keep one")
        roles[role] = name
    return roles


def _role_within(name: str) -> str | None:
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).casefold())
    words = [re.sub(r"(set|data|images|imgs?|split)$", "", word) for word in words]
    roles = {_ROLE_OF[word] for word in words if word in _ROLE_OF}
    return roles.pop() if len(roles) == 1 else None


def refuse_deeper_splits(folder: Path, images: list[Path]) -> None:
    """Raise UserError if train and test lie below the first level: as classes, both would be trained on."""
    children: dict[Path, set[str]] = {}
    for parent in {parent for path in images for parent in path.parents if parent.is_relative_to(folder)} - {folder}:
        children.setdefault(parent.parent, set()).add(parent.name)
    splits_in = {parent: split_folders(names) for parent, names in children.items() if parent != folder}
    parents = sorted(parent for parent, roles in splits_in.items() if "train" in roles and len(roles) > 1)
    if parents:
        roles = splits_in[parents[0]]
        names = " and ".join(shown(roles[role]) for role in _ROLES if role in roles)
        remedy = (
            f"dataset.path={shown(parents[0])}" if len(parents) == 1 else "put them at the first level, classes below"
        )
        raise UserError(f"has {names} in {shown(parents[0].relative_to(folder))}, not at the first level: {remedy}")


def counted(counts: Counter[str]) -> str:
    """'3 .heic, 1 hidden', the most frequent first."""
    return ", ".join(f"{count:,} {what}" for what, count in counts.most_common())


def shown(name: str | Path) -> str:
    """A name that can be printed: bytes that are no UTF-8, as in names of an old encoding, become \\x escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


_VERSION = 1  # of decoding, crop, resize and split: raise it when one changes, for runs then see other data


@dataclass(frozen=True)
class Listing:
    """Files of both splits, the folders they come from (test: None where a tenth of train is held out)."""

    train: list[Path]
    test: list[Path]
    folders: tuple[str | None, str | None]
    passed_over: Counter[str]
    num_animated: int

    @property
    def files(self) -> list[Path]:
        return [*self.train, *self.test]


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
        for path in sorted(self._listing.files):
            name = path.relative_to(self._path).as_posix().encode("utf-8", "surrogateescape")
            digest.update(name + f"\0{content_hash(path)}\n".encode())
        train, test = self._listing.folders
        facts: dict[str, object] = {"name": self.name, "preprocessing": _VERSION, "shape": list(self.shape)}
        facts |= {"files": digest.hexdigest()} | self.binarisation.identity()
        # Without it, a run from when such folders were classes, trained on both, would be taken for this one.
        return facts if test is None or (train, test) == ("train", "test") else facts | {"splits": [train, test]}

    def account(self) -> list[str]:
        """Images of each split and where from, classes, files passed over by reason. Raises UserError as num_train."""
        listing, where = self._listing, shown(self._path)
        train, test = listing.folders
        from_train = f" from {shown(train)}" if train else ""
        from_test = f" from {shown(test)}" if test else ", a tenth held out"
        labels = self._labels()
        kinds = f"{len(set(labels.values())):,} classes" if labels else "no class folders"
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
        if max(_of_each(_largest_level, self._listing.files)) <= 1:
            self.load()

    def load(self) -> Data:
        """Decode both splits. Raises UserError naming the first file that cannot be read."""
        labels = self._labels()
        return self.binarisation.applied(
            Data(self._decoded(self._listing.train, labels), self._decoded(self._listing.test, labels))
        )

    @cached_property
    def _listing(self) -> Listing:
        if not self._path.is_dir():
            raise UserError(_no_folder(self._path))
        images, passed_over = find_images(self._path)
        folder_of = {
            path: path.relative_to(self._path).parts[0] if path.parent != self._path else "" for path in images
        }
        train, test = self._splits(images, {*folder_of.values()} - {""})
        files = images
        if train is not None:
            files = [path for path in images if folder_of[path] == train]
            others = [folder_of[path] for path in images if folder_of[path] not in (train, test)]
            passed_over += Counter(
                f"images in {shown(name)}" if name else f"images beside {shown(train)}" for name in others
            )
        if test is not None:
            splits = [files, [path for path in images if folder_of[path] == test]]
        else:
            splits = [[files[i] for i in rows] for rows in hold_out(self._path, len(files))]
        num_animated = sum(_of_each(_has_frames, [*splits[0], *splits[1]]))
        return Listing(splits[0], splits[1], (train, test), passed_over, num_animated)

    def _splits(self, images: list[Path], names: set[str]) -> tuple[str | None, str | None]:
        """The folders to train and to measure on, None for all that is left. Raises UserError if they are not clear."""
        try:
            roles = split_folders(names)
            if "train" not in roles:
                if "test" in roles or (roles and len(roles) == len(names)):
                    only = roles["test" if "test" in roles else "valid"]
                    raise UserError(
                        f"has a folder {shown(only)} but no folder train beside it (to train on its images: "
                        f"dataset.path={shown(self._path / only)})"
                    )
                refuse_deeper_splits(self._path, images)
                return None, None
        except UserError as error:
            raise UserError(f"{shown(self._path)}: {error}") from None
        return roles["train"], roles.get("test", roles.get("valid"))

    def _labels(self) -> dict[Path, int] | None:
        """Of every file the number of its class folder, sorted by name; None if some image lies in no class folder."""
        depth = 0 if self._listing.folders[0] is None else 1
        folders = {path: path.relative_to(self._path).parts[depth:-1] for path in self._listing.files}
        if not all(folders.values()):
            return None
        number = {name: label for label, name in enumerate(sorted({parts[0] for parts in folders.values()}))}
        return {path: number[parts[0]] for path, parts in folders.items()}

    def _decoded(self, paths: list[Path], labels: dict[Path, int] | None) -> Split:
        images = decode_all(self._decode, paths, np.empty((len(paths), *self.shape), np.uint8))
        return image_split(self._path, images, None if labels is None else np.array([labels[path] for path in paths]))

    def _decode(self, path: Path) -> np.ndarray:
        from PIL import ImageOps

        with _opened(path) as file:
            image = ImageOps.exif_transpose(file).convert("L" if self._channels == 1 else "RGB")
        pixels = np.asarray(square(image, min(image.size), self._size))
        return pixels.reshape(self._size, self._size, -1).transpose(2, 0, 1)


def _no_folder(path: Path) -> str:
    if path.is_file():
        return f"{shown(path)}: a file, expected a folder with images (unpack an archive first)"
    pointer = path.with_name(f"{path.name}.dvc")
    hint = "; dvc pull fetches it" if pointer.exists() else ""
    return f"{shown(path)}: no such folder, expected one with images ({' '.join(SUFFIXES)}){hint}"
