"""The user's own sequences: what is read is what was written, and every fault is one line that names its place."""

from __future__ import annotations

import errno
import fcntl
import io
import sys
import zipfile

import h5py
import numpy as np
import pytest
import torch

from lpc_runner.base.errors import UserError
from lpc_runner.data.spikes import Series, Spikes

RANDOM = np.random.default_rng(0)
TRAIN, VALID = RANDOM.poisson(0.5, (8, 6, 5)) + 0, RANDOM.poisson(0.5, (3, 6, 5))
TRAIN[0] += 1  # no neuron is silent
GOOD = {"train_spikes": TRAIN, "valid_spikes": VALID}
BENCHMARK = {
    "train_spikes_heldin": TRAIN[..., :3],
    "train_spikes_heldout": TRAIN[..., 3:],
    "eval_spikes_heldin": VALID[..., :3],
    "eval_spikes_heldout": VALID[..., 3:],
}


def npz(path, arrays):
    np.savez(path, **arrays)


def hdf5(path, arrays):
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array, compression="gzip")


def grouped(path, arrays):
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file.create_dataset(f"mc_maze/{key}", data=array)


def spikes(path, num_held_out=None):
    return Spikes(str(path), num_held_out, 0.02)


def user_error(function):
    with pytest.raises(UserError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(key, place, value, dtype=float):
    arrays = {name: array.copy() for name, array in GOOD.items()}
    arrays[key] = arrays[key].astype(dtype)
    arrays[key][place] = value
    return arrays


@pytest.mark.parametrize("write", [npz, hdf5, grouped])
class TestRoundTrips:
    @pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, bool])
    def test_counts(self, write, dtype, tmp_path):
        arrays = {key: array.clip(max=1).astype(dtype) for key, array in GOOD.items()}
        write(tmp_path / "a.dat", arrays) if write is not npz else npz(tmp_path / "a.npz", arrays)
        dataset = spikes(next(tmp_path.iterdir()))
        dataset.prepare()
        assert (dataset.num_train, dataset.shape, dataset.num_held_out) == (8, (6, 5), 0)
        data = dataset.load()
        assert np.array_equal(data.train.values, TRAIN.clip(max=1)) and data.train.values.dtype == torch.uint8
        assert np.array_equal(data.test.values, VALID.clip(max=1))

    def test_what_is_known_beside_them(self, write, tmp_path):
        extras = {"train_rates": TRAIN + 0.5, "valid_rates": VALID + 0.5}
        extras |= {"train_behaviour": RANDOM.normal(size=(8, 6, 2)), "valid_behaviour": RANDOM.normal(size=(3, 6, 2))}
        path = tmp_path / "a.npz"
        write(path, GOOD | extras)
        data = spikes(path).load()
        assert np.allclose(data.test.extras["rates"], VALID + 0.5)
        assert np.allclose(data.train.extras["behaviour"], extras["train_behaviour"])

    def test_the_benchmarks_keys(self, write, tmp_path):
        path = tmp_path / "a.npz"
        behaviour = {"train_behavior": RANDOM.normal(size=(8, 6, 2)), "eval_behavior": RANDOM.normal(size=(3, 6, 2))}
        forward = {"train_spikes_heldin_forward": np.full((8, 2, 3), np.nan)}  # not read
        write(path, BENCHMARK | behaviour | forward)
        dataset = spikes(path)
        assert (dataset.shape, dataset.num_held_out, dataset.num_train) == ((6, 5), 2, 8)
        data = dataset.load()
        assert np.array_equal(data.train.values, TRAIN) and np.array_equal(data.test.values, VALID)
        assert np.allclose(data.test.extras["behaviour"], behaviour["eval_behavior"])
        assert "num_held_out" in user_error(lambda: spikes(path, 1).num_held_out)


