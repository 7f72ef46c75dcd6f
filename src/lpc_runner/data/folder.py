"""The user's own images as files in a folder: which files are images or passed over, which folders are splits."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from lpc_runner.base.errors import UserError
from lpc_runner.base.schema import NonNegativeInt, PositiveInt, checked
from lpc_runner.data.dataset import Binarisation, Binarise, Data, Split
from lpc_runner.data.files import content_hash, file_state
from lpc_runner.data.images import ImageDataset, decode_all, hold_out, image_split

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


@dataclass
class FolderContent:
    """What lies below a folder: image files, sorted; files whose content is elsewhere; others counted by reason."""

    images: list[Path] = field(default_factory=list)
    missing: list[Path] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)


def find_images(folder: Path) -> FolderContent:
    """Everything below `folder`, links followed. Raises UserError if a folder cannot be listed."""
    content = FolderContent()
    _walk(folder, frozenset(), content)
    content.images.sort()
    return content


def _walk(folder: Path, above: frozenset[tuple[int, int]], content: FolderContent) -> None:
    try:
        state, entries = folder.stat(), sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{shown(folder)}: cannot be listed ({error.strerror})") from error
    if (place := (state.st_dev, state.st_ino)) in above:
        content.passed_over["link to a folder above it"] += 1
        return
    for path in entries:
        suffix = path.suffix.lower()
        if suffix == ".icloud":  # a hidden placeholder of a file in the cloud
            content.missing.append(path)
        elif path.name.startswith(".") or path.name == "__MACOSX":
            content.passed_over["hidden"] += 1
        elif path.is_dir():
            _walk(path, above | {place}, content)
        elif suffix == ".dvc":
            if not path.with_suffix("").exists():
                content.missing.append(path.with_suffix(""))
        elif not path.exists() and (suffix in SUFFIXES or not suffix):  # a dangling link, of a file or a folder
            content.missing.append(path)
        elif suffix in SUFFIXES and path.is_file():
            (content.missing if _is_pointer(*file_state(path)) else content.images).append(path)
        else:
            content.passed_over[suffix or "without a suffix"] += 1


@functools.cache
def _is_pointer(path: Path, size: int, modified: int) -> bool:
    if size > 1024:
        return False
    content = path.read_bytes()
    return content.startswith(_POINTERS[:2]) or _POINTERS[2] in content


def require_content(folder: Path, content: FolderContent) -> None:
    """Raise UserError if files are only named in the folder, their content not being there, or none is an image."""
    if content.missing:
        count, total = len(content.missing), len(content.missing) + len(content.images)
        raise UserError(
            f"{shown(folder)}: the content of {count:,} of {total:,} files is not there (dangling links, pointers), "
            f"such as {shown(content.missing[0].relative_to(folder))}: {_FETCH}; or remove them"
        )
    if not content.images:
        others = f", found {counted(content.passed_over)}" if content.passed_over else ""
        raise UserError(f"{shown(folder)}: holds no image files{others}, expected {' '.join(SUFFIXES)}")


def require_headers(paths: list[Path]) -> int:
    """Raise UserError naming the files whose headers no decoder knows; how many have several frames."""
    judged = [(path, *_header(*file_state(path))) for path in paths]
    _refuse([(path, fault) for path, fault, _ in judged if fault])
    return sum(frames for _, _, frames in judged)


@functools.cache
def _header(path: Path, size: int, modified: int) -> tuple[str, bool]:
    """What is wrong with an image file's header, if anything; whether it has several frames."""
    from PIL import Image

    if not size:
        return "empty", False
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # converting these to 8 bits would clip, not scale, their range
                return f"pixels of type {image.mode}, expected 8 bits: convert the file", False
            # A photograph's second frame (MPO) is its preview or the other eye's.
            return "", image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        return f"not a readable image ({reason(error)})", False


def require_pixels(paths: list[Path]) -> int:
    """Decode everything once. Raises UserError naming the files that are cut short; the largest level otherwise."""
    with ThreadPoolExecutor() as pool:
        judged = list(pool.map(lambda path: _pixels(*file_state(path)), paths))
    _refuse([(path, fault) for path, (fault, _) in zip(paths, judged) if fault])
    return max(level for _, level in judged)


@functools.cache
def _pixels(path: Path, size: int, modified: int) -> tuple[str, int]:
    """What keeps a file from being decoded, if anything; about its largest grey level."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.draft("L", (64, 64))  # of a JPEG, all of it is read and little of it computed
            return "", int(np.asarray(image.convert("L")).max())
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        return f"not a readable image ({reason(error)})", 0


def _refuse(faults: list[tuple[Path, str]]) -> None:
    if faults:
        path, fault = faults[0]
        others = f", and {len(faults) - 1:,} more like it" if len(faults) > 1 else ""
        raise UserError(f"{shown(path)}: {fault}, mend or remove it{others}")


def split_folders(names: Iterable[str]) -> dict[str, str]:
    """Which of these folders is `train`, which `test`, which `valid`, by the usual names in any case.

    Longer names, such as test_images or trainA, count only where both a training and another split are named. Raises
    UserError if two folders would be the same split.
    """
    names = list(names)
    exact = [(role, name) for name in names if (role := _ROLE_OF.get(name.casefold()))]
    longer = [(role, name) for name in names if (role := _role_within(name))]
    chosen = exact
    if len({role for role, _ in longer} | {"train"}) > 1 and any(role == "train" for role, _ in longer):
        known = {role for role, _ in exact}
        chosen = exact + [(role, name) for role, name in longer if role not in known]
    roles: dict[str, str] = {}
    for role, name in chosen:
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
    splits_in = {parent: split_folders(sorted(names)) for parent, names in children.items() if parent != folder}
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
    return ", ".join(
        f"{count:,} {what}" for what, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )


def shown(name: str | Path) -> str:
    """A name that can be printed: bytes that are no UTF-8, as in names of an old encoding, become \\x escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def reason(error: Exception) -> str:
    """An exception's text on one line."""
    return " ".join(str(error).split())[:120] or type(error).__name__


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
        content = find_images(self._path)
        require_content(self._path, content)
        listing = self._in_splits(content)
        animated = require_headers(sorted([*listing.train, *listing.test]))
        return Listing(listing.train, listing.test, listing.folders, listing.passed_over, animated)

    def _in_splits(self, content: FolderContent) -> Listing:
        """Every image is of one split or counted as passed over. Raises UserError if the splits are not clear."""
        top = lambda path: path.relative_to(self._path).parts[0]
        names = {top(path) for path in content.images if path.parent != self._path}
        try:
            roles = split_folders(sorted(names))
            if "train" not in roles:
                if "test" in roles or (roles and len(roles) == len(names)):
                    only = roles["test" if "test" in roles else "valid"]
                    raise UserError(
                        f"has a folder {shown(only)} but no folder train beside it (to train on its images: "
                        f"dataset.path={shown(self._path / only)})"
                    )
                refuse_deeper_splits(self._path, content.images)
        except UserError as error:
            raise UserError(f"{shown(self._path)}: {error}") from None
        train, test = roles.get("train"), roles.get("test", roles.get("valid"))
        if train is None:
            return self._held_out(content.images, None, content.passed_over)
        parts: dict[str, list[Path]] = {name: [] for name in (train, test) if name}
        passed_over = Counter(content.passed_over)
        for path in content.images:
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
