"""Arrays in a user's NPZ or HDF5 file: headers first, then the content, with every fault in one line."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lpc_runner.data.archives import Header, damage_named, npz_header
from lpc_runner.errors import UserError

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_MAX_COMPRESSION = 1100  # deflate, the usual filter of both formats, cannot exceed 1032
_MAX_INT = np.iinfo(np.int32).max


def read_headers(path: Path) -> dict[str, Header]:
    """dtype and shape of every array in the file, by key; no array is read.

    In an HDF5 file the keys are those of the root or, where it holds nothing but one group, of that group. Raises
    UserError for a missing, alien or damaged file, and for an array that its file cannot really hold.
    """
    with _opened(path) as file:
        headers = {key: npz_header(file, key) for key in _keys(file)} if _is_zip(file) else _hdf5_headers(path, file)
    for key, header in headers.items():
        if header.dtype.hasobject or header.dtype.kind not in "biuf":
            headers[key] = Header(np.dtype(object), header.shape)  # not numbers: only a fault if the key is used
        elif math.prod(header.shape) * header.dtype.itemsize > _MAX_COMPRESSION * path.stat().st_size:
            raise UserError(
                f"{path}: {key} claims shape {header.shape}, more than a file of {path.stat().st_size:,} bytes can hold"
            )
    return headers


def read_array(path: Path, key: str) -> np.ndarray:
    """One array, after `read_headers` has found it sound. Raises UserError naming a damaged file."""
    with _opened(path) as file:
        if _is_zip(file):
            with file.open(f"{key}.npy") as member:
                return np.lib.format.read_array(member, allow_pickle=False)
        return np.asarray(_root(file)[key][...])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A zipfile.ZipFile or h5py.File for reading; what damaged files raise becomes one line that names the file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected .npz or .h5 with arrays of shape (trials, time, neurons)")
    with open(path, "rb") as file:
        is_hdf5 = file.read(len(_HDF5_SIGNATURE)) == _HDF5_SIGNATURE
    if not is_hdf5 and not zipfile.is_zipfile(path):
        raise UserError(f"{path}: neither .npz nor HDF5, or cut short (a MATLAB file: save it with -v7.3)")
    with damage_named(path):
        if is_hdf5:
            import h5py

            with h5py.File(path, "r") as opened:
                yield opened
        else:
            with zipfile.ZipFile(path) as opened:
                yield opened


def _is_zip(file: Any) -> bool:
    return isinstance(file, zipfile.ZipFile)


def _keys(file: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in file.namelist() if name.endswith(".npy")]


def _root(file: Any) -> Any:
    import h5py

    members = list(file.values())
    return members[0] if len(members) == 1 and isinstance(members[0], h5py.Group) else file


def _hdf5_headers(path: Path, file: Any) -> dict[str, Header]:
    import h5py

    headers = {}
    root = _root(file)
    for key in root:
        if root.get(key, getlink=True).__class__ is not h5py.HardLink:
            raise UserError(f"{path}: {key} is a link to elsewhere, only arrays in the file itself are read")
        item = root[key]
        if not isinstance(item, h5py.Dataset):
            continue
        if item.is_virtual or item.external:
            raise UserError(f"{path}: {key} lies in another file, only arrays in the file itself are read")
        if item.shape is not None:
            headers[key] = Header(item.dtype, item.shape)
    return headers


# Content --------------------------------------------------------------------------------------------------


def check_numbers(path: Path, key: str, values: np.ndarray) -> None:
    """Raise UserError naming trial, bin and neuron of the first value (trials, T, N) that is not finite."""
    if values.dtype.kind == "f":
        _refuse(path, key, values, ~np.isfinite(values), "every value must be finite")


def as_counts(path: Path, key: str, values: np.ndarray) -> np.ndarray:
    """The same values as int32 (trials, T, N). Raises UserError naming the first that is no count."""
    check_numbers(path, key, values)
    if values.dtype.kind in "if":
        _refuse(path, key, values, values < 0, "spike counts cannot be negative")
    if values.dtype.kind == "f":
        rounded = values != np.floor(values)
        _refuse(path, key, values, rounded, "spike counts must be whole numbers (real-valued data: dataset=series)")
    _refuse(path, key, values, values > _MAX_INT, f"spike counts must be at most {_MAX_INT:,}")
    return values.astype(np.int32)


def _refuse(path: Path, key: str, values: np.ndarray, wrong: np.ndarray, rule: str) -> None:
    if not wrong.any():
        return
    trial, time, neuron = (int(index) for index in np.unravel_index(int(wrong.argmax()), wrong.shape))
    count = int(wrong.sum())
    others = f" and {count - 1:,} more" if count > 1 else ""
    raise UserError(
        f"{path}: {key} has {values[trial, time, neuron]} at trial {trial}, bin {time}, neuron {neuron}{others}: {rule}"
    )
