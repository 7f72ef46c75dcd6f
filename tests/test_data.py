"""Datasets and batches: round trips, faults that users meet, and the same bits for the same arguments."""

import hashlib
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lpc_runner.base.errors import UserError
from lpc_runner.data.arrays import Arrays
from lpc_runner.data.dataset import Batches, Split
from lpc_runner.data.digits import Digits
from lpc_runner.data.images import to_uint8

RANDOM = np.random.default_rng(0)


def random_images(count, *shape):
    return RANDOM.integers(0, 256, (count, *shape), dtype=np.uint8)


def user_error(function):
    """The message of the UserError that `function` raises, which must be one line."""
    with pytest.raises(UserError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def digits():
    return Digits().load()


class TestLevels:
    def test_all_levels_survive_the_round_trip(self):
        levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
        x = Digits().to_model(levels)
        assert x.dtype == torch.float32
        assert (x.min(), x.max()) == (-1, 1)
        assert torch.equal(to_uint8(x), levels)

    def test_unbounded_means_saturate(self):
        means = torch.tensor([-1e9, -1.02, -1.0, 0.0, 1.0, 1.02, 3.0, 1e9])
        assert to_uint8(means).tolist() == [0, 0, 0, 128, 255, 255, 255, 255]

    def test_every_value_goes_to_its_nearest_level(self):
        x = torch.linspace(-1, 1, 5001, dtype=torch.float64)
        restored = to_uint8(x).double() / 127.5 - 1
        assert (restored - x).abs().max() <= 1 / 255 + 1e-12


class TestDigits:
    def test_sizes(self, digits):
        assert digits.train.values.shape == (1437, *Digits().shape)
        assert digits.test.values.shape == (360, *Digits().shape)
        assert digits.train.values.dtype == torch.uint8

    def test_the_splits_are_a_partition_of_what_scikit_learn_holds(self, digits):
        from sklearn.datasets import load_digits

        from lpc_runner.data.digits import enlarge, stratified_split

        images, labels = load_digits(return_X_y=True)
        train, test = stratified_split(labels)
        assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(1797))
        everything = torch.from_numpy(enlarge(images.reshape(-1, 8, 8)))
        for split, indices in ((digits.train, train), (digits.test, test)):
            assert torch.equal(split.values, everything[indices])
            assert torch.equal(split.labels, torch.from_numpy(labels[indices]))

    def test_stratified_to_within_one(self, digits):
        counts = digits.train.labels.bincount() + digits.test.labels.bincount()
        assert (digits.test.labels.bincount() - counts * 360 / 1797).abs().max() < 1

    def test_the_bytes_are_those_of_version_1(self, digits):
        digest = hashlib.sha256()
        for split in (digits.train, digits.test):
            digest.update(split.values.numpy().tobytes() + split.labels.numpy().tobytes())
        assert digest.hexdigest()[:16] == "d1fa635d59458a86"
        assert Digits().identity() == {"name": "digits", "preprocessing": 1}

    def test_enlarging_keeps_flat_ink_and_a_black_border(self):
        from lpc_runner.data.digits import enlarge

        full = enlarge(np.full((1, 8, 8), 16))[0, 0]
        assert (full[8:20, 8:20] == 255).all()
        assert (full[0] == 0).all() and (full[:, -1] == 0).all()
        assert np.array_equal(full, full[::-1]) and np.array_equal(full, full[:, ::-1])


class TestBatches:
    @pytest.fixture
    def split(self):
        return Split(torch.from_numpy(random_images(50, 1, 4, 4)))

    def batches(self, split, seed=3, batch_size=8):
        return Batches(split, Digits(), batch_size, seed, "cpu")

    def epoch_order(self, batches, epoch):
        return torch.cat([batches.batch(epoch, position).index for position in range(batches.num_batches)])

    def test_each_example_at_most_once_per_epoch(self, split):
        order = self.epoch_order(self.batches(split), 0)
        assert self.batches(split).num_batches == 6
        assert len(order.unique()) == 48 and order.dtype == torch.int64
        assert sorted(self.epoch_order(self.batches(split, batch_size=10), 0).tolist()) == list(range(50))

    def test_the_order_is_a_function_of_seed_and_epoch(self, split):
        first = self.epoch_order(self.batches(split), 0)
        assert torch.equal(first, self.epoch_order(self.batches(split), 0))
        assert not torch.equal(first, self.epoch_order(self.batches(split), 1))
        assert not torch.equal(first, self.epoch_order(self.batches(split, seed=4), 0))

    def test_history_does_not_matter(self, split):
        fresh, used = self.batches(split), self.batches(split)
        for epoch, position in [(5, 1), (0, 0), (2, 5), (0, 3)]:
            used.batch(epoch, position)
        torch.manual_seed(99)
        a, b = fresh.batch(2, 4), used.batch(2, 4)
        assert torch.equal(a.x, b.x) and torch.equal(a.index, b.index)

    def test_x_is_what_index_says(self, split):
        batch = self.batches(split).batch(1, 2)
        assert torch.equal(to_uint8(batch.x), split.values[batch.index])

    def test_fixed_examples_are_the_first(self, split):
        batch = self.batches(split).fixed(5)
        assert batch.index.tolist() == [0, 1, 2, 3, 4]
        assert torch.equal(to_uint8(batch.x), split.values[:5])

    def test_too_few_examples(self, split):
        message = user_error(lambda: self.batches(split, batch_size=51))
        assert "50" in message and "51" in message and "batch_size" in message
        assert "50" in user_error(lambda: self.batches(split).fixed(51))


