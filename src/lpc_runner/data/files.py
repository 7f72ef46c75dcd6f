"""Files of examples: content hashed once, headers of arrays, damage reported in one line, files kept by content."""

from __future__ import annotations

import functools
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from lpc_runner.base.errors import UserError, one_line
from lpc_runner.base.files import flush_to_disk, remove_temporary, sha256_of, sync_folder, temporary_beside

_T = TypeVar("_T")


def file_state(path: Path) -> tuple[Path, int, int]:
    """Path, size and time of change: what was read of a file holds as long as these are the same."""
    state = path.stat()
    return path.resolve(), state.st_size, state.st_mtime_ns


def once_per_state(read: Callable[[Path], _T]) -> Callable[[Path], _T]:
    """The same function, called once per state of a file: each cell of a sweep asks again."""

    @functools.cache
    def remembered(path: Path, state: tuple) -> _T:
        return read(path)

    return lambda path: remembered(path, file_state(path))


content_hash = once_per_state(sha256_of)


@once_per_state
def _md5(path: Path) -> str:
    from torchvision.datasets.utils import calculate_md5

    return calculate_md5(path)


def intact(path: Path, md5: str | None) -> bool:
    """Whether a file exists and, where an MD5 is given, has it."""
    return path.is_file() and (md5 is None or _md5(path) == md5)


@contextmanager
def kept_by_content(folder: Path, stem: str, suffix: str) -> Iterator[BinaryIO]:
    """A file to write; whole, it stands in the folder as <stem>-<hash><suffix>, else it leaves nothing.

    <hash>: the first 16 hex digits of its SHA-256. Callers hold the folder's lock.
    """
    remove_temporary(folder / stem)
    temporary = temporary_beside(folder / stem)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            flush_to_disk(file.fileno())
        os.replace(temporary, folder / f"{stem}-{sha256_of(temporary)[:16]}{suffix}")
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(folder)


def find_kept(folder: Path, stem: str, suffix: str) -> Path:
    """The file that `kept_by_content` wrote; where there is none, a path that does not exist."""
    return min(folder.glob(f"{stem}-*{suffix}"), default=folder / f"{stem}{suffix}")


def require_content(path: Path) -> None:
    """Raise UserError if what `kept_by_content` wrote no longer fits the hash in its name."""
    if not path.stem.endswith(f"-{sha256_of(path)[:16]}"):
        raise UserError(f"{path}: content differs from the hash in its name, delete this file")


# What zipfile, zlib, numpy, scipy and h5py raise on a file whose bytes are not what they were.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    TypeError,
    ValueError,
    RuntimeError,
    LookupError,
)


@dataclass(frozen=True)
class Header:
    """dtype and shape of one array. fault: why it cannot be used, empty if it can."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fault: str = ""
    note: str = ""  # what the reader does with it beyond reading


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what damaged or refused files raise into one UserError that names the file, and the cause if it is known."""
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{path}: needs more memory than there is") from error
    except _DAMAGE as error:
        reason = one_line(error)
        if isinstance(error, OSError) and error.errno:  # refused, which says nothing about the content
            raise UserError(f"{path}: cannot be read ({os.strerror(error.errno)})") from error
        if isinstance(error, NotImplementedError) or "password" in reason:  # of zipfile
            raise UserError(f"{path}: cannot be read here ({reason}), write it with np.savez") from error
        raise UserError(f"{path}: damaged or cut short ({reason}), fetch or write the file again") from error


def no_npz(path: Path) -> str:
    """What a file is that is neither .npz nor HDF5, as far as its first bytes tell."""
    with open(path, "rb") as file:
        start = file.read(200)
    if not start:
        return "an empty file"
    if start.startswith(b"\x93NUMPY"):
        return "a single array (.npy), expected .npz: np.savez('all.npz', NAME=np.load('one.npy'), ...) makes one"
    if start.startswith(b"version https://git-lfs") or b"annex/objects/" in start:
        return "a pointer, its content is not there: git lfs pull or git annex get fetches it"
    return ""


def npz_header(archive: zipfile.ZipFile, key: str) -> Header:
    """Header of an array in an .npz, which is not read. ValueError if the array is shorter than its header says."""
    with archive.open(f"{key}.npy") as file:
        version = np.lib.format.read_magic(file)
        layouts = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in layouts:
            raise ValueError(f"{key}.npy has format version {version}")
        shape, _, dtype = layouts[version](file)
        held = archive.getinfo(f"{key}.npy").file_size - file.tell()
    # Python objects are pickled, in fewer or more bytes than their pointers take.
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize > held:
        raise ValueError(f"{key}.npy is shorter than its header says")
    return Header(dtype, shape)
