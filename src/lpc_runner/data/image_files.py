"""Which files of a user's folder are images, which are passed over and why, and which folders are splits."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from lpc_runner.base.errors import UserError
from lpc_runner.data.files import file_state

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
class Found:
    """What lies below a folder: image files, sorted; files whose content is elsewhere; others counted by reason."""

    images: list[Path] = field(default_factory=list)
    missing: list[Path] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)


def find_images(folder: Path) -> Found:
    """Everything below `folder`, links followed. Raises UserError if a folder cannot be listed."""
    found = Found()
    _walk(folder, frozenset(), found)
    found.images.sort()
    return found


def _walk(folder: Path, above: frozenset[tuple[int, int]], found: Found) -> None:
    try:
        state, entries = folder.stat(), sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{shown(folder)}: cannot be listed ({error.strerror})") from error
    if (place := (state.st_dev, state.st_ino)) in above:
        found.passed_over["link to a folder above it"] += 1
        return
    for path in entries:
        suffix = path.suffix.lower()
        if suffix == ".icloud":  # stands, hidden, for a file that the cloud keeps
            found.missing.append(path)
        elif path.name.startswith(".") or path.name == "__MACOSX":
            found.passed_over["hidden"] += 1
        elif path.is_dir():
            _walk(path, above | {place}, found)
        elif suffix == ".dvc":
            if not path.with_suffix("").exists():
                found.missing.append(path.with_suffix(""))
        elif not path.exists() and (suffix in SUFFIXES or not suffix):  # a link into nothing, of a file or a folder
            found.missing.append(path)
        elif suffix in SUFFIXES and path.is_file():
            (found.missing if _is_pointer(*file_state(path)) else found.images).append(path)
        else:
            found.passed_over[suffix or "without a suffix"] += 1


@functools.cache
def _is_pointer(path: Path, size: int, modified: int) -> bool:
    if size > 1024:
        return False
    content = path.read_bytes()
    return content.startswith(_POINTERS[:2]) or _POINTERS[2] in content


def require_content(folder: Path, found: Found) -> None:
    """Raise UserError if files are only named in the folder, their content not being there, or none is an image."""
    if found.missing:
        count, total = len(found.missing), len(found.missing) + len(found.images)
        raise UserError(
            f"{shown(folder)}: the content of {count:,} of {total:,} files is not there (dangling links, pointers), "
            f"such as {shown(found.missing[0].relative_to(folder))}: {_FETCH}; or remove them"
        )
    if not found.images:
        others = f", found {counted(found.passed_over)}" if found.passed_over else ""
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
    found = {parent: split_folders(sorted(names)) for parent, names in children.items() if parent != folder}
    parents = sorted(parent for parent, roles in found.items() if "train" in roles and len(roles) > 1)
    if parents:
        roles = found[parents[0]]
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