class TestBinarised:
    @pytest.fixture(scope="class")
    def static(self):
        return Digits("static").load()

    def batches(self, split, seed=3, **more):
        return Batches(split, Digits("dynamic"), 40, seed, **more)

    def test_pixels_are_white_as_often_as_they_are_bright(self, digits, static):
        for name in ("train", "test"):
            grey, binary = getattr(digits, name), getattr(static, name)
            assert set(binary.values.unique().tolist()) == {0, 255} and torch.equal(binary.labels, grey.labels)
            assert torch.equal(binary.grey, grey.values) and torch.equal(binary.means, grey.values)
            white, probability = binary.values == 255, grey.values.double() / 255
            assert not white[grey.values == 0].any() and white[grey.values == 255].all()
            error = (white.double() - probability).sum() / (probability * (1 - probability)).sum().sqrt()
            assert abs(error) < 4
        x = Digits("static").to_model(static.test.values[:2])
        assert set(x.unique().tolist()) == {-1.0, 1.0}

    def test_a_static_draw_is_its_seeds(self, digits, static):
        assert torch.equal(static.train.values, Digits("static").load().train.values)
        other = Digits("static", 1).load()
        assert not torch.equal(static.train.values, other.train.values)
        assert not torch.equal(static.test.values, other.test.values)
        assert digits.train.means is digits.train.values and Digits("none", 7).identity() == Digits().identity()
        identities = [Digits(*given).identity() for given in (("none",), ("static",), ("static", 1), ("dynamic",))]
        assert len({str(identity) for identity in identities}) == 4
        assert [Digits(mode).num_levels for mode in ("none", "static", "dynamic")] == [256, 2, 2]

    def test_a_dynamic_set_draws_at_every_visit_and_is_measured_on_its_static_draw(self, static):
        dynamic = Digits("dynamic").load()
        for name in ("train", "test"):
            assert torch.equal(getattr(dynamic, name).values, getattr(static, name).values)
        assert dynamic.train.redrawn and not dynamic.test.redrawn and not static.train.redrawn
        batches, x = self.batches(dynamic.train), {}
        for epoch in (0, 1):
            for position in range(batches.num_batches):
                batch = batches.batch(epoch, position)
                x |= {(epoch, int(i)): row for i, row in zip(batch.index, batch.x)}
        both = [i for epoch, i in x if epoch == 0 and (1, i) in x]
        first, second = (torch.stack([x[epoch, i] for i in both]) for epoch in (0, 1))
        grey = dynamic.train.grey[both].double() / 255
        changed = (first != second).double().sum()  # with probability 2 p (1 - p) each
        expected = (2 * grey * (1 - grey)).sum()
        assert abs(changed - expected) < 4 * expected.sqrt() and expected > 1000
        assert torch.equal(batches.fixed(3).x, Digits().to_model(static.train.values[:3]))

    def test_visits_are_functions_of_seed_epoch_and_position_on_any_ranks(self, static):
        split = Digits("dynamic").load().train
        whole, used = self.batches(split), self.batches(split)
        used.batch(4, 2)
        batch = whole.batch(2, 5)
        assert torch.equal(used.batch(2, 5).x, batch.x)
        parts = [self.batches(split, rows=slice(start, start + 10)).batch(2, 5) for start in range(0, 40, 10)]
        assert torch.equal(torch.cat([part.x for part in parts]), batch.x)
        assert torch.equal(torch.cat([part.index for part in parts]), batch.index)
        other = self.batches(split, seed=4).batch(2, 5)
        assert not torch.equal(other.x, batch.x)

    def test_a_fixed_split_is_not_redrawn(self, static):
        batch = self.batches(static.train).batch(1, 2)
        assert torch.equal(to_uint8(batch.x), static.train.values[batch.index])


