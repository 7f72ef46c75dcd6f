"""What all sources of sequences share, and the cache of those that are simulated."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lpc_runner.base.errors import UserError
from lpc_runner.base.files import lock_on
from lpc_runner.base.schema import hints_of
from lpc_runner.base.tensors import generator
from lpc_runner.data.dataset import Data, Dataset, Split
from lpc_runner.data.files import find_kept, kept_by_content, require_content

log = logging.getLogger(__name__)

COUNTS, SERIES = "spike counts", "real-valued series"


class SequenceDataset(Dataset):
    """Trials of T bins and N neurons; values (trials, T, N) as stored, held-in neurons first.

    bin_seconds: length of a bin in seconds. Known of a trial, where it is: extras `rates` (trials, T, N), expected
    counts per bin or means; `latents`, `inputs`, `behaviour` (trials, T, D); `pulse_bin` (trials,).
    """

    kind = COUNTS
    bin_seconds: float

    def to_model(self, values: Tensor) -> Tensor:
        """The same numbers as float32 (B, T, N)."""
        return values.float()


class SimulatedDataset(SequenceDataset):
    """Trials drawn from a recipe once, kept below data_dir/sequences and verified whenever they are read.

    A file's name holds a hash of the recipe and one of the content, so that settings never share a file. Parameters of
    the constructor are attributes of the same names. The last num_test of num_trials trials of every condition are the
    test split.
    """

    version: ClassVar[int] = 1  # of the recipe: raise it when it changes, for runs then see other data
    seed: int

    def __init__(
        self,
        data_dir: str,
        num_held_out: int,
        num_bins: int,
        num_neurons: int,
        num_conditions: int,
        num_trials: int,
        num_test: int,
    ) -> None:
        self._folder = Path(data_dir).expanduser() / "sequences"
        self.num_held_out, self.num_bins, self.num_neurons = num_held_out, num_bins, num_neurons
        self.num_conditions, self.num_trials, self.num_test = num_conditions, num_trials, num_test
        if num_held_out >= num_neurons:
            raise ValueError(f"num_held_out must be below the {num_neurons} neurons, got {num_held_out}")

    @property
    def shape(self) -> tuple[int, int]:
        """(T, N)."""
        return (self.num_bins, self.num_neurons)

    @property
    def num_train(self) -> int:
        """Trials to train on, of all conditions."""
        return self.num_conditions * (self.num_trials - self.num_test)

    @abstractmethod
    def simulate(self, draw: np.random.Generator) -> dict[str, np.ndarray]:
        """All arrays of both splits: `train_values`, `test_values` and one pair per extra; a function of settings."""

    def split(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays (conditions x trials, ...), condition by condition, to `train_*` and `test_*`.

        Trials of a condition are drawn independently, so which ones are the test split does not matter.
        """
        is_test = np.tile(np.arange(self.num_trials) >= self.num_trials - self.num_test, self.num_conditions)
        parts = {"train": ~is_test, "test": is_test}
        return {f"{part}_{name}": array[rows] for part, rows in parts.items() for name, array in arrays.items()}

    def identity(self) -> dict[str, object]:
        """Name, version of the recipe, every parameter of the constructor but data_dir."""
        settings = {name: getattr(self, name) for name in hints_of(type(self)) if name != "data_dir"}
        return {"name": self.name, "version": self.version, **settings}

    def prepare(self) -> None:
        """Simulate and write the file if it is not there. Raises UserError if it cannot be written."""
        try:
            if self._path().exists():
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            with lock_on(self._folder / f".{self._stem()}.lock"):  # jobs of a sweep start together
                if not self._path().exists():
                    draw = np.random.default_rng(generator(self.seed, self.name).initial_seed())
                    with kept_by_content(self._folder, self._stem(), ".npz") as file:
                        np.savez(file, allow_pickle=False, **self.simulate(draw))
                    log.info("%s: simulated to %s", self.name, self._folder)
        except OSError as error:
            raise UserError(f"{self.name}: cannot be written to {self._folder} ({error.strerror})") from error

    def arrays(self) -> dict[str, np.ndarray]:
        """What `simulate` gave, read from the file. Raises UserError if it is missing or no longer fits its hash."""
        path = self._path()
        if not path.exists():
            raise UserError(f"{self.name}: no file in {self._folder}, the run's own command simulates it")
        require_content(path)
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file}

    def load(self) -> Data:
        """Both splits with their extras. Raises UserError if the file is missing or damaged."""
        arrays = self.arrays()
        return Data(*(sequence_split(arrays, part) for part in ("train", "test")))

    def _stem(self) -> str:
        recipe = {name: value for name, value in self.identity().items() if name != "num_held_out"}
        text = json.dumps(recipe, sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def _path(self) -> Path:
        return find_kept(self._folder, self._stem(), ".npz")


def sequence_split(arrays: dict[str, np.ndarray], part: str) -> Split:
    """`<part>_values` and, as extras, every other `<part>_*`."""
    prefix = f"{part}_"
    tensors = {key.removeprefix(prefix): torch.from_numpy(arrays[key]) for key in arrays if key.startswith(prefix)}
    return Split(tensors.pop("values"), extras=tensors)


def smallest_counts(counts: np.ndarray) -> np.ndarray:
    """The same counts as uint8, int16 or int32, whichever is the first to hold them."""
    largest = counts.max(initial=0)
    fitting = (dtype for dtype in (np.uint8, np.int16, np.int32) if largest <= np.iinfo(dtype).max)
    return counts.astype(next(fitting))