def test_large_counts_keep_their_value(tmp_path):
    for largest, dtype in ((255, torch.uint8), (256, torch.int16), (40_000, torch.int32)):
        npz(tmp_path / "a.npz", changed("valid_spikes", (0, 0, 0), largest, int))
        values = spikes(tmp_path / "a.npz").load().test.values
        assert int(values[0, 0, 0]) == largest and values.dtype == dtype


WRONG = {
    "negative": (
        changed("valid_spikes", (1, 2, 3), -1, int),
        ("valid_spikes", "-1", "trial 1", "neuron 3"),
    ),
    "fractional": (changed("train_spikes", (4, 5, 0), 0.5), ("train_spikes", "0.5", "trial 4", "neuron 0", "whole")),
    "missing": (changed("train_spikes", (4, 5, 1), np.nan), ("train_spikes", "nan", "trial 4", "neuron 1", "finite")),
    "infinite": (changed("valid_spikes", (0, 0, 2), np.inf), ("valid_spikes", "inf", "neuron 2")),
    "huge": (changed("valid_spikes", (0, 0, 2), 2**40, int), ("valid_spikes", "neuron 2", "at most")),
    "silent": (changed("train_spikes", (..., 2), 0, int), ("no spike", "neuron 2")),
    "flat": ({"train_spikes": TRAIN[0], "valid_spikes": VALID}, ("train_spikes", "(6, 5)", "(trials, time, neurons)")),
    "no trials": ({"train_spikes": TRAIN, "valid_spikes": VALID[:0]}, ("valid_spikes", "no trials")),
    "other neurons": ({"train_spikes": TRAIN, "valid_spikes": VALID[..., 1:]}, ("valid_spikes", "(3, 6, 4)")),
    "other time": ({"train_spikes": TRAIN[:, 1:], "valid_spikes": VALID}, ("valid_spikes", "(8, 5, 5)")),
    "text": ({"train_spikes": TRAIN.astype("S3"), "valid_spikes": VALID}, ("train_spikes", "no numbers")),
    "no split": ({"train_spikes": TRAIN}, ("valid_spikes", "train_spikes")),
    "alien keys": ({"spikes": TRAIN}, ("'train_spikes'", "spikes", "eval_spikes_heldin")),
    "rates of one": (GOOD | {"train_rates": TRAIN}, ("train_rates", "valid_rates", "both or none")),
    "rates of few": (GOOD | {"train_rates": TRAIN[..., 1:], "valid_rates": VALID}, ("train_rates", "4 neurons")),
    "narrow trials": (
        {"train_spikes": TRAIN.transpose(2, 1, 0), "valid_spikes": VALID.transpose(2, 1, 0)},
        ("(5, 6, 3)", "np.moveaxis(x, 2, 0)"),
    ),
    "padded": (
        changed("train_spikes", (slice(2, 4), slice(4, None)), np.nan),
        ("trial 2, bin 4", "unequal length", "[:, :4]"),
    ),
    "objects": (GOOD | {"train_spikes": TRAIN.astype("S3")}, ("train_spikes", "no numbers", "S3")),
    "negative rates": (GOOD | {"train_rates": TRAIN - 9.5, "valid_rates": VALID}, ("train_rates", "expected counts")),
    "secret held-out": ({k: v for k, v in BENCHMARK.items() if k != "eval_spikes_heldout"}, ("eval_spikes_heldout",)),
}


@pytest.mark.parametrize("write", [npz, hdf5])
@pytest.mark.parametrize("arrays, facts", WRONG.values(), ids=WRONG.keys())
def test_wrong_arrays_are_named(write, arrays, facts, tmp_path):
    path = tmp_path / "mine.npz"
    write(path, arrays)
    message = user_error(spikes(path).load)
    assert str(path) in message
    for fact in facts:
        assert fact in message