GOOD = random_images(20, 1, 4, 4)
WRONG_NPZ = {
    "no images": ({"pictures": GOOD}, "'images'"),
    "floats": ({"images": GOOD.astype(np.float32) / 255}, "uint8"),
    "int64": ({"images": GOOD.astype(np.int64)}, "uint8"),
    "booleans": ({"images": GOOD > 99}, "astype('uint8') * 255"),
    "16 bits": ({"images": GOOD.astype(np.uint16)}, "/ 257"),
    "no channel": ({"images": GOOD[:, 0]}, "[:, None]"),
    "flat": ({"images": GOOD.reshape(20, -1)}, "(20, 16)"),
    "channels last": ({"images": random_images(20, 4, 4, 3)}, "transpose(0, 3, 1, 2)"),
    "empty": ({"images": GOOD[:0]}, "no pixels"),
    "objects": ({"images": np.array([GOOD[0], None], dtype=object)}, "object"),
    "short labels": ({"images": GOOD, "labels": np.arange(19)}, "(20,)"),
    "column of labels": ({"images": GOOD, "labels": np.zeros((20, 1), int)}, "(20,)"),
    "float labels": ({"images": GOOD, "labels": np.zeros(20)}, "integers"),
}


class TestArrays:
    def save(self, path, **arrays):
        np.savez(path, **arrays)
        return str(path)

    def test_files_are_joined_in_order(self, tmp_path):
        parts, labels = random_images(3, 5, 3, 4, 4), np.arange(15, dtype=np.uint8).reshape(3, 5)
        train = [self.save(tmp_path / f"{i}.npz", images=parts[i], labels=labels[i]) for i in (2, 0)]
        data = Arrays(train, self.save(tmp_path / "test.npz", images=parts[1])).load()
        assert torch.equal(data.train.values, torch.from_numpy(np.concatenate([parts[2], parts[0]])))
        assert data.train.labels.tolist() == [*labels[2], *labels[0]]
        assert torch.equal(data.test.values, torch.from_numpy(parts[1])) and data.test.labels is None

    def test_a_tenth_is_held_out(self, tmp_path):
        path = self.save(tmp_path / "a.npz", images=GOOD, labels=np.arange(20))
        data = Arrays(path).load()
        assert len(data.test) == 2
        assert sorted([*data.train.labels.tolist(), *data.test.labels.tolist()]) == list(range(20))
        assert torch.equal(data.test.values, torch.from_numpy(GOOD)[data.test.labels])
        assert torch.equal(data.test.labels, Arrays(path).load().test.labels)

    @pytest.mark.parametrize("arrays, fact", WRONG_NPZ.values(), ids=WRONG_NPZ.keys())
    def test_wrong_arrays(self, tmp_path, arrays, fact):
        path = self.save(tmp_path / "mine.npz", **arrays)
        for ask in (Arrays(path).prepare, Arrays(path).load, lambda: Arrays(path).shape):
            message = user_error(ask)
            assert path in message and fact in message

    ADVICE = (
        (GOOD > 99, "images.astype('uint8') * 255", np.where(GOOD > 99, 255, 0)),
        (GOOD.astype(np.float32) / 255, "(images * 255).round().astype('uint8')", GOOD),
        (GOOD.astype(np.float64), "images.round().astype('uint8')", GOOD),
        (GOOD.astype(np.int64), "images.astype('uint8')", GOOD),
        (GOOD.astype(np.int64) // 128, "images.astype('uint8') * 255", np.where(GOOD > 127, 255, 0)),
        (GOOD.astype(np.uint16) * 257, "(images / 257).round().astype('uint8')", GOOD),
    )

    @pytest.mark.parametrize("images, advice, expected", ADVICE, ids=[str(case[0].dtype) for case in ADVICE])
    def test_advice_for_other_types_can_be_followed_to_the_letter(self, images, advice, expected, tmp_path):
        assert advice in user_error(Arrays(self.save(tmp_path / "a.npz", images=images)).prepare)
        path = self.save(tmp_path / "b.npz", images=eval(advice, {"images": images}))
        data = Arrays(path, path).load()
        assert np.array_equal(data.train.values, expected)

    def test_images_of_zeros_and_ones_are_refused_before_the_start(self, tmp_path):
        path = self.save(tmp_path / "a.npz", images=GOOD // 128)
        for ask in (Arrays(path).prepare, Arrays(path).load):
            assert "largest level of all images is 1, of 255" in user_error(ask)

    def test_what_was_taken_is_said(self, tmp_path):
        path = self.save(tmp_path / "a.npz", images=GOOD, labels=np.arange(20), notes=np.zeros(3))
        assert Arrays(path).account() == [
            f"{path}: 18 images (1, 4, 4) to train on, 2 to measure on, a tenth held out",
            f"{path}: not read: notes",
        ]
        test = self.save(tmp_path / "b.npz", images=GOOD[:5])
        assert (
            Arrays([path, path], test)
            .account()[0]
            .endswith(f"40 images (1, 4, 4) to train on, 5 to measure on, from {test}")
        )

    def test_a_single_array_is_told_how_to_become_a_file_of_several(self, tmp_path):
        np.save(tmp_path / "a.npy", GOOD)
        assert "np.load(" in user_error(Arrays(str(tmp_path / "a.npy")).prepare)

    def test_missing_and_alien_files(self, tmp_path):
        missing = str(tmp_path / "none.npz")
        for ask in (Arrays(missing).prepare, Arrays(missing).identity, lambda: Arrays(missing).shape):
            message = user_error(ask)
            assert missing in message and "no such file" in message
        for content in (b"", b"plain text", GOOD.tobytes()):
            alien = tmp_path / "alien.npz"
            alien.write_bytes(content)
            assert str(alien) in user_error(Arrays(str(alien)).prepare)

    def test_files_that_do_not_fit_together(self, tmp_path):
        small = self.save(tmp_path / "small.npz", images=GOOD)
        large = self.save(tmp_path / "large.npz", images=random_images(20, 1, 5, 5))
        labelled = self.save(tmp_path / "labelled.npz", images=GOOD, labels=np.zeros(20, int))
        for train, test in (([small, large], None), (small, large)):
            message = user_error(Arrays(train, test).prepare)
            assert large in message and "(1, 5, 5)" in message and "(1, 4, 4)" in message
        message = user_error(Arrays([labelled, small]).prepare)
        assert small in message and "labels" in message
        assert "train" in user_error(lambda: Arrays([]))
        assert "2" in user_error(Arrays(self.save(tmp_path / "one.npz", images=GOOD[:1])).load)

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_damage_is_found(self, tmp_path, save):
        path = tmp_path / "mine.npz"
        save(path, images=random_images(100, 1, 8, 8))
        content = path.read_bytes()
        for position in np.linspace(200, len(content) - 400, 25).astype(int):
            flipped = bytearray(content)
            flipped[position] ^= 4
            path.write_bytes(flipped)
            assert str(path) in user_error(Arrays(str(path)).load)
        for length in (10, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            assert str(path) in user_error(Arrays(str(path)).load)

    def test_shape_comes_from_the_header(self, tmp_path):
        """Without reading images: damage among them is found by load, not by shape."""
        images = random_images(200, 3, 32, 32)  # more than one read of the archive takes
        path = Path(self.save(tmp_path / "mine.npz", images=images))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
        assert Arrays(str(path)).shape == (3, 32, 32)
        with pytest.raises(UserError, match="damaged"):
            Arrays(str(path)).load()

    def test_a_header_may_not_promise_more_than_the_file_holds(self, tmp_path):
        path = tmp_path / "mine.npz"
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 3, 64, 64)}
        )
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", header.getvalue())
        with pytest.raises(UserError, match="shorter than its header"):
            Arrays(str(path)).shape  # noqa: B018

    def test_identity_follows_content_not_place(self, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        path = self.save(tmp_path / "a.npz", images=GOOD)
        copy = tmp_path / "elsewhere" / "b.npz"
        copy.write_bytes(Path(path).read_bytes())
        before = Arrays(path).identity()
        assert before == Arrays(str(copy)).identity()
        assert before != Arrays(path, str(copy)).identity()
        changed = GOOD.copy()
        changed[0, 0, 0, 0] ^= 1
        self.save(path, images=changed)
        assert before != Arrays(path).identity()

    @pytest.mark.slow
    @pytest.mark.skipif("LPC_RUNNER_CIFAR10" not in os.environ, reason="LPC_RUNNER_CIFAR10 names no folder")
    def test_real_cifar10(self):
        folder = Path(os.environ["LPC_RUNNER_CIFAR10"])
        train = [str(folder / f"train_{i}_of_4.npz") for i in range(4)]
        dataset = Arrays(train, str(folder / "test.npz"))
        data = dataset.load()
        assert dataset.shape == (3, 32, 32)
        assert data.train.labels.bincount().tolist() == [5000] * 10
        assert data.test.labels.bincount().tolist() == [1000] * 10
        mean = data.train.values.double().mean((0, 2, 3)) / 255  # the constants everyone normalises CIFAR-10 by
        assert torch.allclose(mean, torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.float64), atol=1e-4)


def test_constructing_imports_nothing_heavy():
    code = (
        "import sys; from lpc_runner.data import arrays, digits, folder, torchvision_sets;"
        "torchvision_sets.SVHN('data'); digits.Digits(); folder.ImageFolder('a', 8, 3); arrays.Arrays('a');"
        "print([m for m in ('torchvision', 'sklearn', 'scipy', 'PIL', 'hydra', 'wandb') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
