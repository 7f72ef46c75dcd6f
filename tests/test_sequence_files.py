"""The user's own sequences: what is read is what was written, and every fault is one line that names its place."""

from __future__ import annotations

import io
import zipfile

import h5py
import numpy as np
import pytest
import torch

from lpc_runner.data.spikes import Series, Spikes
from lpc_runner.errors import UserError

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
    "short behaviour": (
        GOOD | {"train_behaviour": TRAIN[:, 1:], "valid_behaviour": VALID},
        ("train_behaviour", "8 trials of 6 bins"),
    ),
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
    for content in (b"", b"plain text" * 100):
        (tmp_path / "alien").write_bytes(content)
        assert "neither" in user_error(spikes(tmp_path / "alien").prepare)
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