def test_wrong_shapes_are_found_without_reading_the_arrays(tmp_path):
    npz(tmp_path / "a.npz", {"train_spikes": TRAIN, "valid_spikes": VALID[..., 1:]})
    for ask in (lambda d: d.shape, lambda d: d.num_train, lambda d: d.identity(), lambda d: d.prepare()):
        assert "(3, 6, 4)" in user_error(lambda ask=ask: ask(spikes(tmp_path / "a.npz")))


def test_missing_alien_and_damaged_files(tmp_path):
    assert "no such file" in user_error(spikes(tmp_path / "none.h5").prepare)
    array = io.BytesIO()
    np.save(array, TRAIN)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for content, fact in (
        (b"", "empty file"),
        (b"plain text" * 100, "neither"),
        (array.getvalue(), "np.savez"),
        (pointer, "git lfs pull"),
    ):
        (tmp_path / "alien").write_bytes(content)
        assert fact in user_error(spikes(tmp_path / "alien").prepare)
    for write, name in ((npz, "a.npz"), (hdf5, "a.h5")):
        path = tmp_path / name
        write(path, GOOD)
        content = path.read_bytes()
        for length in (20, len(content) // 2, len(content) - 30):
            path.write_bytes(content[:length])
            assert str(path) in user_error(spikes(path).load)


def test_a_flipped_bit_in_an_npz_is_found(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **{key: np.tile(array, (20, 1, 1)) for key, array in GOOD.items()})
    content, whole, found = path.read_bytes(), spikes(path).load(), 0
    for position in np.linspace(300, len(content) - 400, 10).astype(int):
        flipped = bytearray(content)
        flipped[position] ^= 4
        path.write_bytes(flipped)
        try:  # a few bytes of a zip file mean nothing: then the counts are what they were
            assert torch.equal(spikes(path).load().train.values, whole.train.values)
        except UserError as error:
            assert str(path) in str(error)
            found += 1
    assert found >= 8


def test_a_shape_that_no_such_file_can_hold_is_refused_before_memory_is_asked_for(tmp_path):
    path = tmp_path / "bomb.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("train_spikes", (10**7, 10**4, 100), dtype="f8", chunks=(1, 100, 100))
        file.create_dataset("valid_spikes", data=VALID)
    message = user_error(spikes(path).load)
    assert "train_spikes" in message and "10000000" in message


def test_links_and_pickles_are_not_followed(tmp_path):
    hdf5(tmp_path / "other.h5", GOOD)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["train_spikes"] = h5py.ExternalLink("other.h5", "train_spikes")
        file["valid_spikes"] = VALID
    assert "link" in user_error(spikes(path).load)
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "train_spikes", TRAIN.shape, dtype="i8", external=[(str(tmp_path / "raw"), 0, TRAIN.nbytes)]
        )
        file["valid_spikes"] = VALID
    assert "another file" in user_error(spikes(path).load)
    np.savez(tmp_path / "p.npz", train_spikes=np.array([TRAIN, None], dtype=object), valid_spikes=VALID)
    assert "no numbers" in user_error(spikes(tmp_path / "p.npz").load)


def test_a_header_beyond_its_member_is_damage_and_objects_beside_the_spikes_are_not_looked_at(tmp_path):
    path = tmp_path / "short.npz"
    whole = io.BytesIO()
    np.save(whole, TRAIN)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train_spikes.npy", whole.getvalue()[:-8])
        archive.writestr("valid_spikes.npy", whole.getvalue())
    assert "train_spikes.npy is shorter than its header says" in user_error(spikes(path).load)
    np.savez(tmp_path / "notes.npz", **GOOD, notes=np.full(1000, None, dtype=object))  # shorter than its pointers
    assert np.array_equal(spikes(tmp_path / "notes.npz").load().train.values, TRAIN)


def test_identity_follows_content_and_held_out_neurons_not_the_place(tmp_path):
    npz(tmp_path / "a.npz", GOOD)
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes())
    plain = spikes(tmp_path / "a.npz").identity()
    assert plain == spikes(tmp_path / "b.npz").identity() and plain != spikes(tmp_path / "a.npz", 2).identity()
    npz(tmp_path / "b.npz", changed("train_spikes", (0, 0, 0), 9, int))
    assert plain != spikes(tmp_path / "b.npz").identity()


