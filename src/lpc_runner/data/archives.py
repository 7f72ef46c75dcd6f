"""What the readers of a user's files share: an array's header, and damage told in one line."""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lpc_runner.base.errors import UserError

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
    """dtype and shape of one array. fault: why it cannot be used, should somebody ask for it."""

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
        reason = " ".join(str(error).split())[:120]
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
