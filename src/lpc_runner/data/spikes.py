"""The user's own sequences: spike counts or real-valued series in one NPZ or HDF5 file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from lpc_runner.data.dataset import Data, Split
from lpc_runner.data.sequence_files import Header, as_counts, check_numbers, read_array, read_headers
from lpc_runner.data.sequences import COUNTS, SERIES, SequenceDataset, smallest_counts
from lpc_runner.data.stored import content_hash
from lpc_runner.errors import UserError
from lpc_runner.schema import NonNegativeInt, PositiveFloat, checked

# Keys of what is known beside the values, by part; the second spelling is that of the Neural Latents Benchmark.
_KNOWN = {
    "rates": (("train_rates", "valid_rates"),),
    "behaviour": (("train_behaviour", "valid_behaviour"), ("train_behavior", "eval_behavior")),
}


class SequenceFile(SequenceDataset):
    """What spike counts and series in a file have in common.

    path: the file. num_held_out: how many of the last neurons to hold out; null: as many as the file says.
    bin_seconds: for the axes of pictures.
    """

    plain: ClassVar[tuple[str, str]]  # keys of the two splits
    held_out_keys: ClassVar[tuple[tuple[str, str], ...]] = ()  # keys of (held-in, held-out) neurons of the two splits

    def __init__(self, path: str, num_held_out: int | None, bin_seconds: float) -> None:
        self._path, self._num_held_out, self.bin_seconds = Path(path).expanduser(), num_held_out, bin_seconds

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, N) from the headers, all neurons. Raises UserError if the file is missing or wrong."""
        headers = self._headers()
        first, *rest = self._parts(headers)[0]
        return (headers[first].shape[1], headers[first].shape[2] + sum(headers[key].shape[2] for key in rest))

    @property
    def num_train(self) -> int:
        """Training trials, from the headers. Raises UserError if the file is missing or wrong."""
        headers = self._headers()
        return headers[self._parts(headers)[0][0]].shape[0]

    @property
    def num_held_out(self) -> int:
        """Last neurons that are held out: as chosen, or those of the file's own held-out keys. Raises UserError."""
        headers = self._headers()
        keys = self._parts(headers)[0]
        own = headers[keys[1]].shape[2] if len(keys) == 2 else 0
        if self._num_held_out is None:
            return own
        if own:
            raise UserError(f"{self._path}: {keys[1]} says which neurons are held out: leave out dataset.num_held_out")
        count = headers[keys[0]].shape[2]
        if self._num_held_out >= count:
            raise UserError(f"{self._path}: dataset.num_held_out must be below its {count} neurons")
        return self._num_held_out

    def identity(self) -> dict[str, object]:
        """Kind, SHA-256 of the file, neurons held out; no path. Raises UserError if the file is missing."""
        self._headers()
        return {"name": self.name, "file": content_hash(self._path), "num_held_out": self.num_held_out}

    def prepare(self) -> None:
        """Check keys, shapes and dtypes from the headers. Raises UserError naming file and key."""
        self._headers()

    def load(self) -> Data:
        """Read and check both splits. Raises UserError naming the file, key, trial and neuron at fault."""
        headers = self._headers()
        splits = []
        for number, keys in enumerate(self._parts(headers)):
            values = np.concatenate([self._values(key) for key in keys], axis=2)
            extras = {name: self._extra(pair[number]) for name, pair in self._known(headers).items()}
            splits.append(Split(self._stored(values), extras=extras))
        self._check_train(splits[0])
        return Data(*splits)

    def _values(self, key: str) -> np.ndarray:
        raise NotImplementedError

    def _stored(self, values: np.ndarray) -> torch.Tensor:
        raise NotImplementedError

    def _check_train(self, train: Split) -> None:
        """Whatever training needs of its split beyond sound values."""

    def _extra(self, key: str) -> torch.Tensor:
        values = read_array(self._path, key)
        check_numbers(self._path, key, values)
        if self.kind == COUNTS and key.endswith("_rates") and (values < 0).any():
            raise UserError(f"{self._path}: {key} must be expected counts per bin, found {values.min()}")
        return torch.from_numpy(values.astype(np.float32))

    def _parts(self, headers: dict[str, Header]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The keys of the training and of the validation split: one each, or held-in and held-out neurons."""
        train, valid = self.plain
        if train in headers:
            parts = ((train,), (valid,))
        elif self.held_out_keys and self.held_out_keys[0][0] in headers:
            parts = self.held_out_keys
        else:
            known = " or ".join(", ".join(keys) for keys in self._layouts())
            found = ", ".join(sorted(headers)) or "none"
            raise UserError(f"{self._path}: no key '{train}', found {found}; expected {known}")
        for key in (key for keys in parts for key in keys):
            if key not in headers:
                raise UserError(
                    f"{self._path}: no key '{key}' beside '{parts[0][0]}', found {', '.join(sorted(headers))}"
                )
        return parts

    def _layouts(self) -> Iterable[tuple[str, ...]]:
        yield self.plain
        if self.held_out_keys:
            yield tuple(key for keys in self.held_out_keys for key in keys)

    def _known(self, headers: dict[str, Header]) -> dict[str, tuple[str, str]]:
        """Extras in the file by name, with their keys for both splits."""
        found = {}
        for name, spellings in _KNOWN.items():
            for pair in spellings:
                if pair[0] in headers and pair[1] in headers:
                    found[name] = pair
                elif pair[0] in headers or pair[1] in headers:
                    missing, present = pair if pair[1] in headers else pair[::-1]
                    raise UserError(f"{self._path}: '{present}' without '{missing}': give both or none")
        return found

    def _headers(self) -> dict[str, Header]:
        """Headers of the file, checked against one another."""
        headers = read_headers(self._path)
        parts = self._parts(headers)
        for key in (key for keys in parts for key in keys):
            self._check(key, headers[key])
        for train, valid in zip(*parts):
            left, right = headers[train].shape, headers[valid].shape
            if left[1:] != right[1:]:
                raise UserError(f"{self._path}: {valid} of shape {right} does not fit {train} of shape {left}")
        for keys in parts:
            for key in keys[1:]:
                self._check_fit(key, headers[key], headers[keys[0]].shape[:2])
        num_neurons = sum(headers[key].shape[2] for key in parts[0])
        for name, pair in self._known(headers).items():
            for key, keys in zip(pair, parts):
                self._check(key, headers[key])
                self._check_fit(key, headers[key], headers[keys[0]].shape[:2])
                if name == "rates" and headers[key].shape[2] != num_neurons:
                    raise UserError(f"{self._path}: {key} has {headers[key].shape[2]} neurons, the data {num_neurons}")
        return headers

    def _check(self, key: str, header: Header) -> None:
        if header.dtype.hasobject:
            raise UserError(f"{self._path}: {key} holds no numbers")
        if len(header.shape) != 3:
            raise UserError(f"{self._path}: {key} must have shape (trials, time, neurons), got {header.shape}")
        if 0 in header.shape:
            axis = ("trials", "time bins", "neurons")[header.shape.index(0)]
            raise UserError(f"{self._path}: {key} has no {axis}, its shape is {header.shape}")

    def _check_fit(self, key: str, header: Header, shape: tuple[int, ...]) -> None:
        if header.shape[:2] != shape:
            raise UserError(f"{self._path}: {key} must have {shape[0]} trials of {shape[1]} bins, got {header.shape}")


class Spikes(SequenceFile):
    """Spike counts `train_spikes`, `valid_spikes` (trials, time, neurons), whole numbers of any dtype.

    Optional: `train_rates`, `valid_rates` (expected counts per bin), `train_behaviour`, `valid_behaviour`
    (trials, time, dimensions). Files of the Neural Latents Benchmark: `train_spikes_heldin`, `train_spikes_heldout`,
    `eval_spikes_heldin`, `eval_spikes_heldout`, all four, optional `train_behavior`, `eval_behavior`; other keys,
    such as those of forward prediction, are not read. Raises UserError for negative, fractional or missing counts and
    for neurons without a spike in the training split.
    """

    name = "spikes"
    kind = COUNTS
    plain = ("train_spikes", "valid_spikes")
    held_out_keys = (("train_spikes_heldin", "train_spikes_heldout"), ("eval_spikes_heldin", "eval_spikes_heldout"))

    @checked
    def __init__(self, path: str, num_held_out: NonNegativeInt | None, bin_seconds: PositiveFloat) -> None:
        super().__init__(path, num_held_out, bin_seconds)

    def _values(self, key: str) -> np.ndarray:
        return as_counts(self._path, key, read_array(self._path, key))

    def _stored(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(smallest_counts(values))

    def _check_train(self, train: Split) -> None:
        silent = (train.values.amax((0, 1)) == 0).nonzero()[:, 0].tolist()
        if silent:
            named = ", ".join(map(str, silent[:5])) + (", ..." if len(silent) > 5 else "")
            neurons = "neuron" if len(silent) == 1 else "neurons"
            raise UserError(f"{self._path}: no spike in any training trial of {neurons} {named}: leave them out")


class Series(SequenceFile):
    """Real-valued series `train_series`, `valid_series` (trials, time, dimensions), finite numbers of any dtype.

    Optional: `train_behaviour`, `valid_behaviour`. Raises UserError for what is not finite.
    """

    name = "series"
    kind = SERIES
    plain = ("train_series", "valid_series")

    @checked
    def __init__(self, path: str, num_held_out: NonNegativeInt | None, bin_seconds: PositiveFloat) -> None:
        super().__init__(path, num_held_out, bin_seconds)

    def _values(self, key: str) -> np.ndarray:
        values = read_array(self._path, key)
        check_numbers(self._path, key, values)
        return values.astype(np.float32)

    def _stored(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values)
