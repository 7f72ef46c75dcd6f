"""Image folders and public sets, on tiny files in the published layouts."""

import gzip
import hashlib
import io
import os
import pickle
import struct
import zipfile
from typing import ClassVar
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from lpc_runner.base.errors import UserError
from lpc_runner.data.folder import ImageFolder
from lpc_runner.data.torchvision_sets import CIFAR10, MNIST, SVHN, CelebA64, FashionMNIST

RANDOM = np.random.default_rng(0)


def random_images(count, *shape):
    return RANDOM.integers(0, 256, (count, *shape), dtype=np.uint8)


def user_error(function):
    """The message of the UserError that `function` raises, which must be one line."""
    with pytest.raises(UserError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestImageFolder:
    def write(self, path, pixels):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)

    def test_pixels_survive_and_the_centre_is_cut(self, tmp_path):
        pixels = random_images(10, 6, 10, 3)
        for i, image in enumerate(pixels):
            self.write(tmp_path / f"{i}.png", image)
        (tmp_path / ".hidden.png").write_bytes(b"")
        (tmp_path / "notes.txt").write_text("not an image")
        dataset = ImageFolder(str(tmp_path), 6, 3)
        data = dataset.load()
        assert (len(data.train), len(data.test), data.train.labels) == (9, 1, None)
        both = {v.numpy().tobytes() for v in torch.cat([data.train.values, data.test.values])}
        assert both == {np.ascontiguousarray(i[:, 2:8].transpose(2, 0, 1)).tobytes() for i in pixels}
        assert ImageFolder(str(tmp_path), 3, 1).load().train.values.shape == (9, *(1, 3, 3))

    def test_splits_and_classes_are_folders(self, tmp_path):
        for split, count in (("train", 3), ("test", 2)):
            for label, name in enumerate(("ant", "bee")):
                for i in range(count):
                    level = np.full((4, 4), 10 * label + i, np.uint8)
                    self.write(tmp_path / split / name / f"{i}.png", level)
        data = ImageFolder(str(tmp_path), 4, 1).load()
        assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert data.test.values[:, 0, 0, 0].tolist() == [0, 1, 10, 11]
        (tmp_path / "train").rename(tmp_path / "other")
        assert "train" in user_error(ImageFolder(str(tmp_path), 4, 1).prepare)

    def test_resizing_is_antialiased(self, tmp_path):
        stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
        for i in range(2):
            self.write(tmp_path / f"{i}.png", stripes)
        values = ImageFolder(str(tmp_path), 8, 1).load().train.values.float()
        assert (values - 127.5).abs().max() < 8

    def test_faults(self, tmp_path):
        assert str(tmp_path) in user_error(ImageFolder(str(tmp_path), 4, 3).prepare)
        assert "no such folder" in user_error(ImageFolder(str(tmp_path / "none"), 4, 3).identity)
        for i in range(3):
            self.write(tmp_path / f"{i}.png", random_images(8, 8)[0:8])
        bad = tmp_path / "1.png"
        whole = bad.read_bytes()
        for content in (whole[:60], b"", b"<html>"):
            bad.write_bytes(content)
            assert str(bad) in user_error(ImageFolder(str(tmp_path), 4, 3).load)
        self.write(bad, np.full((8, 8), 60_000, np.uint16))
        assert "8 bits" in user_error(ImageFolder(str(tmp_path), 4, 3).load)

    def levels(self, folder, level, count=3, suffix="png"):
        """`count` different pictures of about one grey level."""
        for i in range(count):
            self.write(folder / f"{i}.{suffix}", np.full((4, 4), level + i, np.uint8))

    @pytest.mark.parametrize(
        "train, test",
        [
            ("training", "testing"),
            ("Train", "TEST"),
            ("train", "val"),
            ("train", "validation"),
            ("seg_train", "seg_test"),
            ("trainA", "testA"),
            ("training_set", "test_set"),
            ("trainset", "testset"),
            ("train2017", "val2017"),
            ("train", "test_images"),
        ],
    )
    def test_the_usual_names_of_splits(self, train, test, tmp_path):
        for name in ("a", "b"):
            self.levels(tmp_path / train / name, 10)
            self.levels(tmp_path / test / name, 200)
        dataset = ImageFolder(str(tmp_path), 4, 1)
        data = dataset.load()
        assert set(data.train.values.flatten().tolist()) == {10, 11, 12}
        assert set(data.test.values.flatten().tolist()) == {200, 201, 202}
        assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1] and len(data.test) == 6
        assert dataset.account() == [
            f"{tmp_path}: 6 images to train on from {train}, 6 to measure on from {test}; 2 classes"
        ]
        assert dataset.identity()["splits"] == [train, test]  # once they were classes, both trained on

    def test_classes_that_sound_like_splits_stay_classes(self, tmp_path):
        for name in ("test_tube", "beaker", "valid"):
            self.levels(tmp_path / name, 10, 10)
        data = ImageFolder(str(tmp_path), 4, 1).load()
        assert len(data.train) + len(data.test) == 30 and data.train.labels.unique().tolist() == [0, 1, 2]

    def test_every_image_is_used_or_counted(self, tmp_path):
        for name, count in (("train", 4), ("test", 3), ("val", 2), ("extra", 1)):
            self.levels(tmp_path / name / "c", 50, count)
        self.levels(tmp_path, 60, 2)
        for name in ("train/c/photo.HEIC", "train/list.txt", "test/Thumbs.db", "test/.DS_Store", "train/README"):
            (tmp_path / name).write_bytes(b"x")
        (tmp_path / "__MACOSX" / "train").mkdir(parents=True)
        (tmp_path / "__MACOSX" / "train" / "._0.png").write_bytes(b"x")
        data, (taken, passed, _) = (ImageFolder(str(tmp_path), 4, 1).load(), ImageFolder(str(tmp_path), 4, 1).account())
        assert (len(data.train), len(data.test)) == (4, 3)
        assert "4 images to train on from train, 3 to measure on from test" in taken
        for fact in (
            "2 images in val",
            "1 images in extra",
            "2 images beside train",
            "1 .heic",
            "1 .txt",
            "1 .db",
            "2 hidden",
            "1 without a suffix",
        ):
            assert fact in passed

    def test_the_same_image_in_both_splits_is_said(self, tmp_path):
        self.levels(tmp_path / "train", 50)
        self.levels(tmp_path / "test", 51)
        assert "2 of the images to measure on are" in ImageFolder(str(tmp_path), 4, 1).account()[1]

    @pytest.mark.parametrize(
        "folders, facts",
        [
            (("Train/a", "train/a"), ("Train and train", "split train")),
            (("test/a", "test/b"), ("folder test", "no folder train")),
            (("val/a", "val/b"), ("folder val", "no folder train", "dataset.path=")),
            (("images/train/a", "images/test/a"), ("train and test", "images", "dataset.path=")),
            (("a/train", "a/test", "b/train", "b/test"), ("train and test", "first level")),
        ],
    )
    def test_splits_that_are_not_clear_are_refused(self, folders, facts, tmp_path):
        for folder in folders:
            self.levels(tmp_path / folder, 40)
        message = user_error(lambda: ImageFolder(str(tmp_path), 4, 1).num_train)
        assert all(fact in message for fact in (str(tmp_path), *facts))

    def test_links_to_a_store_are_followed_and_circles_are_not(self, tmp_path):
        self.levels(tmp_path / "store" / "cat", 10)
        self.levels(tmp_path / "set" / "dog", 90)
        (tmp_path / "set" / "cat").symlink_to("../store/cat")
        (tmp_path / "set" / "dog" / "again").symlink_to("..")
        dataset = ImageFolder(str(tmp_path / "set"), 4, 1)
        assert dataset.num_train + len(dataset.load().test) == 6 and "2 classes" in dataset.account()[0]
        assert "1 link to a folder above it" in dataset.account()[1]

    POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 99\n"
    MISSING: ClassVar = {
        "git-annex": lambda folder: (folder / "c" / "x.png").symlink_to("../.git/annex/objects/x"),
        "unlocked git-annex": lambda folder: (folder / "c" / "x.png").write_text("/annex/objects/MD5E-s9--0.png\n"),
        "links as text": lambda folder: (folder / "c" / "x.png").write_text("../.git/annex/objects/0.png"),
        "git-lfs": lambda folder: (folder / "c" / "x.jpg").write_bytes(TestImageFolder.POINTER),
        "dvc": lambda folder: (folder / "c" / "x.png.dvc").write_text("outs:"),
        "dvc folder": lambda folder: (folder / "d.dvc").write_text("outs:"),
        "class folder": lambda folder: (folder / "d").symlink_to("../store/d"),
        "cloud": lambda folder: (folder / "c" / ".x.png.icloud").write_bytes(b"bplist"),
    }

    @pytest.mark.parametrize("leave", MISSING.values(), ids=MISSING.keys())
    def test_content_that_is_elsewhere_is_refused(self, leave, tmp_path):
        self.levels(tmp_path / "c", 10)
        leave(tmp_path)
        message = user_error(lambda: ImageFolder(str(tmp_path), 4, 1).num_train)
        assert "the content of 1 of 4 files is not there" in message and "git annex get" in message
        (tmp_path / "set.dvc").write_text("outs:")
        assert "dvc pull" in user_error(lambda: ImageFolder(str(tmp_path / "set"), 4, 1).num_train)

    def test_names_in_an_old_encoding(self, tmp_path):
        for i in range(4):
            self.write(tmp_path / f"{i}.png", np.full((4, 4), 99 + i, np.uint8))
        try:
            os.rename(tmp_path / "3.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
        except OSError:
            pytest.skip("this file system takes UTF-8 alone")
        dataset = ImageFolder(str(tmp_path), 4, 1)
        dataset.prepare()
        before = dataset.identity()
        assert len(dataset.load().train) == 3 and before == ImageFolder(str(tmp_path), 4, 1).identity()
        os.rename(os.fsencode(tmp_path) + b"/caf\xe9.png", os.fsencode(tmp_path) + b"/caf\xe8.png")
        assert before != ImageFolder(str(tmp_path), 4, 1).identity()
        (tmp_path / os.fsdecode(b"caf\xe8.png")).write_bytes(b"?")
        assert r"caf\xe8.png" in user_error(ImageFolder(str(tmp_path), 4, 1).prepare)

    def test_what_cannot_be_decoded_is_refused_before_the_start(self, tmp_path):
        self.levels(tmp_path, 10, 3)
        self.levels(tmp_path, 90, 2, "jpg")
        whole = (tmp_path / "1.jpg").read_bytes()
        (tmp_path / "1.jpg").write_bytes(whole[:-20])
        assert "1.jpg" in user_error(ImageFolder(str(tmp_path), 4, 1).prepare)
        (tmp_path / "1.jpg").write_bytes(b"")
        (tmp_path / "2.png").write_bytes(b"<html>")
        message = user_error(lambda: ImageFolder(str(tmp_path), 4, 1).num_train)  # the plan's: from headers
        assert "1.jpg: empty" in message and "1 more like it" in message

    @pytest.mark.parametrize("level", [0, 1])
    def test_images_of_ones_and_zeros_are_refused_before_the_start(self, level, tmp_path):
        for i in range(3):
            self.write(tmp_path / f"{i}.png", np.full((4, 4), level, np.uint8))
        assert f"largest level of all images is {level}, of 255" in user_error(ImageFolder(str(tmp_path), 4, 1).prepare)

    def test_kinds_of_pixels(self, tmp_path):
        """Palette, transparency, CMYK, black-and-white, several frames: what a viewer shows, of the first frame."""
        red, size = (200, 30, 30), (4, 4)
        Image.new("RGB", size, red).quantize(4).save(tmp_path / "0.png")
        Image.new("RGBA", size, (*red, 255)).save(tmp_path / "1.PNG")
        Image.new("CMYK", (6, 8), (55, 225, 225, 0)).save(tmp_path / "2.tiff")
        frames = [Image.new("RGB", size, color) for color in (red, (0, 0, 255))]
        frames[0].save(tmp_path / "3.gif", save_all=True, append_images=frames[1:])
        Image.new("1", size, 1).save(tmp_path / "4.bmp")
        dataset = ImageFolder(str(tmp_path), 4, 3)
        data = dataset.load()
        means = torch.cat([data.train.values, data.test.values]).double().mean((2, 3))
        means = means[means[:, 1].argsort()]
        assert torch.allclose(means[:4], torch.tensor(red, dtype=torch.float64).expand(4, 3), atol=2)
        assert (means[4] == 255).all()
        assert "1 files with several frames, the first is taken" in dataset.account()[1]

    def test_an_archive_is_no_folder(self, tmp_path):
        (tmp_path / "images.zip").write_bytes(b"PK")
        assert "unpack" in user_error(ImageFolder(str(tmp_path / "images.zip"), 4, 3).prepare)
        (tmp_path / "a.heic").write_bytes(b"x")
        assert "1 .heic" in user_error(ImageFolder(str(tmp_path), 4, 3).prepare)

    def test_identity(self, tmp_path):
        for i, image in enumerate(random_images(3, 8, 8, 3)):
            self.write(tmp_path / "here" / f"{i}.png", image)
            self.write(tmp_path / "there" / f"{i}.png", image)
        here, there = str(tmp_path / "here"), str(tmp_path / "there")
        before = ImageFolder(there, 4, 3).identity()
        assert before == ImageFolder(here, 4, 3).identity()
        assert before != ImageFolder(here, 8, 3).identity() != ImageFolder(here, 8, 1).identity()
        (tmp_path / "there" / "2.png").rename(tmp_path / "there" / "7.png")
        assert before != ImageFolder(there, 4, 3).identity()
        self.write(tmp_path / "here" / "2.png", random_images(8, 8, 3))
        assert before != ImageFolder(here, 4, 3).identity()


def md5_of(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


class TestTorchvision:
    """Tiny files in the published layouts; only torchvision's checksums and the counts are replaced."""

    @pytest.fixture(autouse=True)
    def no_network(self, monkeypatch):
        def unreachable(*args, **kwargs):
            raise URLError("no route to host")

        monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", unreachable)
        monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", unreachable)
        monkeypatch.setattr("torchvision.datasets.utils.download_file_from_google_drive", unreachable)

    @pytest.mark.parametrize(
        "dataset, file, folder",
        [
            (MNIST, "ubyte.gz", "MNIST/raw"),
            (FashionMNIST, "ubyte.gz", "FashionMNIST/raw"),
            (SVHN, "train_32x32.mat", "svhn"),
            (CIFAR10, "cifar-10-python.tar.gz", ""),
            (CelebA64, "img_align_celeba.zip", "celeba"),
        ],
    )
    def test_no_network(self, tmp_path, dataset, file, folder):
        absent = dataset(str(tmp_path))
        for ask in (absent.prepare, absent.load):
            message = user_error(ask)
            assert file in message and str(tmp_path / folder) in message and "lpc-runner fetch " in message

    def test_svhn(self, tmp_path, monkeypatch):
        from scipy.io import savemat

        (tmp_path / "svhn").mkdir()
        files, images = {}, {"train": random_images(3, 3, 32, 32), "test": random_images(2, 3, 32, 32)}
        for split, values in images.items():
            path = tmp_path / "svhn" / f"{split}_32x32.mat"
            labels = np.array([[10], [1], [9]], np.uint8)[: len(values)]
            savemat(path, {"X": values.transpose(2, 3, 1, 0), "y": labels})
            files[split] = ["http://localhost/", path.name, md5_of(path)]
        monkeypatch.setattr("torchvision.datasets.SVHN.split_list", files)
        monkeypatch.setattr(SVHN, "num_examples", (3, 2))
        dataset = SVHN(str(tmp_path))
        dataset.prepare()
        data = dataset.load()
        assert torch.equal(data.train.values, torch.from_numpy(images["train"]))
        assert torch.equal(data.test.values, torch.from_numpy(images["test"]))
        assert data.train.labels.tolist() == [0, 1, 9]
        monkeypatch.setattr(SVHN, "num_examples", (4, 2))
        assert "expected (4, 3, 32, 32)" in user_error(dataset.load)
        with open(path, "r+b") as file:
            file.seek(300)
            file.write(b"?")
        assert "damaged" in user_error(dataset.load)
        assert "test_32x32.mat" in user_error(dataset.prepare)

    def test_cifar10(self, tmp_path, monkeypatch):
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        images = random_images(7, 3, 32, 32)

        def store(name, content):
            (folder / name).write_bytes(pickle.dumps(content))
            return [name, md5_of(folder / name)]

        parts = [("one", images[:3]), ("two", images[3:5]), ("test", images[5:])]
        stored = [store(n, {"data": p.reshape(len(p), -1), "labels": [4] * len(p)}) for n, p in parts]
        meta = store("meta", {"label_names": ["thing"] * 10})
        monkeypatch.setattr("torchvision.datasets.CIFAR10.train_list", stored[:2])
        monkeypatch.setattr("torchvision.datasets.CIFAR10.test_list", stored[2:])
        monkeypatch.setattr(
            "torchvision.datasets.CIFAR10.meta", {"filename": "meta", "key": "label_names", "md5": meta[1]}
        )
        monkeypatch.setattr(CIFAR10, "num_examples", (5, 2))
        data = CIFAR10(str(tmp_path)).load()
        assert torch.equal(data.train.values, torch.from_numpy(images[:5]))
        assert torch.equal(data.test.values, torch.from_numpy(images[5:]))
        assert data.train.labels.tolist() == [4] * 5

    def test_mnist_unpacks_archives_and_mends_what_was_unpacked(self, tmp_path, monkeypatch):
        raw = tmp_path / "MNIST" / "raw"
        raw.mkdir(parents=True)
        images, resources = random_images(5, 28, 28), []
        for split, values in (("train", images[:3]), ("t10k", images[3:])):
            head = struct.pack(">4i", 2051, len(values), 28, 28)
            labels = struct.pack(">2i", 2049, len(values)) + bytes(range(len(values)))
            for name, content in (("images-idx3", head + values.tobytes()), ("labels-idx1", labels)):
                archive = raw / f"{split}-{name}-ubyte.gz"
                archive.write_bytes(gzip.compress(content))
                resources.append((archive.name, md5_of(archive)))
        monkeypatch.setattr("torchvision.datasets.MNIST.resources", resources)
        monkeypatch.setattr(MNIST, "num_examples", (3, 2))
        dataset = MNIST(str(tmp_path))
        dataset.prepare()
        data = dataset.load()
        assert torch.equal(data.train.values, torch.from_numpy(images[:3, None]))
        assert torch.equal(data.test.values, torch.from_numpy(images[3:, None]))
        assert data.train.labels.tolist() == [0, 1, 2]
        with open(raw / "train-images-idx3-ubyte", "r+b") as file:
            file.seek(100)
            file.write(bytes([file.read(1)[0] ^ 1]))
        assert "damaged" in user_error(dataset.load)
        dataset.prepare()
        assert torch.equal(dataset.load().train.values, data.train.values)

    def test_celeba(self, tmp_path, monkeypatch):
        folder = tmp_path / "celeba"
        folder.mkdir()
        levels = {
            "000001.jpg": (10, 0),
            "000002.jpg": (60, 1),
            "000003.jpg": (110, 2),
            "000004.jpg": (160, 0),
        }
        with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
            for name, (level, _) in levels.items():
                picture = np.full((218, 178, 3), 255, np.uint8)
                picture[35:183, 15:163] = level  # the crop sees this square and nothing of the frame
                content = io.BytesIO()
                Image.fromarray(picture).save(content, "png")
                archive.writestr(f"img_align_celeba/{name}", content.getvalue())
        partition = folder / "list_eval_partition.txt"
        partition.write_text("".join(f"{name} {code}\n" for name, (_, code) in levels.items()))
        files = [(None, md5_of(folder / name), name) for name in CelebA64.archives]
        monkeypatch.setattr("torchvision.datasets.CelebA.file_list", files)
        monkeypatch.setattr("lpc_runner.data.torchvision_sets._CELEBA_CHUNK", 1)
        monkeypatch.setattr(CelebA64, "num_examples", (2, 1))
        dataset = CelebA64(str(tmp_path))
        dataset.prepare()
        (folder / "img_align_celeba.zip").unlink()  # the decoded copy is enough
        dataset.prepare()
        data = dataset.load()
        expected = torch.tensor([10, 160], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 3, 64, 64)
        assert torch.equal(data.train.values, expected)
        assert (data.test.values == 110).all() and data.test.labels is None
        cached = next(folder.glob("train-v1-*.npy"))
        content = bytearray(cached.read_bytes())
        content[-1] ^= 1
        cached.write_bytes(content)
        assert cached.name in user_error(dataset.load)

    def test_a_failed_decoding_leaves_no_file(self, tmp_path):
        from lpc_runner.data.files import kept_by_content

        with pytest.raises(OSError, match="disk full"), kept_by_content(tmp_path, "train", ".npy") as file:
            file.write(b"a half")
            raise OSError("disk full")
        assert list(tmp_path.iterdir()) == []

    def test_shapes_and_identities_need_no_files(self, tmp_path):
        for dataset in (MNIST, FashionMNIST, SVHN, CIFAR10, CelebA64):
            absent = dataset(str(tmp_path))
            assert absent.shape == dataset.example_shape
            assert absent.identity() == {"name": dataset.name, "preprocessing": 1}