def test_held_out_neurons_must_leave_some(tmp_path):
    npz(tmp_path / "a.npz", GOOD)
    assert spikes(tmp_path / "a.npz", 4).num_held_out == 4
    assert "below its 5 neurons" in user_error(lambda: spikes(tmp_path / "a.npz", 5).num_held_out)


def matlab_v73(path, arrays):
    """As MATLAB's `save -v7.3` lays arrays out: a header of 512 bytes, axes reversed, a class beside each."""
    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_group("#refs#")
        for key, array in arrays.items():
            stored = file.create_dataset(key, data=array.astype(float).transpose(), chunks=True, compression="gzip")
            stored.attrs["MATLAB_class"] = np.bytes_("double")
    with open(path, "r+b") as file:
        file.write((b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\0\x02IM").ljust(512, b"\0"))


def matlab_v5(path, arrays):
    from scipy.io import savemat

    savemat(path, arrays, do_compression=True)


class TestFilesOfOthers:
    @pytest.mark.parametrize("write", [matlab_v73, matlab_v5])
    def test_matlab(self, write, tmp_path):
        write(tmp_path / "a.mat", GOOD | {"train_rates": TRAIN + 0.5, "valid_rates": VALID + 0.5, "notes": TRAIN[0]})
        dataset = spikes(tmp_path / "a.mat")
        data = dataset.load()
        assert np.array_equal(data.train.values, TRAIN) and np.array_equal(data.test.values, VALID)
        assert np.allclose(data.train.extras["rates"], TRAIN + 0.5)
        taken, unread = dataset.account()
        assert "8 trials to train on and 3 to measure on, of 6 time bins and 5 neurons" in taken
        assert ("axes reversed, as MATLAB" in taken) == (write is matlab_v73) and "not read: notes" in unread

    def test_a_damaged_matlab_file_is_named(self, tmp_path):
        path = tmp_path / "a.mat"
        matlab_v5(path, GOOD)
        path.write_bytes(path.read_bytes()[:-40])
        assert str(path) in user_error(spikes(path).load)

    @pytest.mark.filterwarnings("ignore")  # scipy's, of what it finds
    @pytest.mark.parametrize("write", [matlab_v5, hdf5])
    def test_damage_of_any_kind_is_one_line(self, write, tmp_path):
        path, random, refused = tmp_path / "a.mat", np.random.default_rng(3), 0
        write(path, GOOD)
        whole = path.read_bytes()
        for _ in range(60):
            content = bytearray(whole)
            for place in random.integers(len(content), size=3):
                content[place] = random.integers(256)
            path.write_bytes(content[: len(content) - random.integers(3)])
            try:
                spikes(path).load()
            except UserError as error:
                assert str(path) in str(error)
                refused += 1
        assert refused > 10

    @pytest.mark.parametrize("dtype, order", [(">i4", "C"), ("<u2", "F"), (">f8", "F")])
    def test_byte_and_memory_order(self, dtype, order, tmp_path):
        npz(tmp_path / "a.npz", {key: np.array(array, dtype, order=order) for key, array in GOOD.items()})
        data = spikes(tmp_path / "a.npz").load()
        assert np.array_equal(data.train.values, TRAIN) and np.array_equal(data.test.values, VALID)

    def test_a_file_open_elsewhere_is_not_called_damaged(self, tmp_path):
        path = tmp_path / "a.h5"
        hdf5(path, GOOD)
        with open(path, "rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)  # as HDF5 does in the process that writes
            message = user_error(spikes(path).prepare)
        assert "open for writing" in message and "damaged" not in message
        assert spikes(path).num_train == 8

    def test_a_file_left_open_by_its_writer_names_the_remedy(self, tmp_path):
        with h5py.File(tmp_path / "a.h5", "w", libver="latest") as file:
            for key, array in GOOD.items():
                file[key] = array
            file.flush()
            (tmp_path / "copy.h5").write_bytes((tmp_path / "a.h5").read_bytes())
        message = user_error(spikes(tmp_path / "copy.h5").prepare)
        assert "h5clear -s copy.h5" in message and "damaged" not in message

    def test_a_file_system_without_locks_is_read_all_the_same(self, tmp_path, monkeypatch):
        hdf5(tmp_path / "a.h5", GOOD)
        real = h5py.File

        def file(path, mode, locking):
            if locking is not False:
                raise OSError(errno.ENOLCK, "unable to lock file")
            return real(path, mode, locking=locking)

        monkeypatch.setattr(h5py, "File", file)
        assert np.array_equal(spikes(tmp_path / "a.h5").load().train.values, TRAIN)

    @pytest.mark.parametrize("code, names", [(32001, ("Blosc", "hdf5plugin")), (305, ("LZO", "gzip"))])
    def test_a_filter_that_is_not_installed_is_named(self, code, names, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "hdf5plugin", None)  # as if not installed
        with h5py.File(tmp_path / "a.h5", "w") as file:
            for key, array in GOOD.items():
                options = {"compression": code, "allow_unknown_filter": True, "chunks": array.shape}
                file.create_dataset(key, array.shape, "i4", **options)
        message = user_error(lambda: spikes(tmp_path / "a.h5").num_train)
        assert all(name in message for name in (*names, "train_spikes", str(code))) and "damaged" not in message

    def test_members_that_nobody_asked_for_are_passed_over(self, tmp_path):
        with h5py.File(tmp_path / "a.h5", "w") as file:
            for key, array in GOOD.items():
                file[key] = array
            file["elsewhere"] = h5py.ExternalLink("none.h5", "x")
            file["nowhere"] = h5py.SoftLink("/none")
            file["words"] = ["a", "b"]
            file.create_dataset("preallocated", (10**7, 10**4, 10), "f8", chunks=(1, 100, 10))
            file.create_dataset("packed", (4, 4), "i4", compression=32001, allow_unknown_filter=True, chunks=(4, 4))
            file["more/deeper/values"] = np.zeros(3)
        dataset = spikes(tmp_path / "a.h5")
        assert np.array_equal(dataset.load().train.values, TRAIN)
        for key in ("elsewhere", "nowhere", "words", "preallocated", "packed", "more/deeper/values"):
            assert key in dataset.account()[1]

    def test_groups_within_groups_of_one_are_entered(self, tmp_path):
        with h5py.File(tmp_path / "a.h5", "w") as file:
            for key, array in GOOD.items():
                file[f"a/b/{key}"] = array
            file["a/b/itself"] = file["a"]  # no end of groups
        assert np.array_equal(spikes(tmp_path / "a.h5").load().train.values, TRAIN)

    def test_a_refusal_of_the_system_is_not_called_damage(self, tmp_path, monkeypatch):
        hdf5(tmp_path / "a.h5", GOOD)

        def refuse(*args, **kwargs):
            raise OSError(errno.EIO, "long text")

        monkeypatch.setattr(h5py, "File", refuse)
        message = user_error(spikes(tmp_path / "a.h5").prepare)
        assert "Input/output error" in message and "damaged" not in message


ROW = RANDOM.normal(size=(8, 4))
MOVE, EDGE = RANDOM.normal(size=(8, 6, 2)), RANDOM.normal(size=(8, 6, 2))
EDGE[5, 4:] = np.nan
BEHAVIOUR = {
    "one row a trial": ({"train_behavior": ROW, "eval_behavior": ROW[:3]}, "(8, 4)"),
    "missing at edges": ({"train_behavior": EDGE, "eval_behavior": EDGE[:3]}, "nan at trial 5"),
    "training alone": ({"train_behavior": MOVE}, "without 'eval_behavior'"),
    "other trials": ({"train_behavior": MOVE[:, 1:], "eval_behavior": MOVE[:3]}, "8 trials of 6 bins"),
    "too large": ({"train_behavior": MOVE * 1e39, "eval_behavior": MOVE[:3]}, "float32"),
}


@pytest.mark.parametrize("extra, why", BEHAVIOUR.values(), ids=BEHAVIOUR.keys())
def test_behaviour_that_does_not_fit_is_left_out_with_a_line(extra, why, tmp_path):
    hdf5(tmp_path / "a.h5", BENCHMARK | extra)
    dataset = spikes(tmp_path / "a.h5")
    data = dataset.load()
    assert np.array_equal(data.train.values, TRAIN) and not data.train.extras and not data.test.extras
    (line,) = dataset.account()[1:]
    assert "train_behavior" in line and "left out" in line and why in line


def test_the_content_is_checked_before_the_start(tmp_path):
    npz(tmp_path / "a.npz", changed("valid_spikes", (1, 2, 3), -1, int))
    for ask in (lambda d: d.prepare(), lambda d: d.account()):
        assert "trial 1, bin 2, neuron 3" in user_error(lambda ask=ask: ask(spikes(tmp_path / "a.npz")))


@pytest.mark.filterwarnings("ignore")  # of pynwb's own
class TestNWB:
    """Spike times at known places, so that the counts of every bin are known."""

    BIN, STARTS = 0.1, np.array([0.0, 1.0, 2.0, 3.0])
    COUNTS = np.random.default_rng(1).poisson(1.0, (4, 5, 3)) + 1

    def write(self, path, lengths=0.5, counts=COUNTS, trials=None, units=None, observed=None):
        """Trials of `lengths` seconds, counts (trials, bins, units); trials, units: further columns of the tables."""
        pynwb = pytest.importorskip("pynwb")
        from datetime import UTC, datetime

        file = pynwb.NWBFile("test", "id", datetime(2024, 1, 1, tzinfo=UTC))
        for name in trials or {}:
            file.add_trial_column(name, "of the test")
        for name in units or {}:
            file.add_unit_column(name, "of the test")
        for i, (start, length) in enumerate(zip(self.STARTS, np.broadcast_to(lengths, 4))):
            file.add_trial(start, start + length, **{name: column[i] for name, column in (trials or {}).items()})
        middles = self.STARTS[:, None] + (np.arange(5) + 0.5) * self.BIN
        for n in range(3):
            more = {"obs_intervals": observed} if observed is not None else {}
            more |= {name: column[n] for name, column in (units or {}).items()}
            times = np.repeat(middles.ravel(), counts[:, :, n].ravel())
            file.add_unit(spike_times=np.sort(np.append(times, [0.75, 9.0])), **more)  # two between the trials
        with pynwb.NWBHDF5IO(path, "w") as io:
            io.write(file)
        return path

    def read(self, path, trial_seconds=None):
        return Spikes(str(path), None, self.BIN, trial_seconds)

    def test_counts_and_the_tables_split(self, tmp_path):
        split = {"split": ["val", "train", "none", "train"]}
        path = self.write(tmp_path / "a.NWB", trials=split, units={"heldout": [False, True, False]})
        dataset = self.read(path)
        assert (dataset.num_train, dataset.shape, dataset.num_held_out) == (2, (5, 3), 1)
        data = dataset.load()
        order = [0, 2, 1]  # held-in neurons first
        assert np.array_equal(data.train.values, self.COUNTS[[1, 3]][:, :, order])
        assert np.array_equal(data.test.values, self.COUNTS[[0]][:, :, order])
        taken, *notes = dataset.account()
        assert "2 trials to train on and 1 to measure on, of 5 time bins and 3 neurons (1 held out)" in taken
        assert any("1 trials passed over: of another split" in note for note in notes)
        assert dataset.identity() != Spikes(str(path), None, 0.05).identity() != self.read(path, 0.3).identity()

    def test_a_tenth_is_held_out_and_silent_units_are_passed_over(self, tmp_path):
        silent = self.COUNTS * [1, 0, 1]
        dataset = self.read(self.write(tmp_path / "a.nwb", counts=silent))
        data = dataset.load()
        assert data.train.values.shape == (3, 5, 2) and data.test.values.shape == (1, 5, 2)
        both = torch.cat([data.train.values, data.test.values]).numpy()
        assert sorted(map(bytes, both)) == sorted(map(bytes, silent[:, :, [0, 2]].astype(np.uint8)))
        assert any("1 units passed over: no spike" in line for line in dataset.account())

    def test_trials_of_unequal_length_are_refused_with_a_remedy(self, tmp_path):
        path = self.write(tmp_path / "a.nwb", lengths=[0.5, 0.3, 0.45, 0.5])
        message = user_error(lambda: self.read(path).num_train)
        assert "0.3 to 0.5 s" in message and "dataset.trial_seconds" in message
        assert self.read(path, 0.3).shape == (3, 3)
        dataset = self.read(path, 0.4)
        assert len(dataset.load().train) + len(dataset.load().test) == 3
        assert any("1 trials passed over: shorter" in line for line in dataset.account())
        assert "shorter than one bin" in user_error(lambda: self.read(path, 0.01).num_train)

    def test_trials_outside_the_observed_time_are_passed_over(self, tmp_path):
        path = self.write(tmp_path / "a.nwb", observed=[[0.0, 2.2], [2.9, 4.0]])
        dataset = self.read(path)
        assert len(dataset.load().train) + len(dataset.load().test) == 3
        assert any("1 trials passed over: not wholly recorded" in line for line in dataset.account())

    def test_what_is_no_nwb_and_pynwb_not_installed(self, tmp_path, monkeypatch):
        pytest.importorskip("pynwb")
        hdf5(tmp_path / "a.nwb", GOOD)
        assert "cannot be read as NWB" in user_error(self.read(tmp_path / "a.nwb").prepare)
        assert "no such file" in user_error(self.read(tmp_path / "none.nwb").prepare)
        monkeypatch.setitem(sys.modules, "pynwb", None)
        assert "lpc-runner[nwb]" in user_error(self.read(tmp_path / "a.nwb").prepare)
        with pytest.raises(ValueError, match="trial_seconds"):
            Spikes("a.npz", None, 0.02, 0.5)


class TestSeries:
    def test_real_values_keep_their_value_and_may_be_negative(self, tmp_path):
        train, valid = RANDOM.normal(size=(4, 6, 2)), RANDOM.normal(size=(2, 6, 2))
        arrays = {"train_series": train, "valid_series": valid, "train_rates": train, "valid_rates": valid}
        npz(tmp_path / "a.npz", arrays)
        dataset = Series(str(tmp_path / "a.npz"), None, 0.02)
        assert dataset.kind == "real-valued series"
        assert np.array_equal(dataset.load().train.values, train.astype(np.float32))

    def test_what_is_not_finite_is_named(self, tmp_path):
        train = np.zeros((4, 6, 2))
        train[2, 3, 1] = np.nan
        npz(tmp_path / "a.npz", {"train_series": train, "valid_series": np.zeros((2, 6, 2))})
        message = user_error(Series(str(tmp_path / "a.npz"), None, 0.02).load)
        assert "trial 2, bin 3, neuron 1" in message
        train[2, 3, 1] = 1e39
        npz(tmp_path / "a.npz", {"train_series": train, "valid_series": np.zeros((2, 6, 2))})
        message = user_error(Series(str(tmp_path / "a.npz"), None, 0.02).prepare)
        assert "1e+39 at trial 2, bin 3" in message and "float32" in message
