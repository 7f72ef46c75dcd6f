"""The public image sets that torchvision knows: it downloads and verifies, this file makes splits of them."""

from __future__ import annotations

import io
import logging
import warnings
import zipfile
import zlib
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lpc_runner.base.errors import UserError, one_line
from lpc_runner.base.files import is_refusal, lock_on
from lpc_runner.base.schema import NonNegativeInt, checked
from lpc_runner.data.dataset import Binarisation, Binarise, Data
from lpc_runner.data.files import find_kept, intact, kept_by_content, require_content
from lpc_runner.data.images import ImageDataset, decode_all, image_split, square

log = logging.getLogger(__name__)

_CELEBA_CHUNK = 1000  # images decoded at a time: 12 MB


class TorchvisionImages(ImageDataset):
    """A public image set below `data_dir`, in the layout that torchvision uses."""

    example_shape: ClassVar[tuple[int, int, int]]
    num_examples: ClassVar[tuple[int, int]]  # train, test
    subfolder: ClassVar[str]  # below data_dir: where files are put by hand
    by_hand: ClassVar[str]  # which files those are, archives as published
    source: ClassVar[str]
    torchvision_name: ClassVar[str]
    version: ClassVar[int] = 1  # of the preprocessing: raise it when it changes, for runs then see other data

    @checked
    def __init__(self, data_dir: str, binarise: Binarise = "none", binarise_seed: NonNegativeInt = 0) -> None:
        self.binarisation = Binarisation(binarise, binarise_seed)
        self._data_dir = Path(data_dir).expanduser()
        self._folder = self._data_dir / self.subfolder

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.example_shape

    @property
    def num_train(self) -> int:
        """Size of the published training split."""
        return self.num_examples[0]

    def identity(self) -> dict[str, object]:
        """Name, version of the preprocessing, binarisation; the files themselves have published checksums."""
        return {"name": self.name, "preprocessing": self.version, **self.binarisation.identity()}

    def to_fetch(self) -> str | None:
        """The set, unless it is there and undamaged."""
        return None if self._complete() else f"{self.name} into {self._folder}"

    def prepare(self) -> None:
        """Download what is missing or damaged, with progress. Raises UserError: which files to put where."""
        if self._complete():
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with lock_on(self._data_dir / f".{self.name}.lock"):  # jobs of a sweep start together
                if not self._complete():
                    log.info("%s: downloading to %s", self.name, self._folder)
                    self._download()
        except Exception as error:  # networks, disks, archives and gdown raise errors of many kinds
            raise UserError(f"{self.name}: not fetched ({one_line(error)}); {self._remedy()}") from error
        if not self._complete():
            raise UserError(f"{self.name}: still incomplete after the download; {self._remedy()}")

    def load(self) -> Data:
        """Read both splits, verified. Raises UserError if files are missing or damaged."""
        if not self._complete():
            raise UserError(f"{self.name}: missing or damaged in {self._folder}; {self._remedy()}")
        try:
            splits = [self._read(split) for split in ("train", "test")]
        except Exception as error:  # a parser may raise anything on a damaged file
            what = "cannot be read" if is_refusal(error) else "damaged"
            fault = f"{what} in {self._folder} ({one_line(error)})"
            raise UserError(f"{self.name}: {fault}; {self._remedy()}") from error
        for (images, _), expected in zip(splits, self.num_examples):
            if images.shape != (expected, *self.example_shape):
                raise UserError(
                    f"{self.name}: {self._folder} holds images of shape {images.shape}, "
                    f"expected {(expected, *self.example_shape)}; {self._remedy()}"
                )
        train, test = (image_split(self._folder, *split) for split in splits)
        return self.binarisation.applied(Data(train, test))

    def _remedy(self) -> str:
        return (
            f"without a network put {self.by_hand} (from {self.source}) into {self._folder}, "
            f"with one: lpc-runner fetch {self.name}"
        )

    def _complete(self) -> bool:
        return all(intact(path, md5) for path, md5 in self._files())

    def _torchvision(self) -> Any:
        """The class of this set in torchvision."""
        from torchvision import datasets

        return getattr(datasets, self.torchvision_name)

    @abstractmethod
    def _files(self) -> list[tuple[Path, str | None]]:
        """The files that `_read` needs, with torchvision's MD5 where it has one."""

    @abstractmethod
    def _download(self) -> None:
        """Fetch and verify; files already there with the right checksum need no network."""

    @abstractmethod
    def _read(self, split: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Images uint8 (N, C, H, W) of `train` or `test`, labels (N,) where they exist."""


class MNIST(TorchvisionImages):
    """Handwritten digits (LeCun 1998), uint8 (N, 1, 28, 28), labels 0..9: 60,000 train, 10,000 test."""

    name = "mnist"
    example_shape = (1, 28, 28)
    num_examples = (60_000, 10_000)
    subfolder = "MNIST/raw"
    by_hand = "the four files {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz"
    source = "https://ossci-datasets.s3.amazonaws.com/mnist/"
    torchvision_name = "MNIST"

    def _files(self) -> list[tuple[Path, str | None]]:
        return [(self._folder / archive.removesuffix(".gz"), None) for archive, _ in self._torchvision().resources]

    def _damaged(self) -> list[Path]:
        """Unpacked files that differ from their verified archive: torchvision has no checksum for these."""
        pairs = [(self._folder / archive, md5) for archive, md5 in self._torchvision().resources]
        return [gz.with_suffix("") for gz, md5 in pairs if intact(gz, md5) and not _unpacked(gz)]

    def _complete(self) -> bool:
        return super()._complete() and not self._damaged()

    def _download(self) -> None:
        for path in self._damaged():
            path.unlink(missing_ok=True)  # torchvision unpacks again only what is not there
        self._torchvision()(self._data_dir, download=True)

    def _read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        part = self._torchvision()(self._data_dir, train=split == "train")
        return part.data.numpy()[:, None], part.targets.numpy()


class FashionMNIST(MNIST):
    """Clothing (Xiao et al. 2017), uint8 (N, 1, 28, 28), labels 0..9: 60,000 train, 10,000 test."""

    name = "fashion_mnist"
    subfolder = "FashionMNIST/raw"
    source = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    torchvision_name = "FashionMNIST"


class SVHN(TorchvisionImages):
    """House numbers (Netzer et al. 2011), uint8 (N, 3, 32, 32), labels 0..9: 73,257 train, 26,032 test.

    The 531,131 easier images of `extra` are not used.
    """

    name = "svhn"
    example_shape = (3, 32, 32)
    num_examples = (73_257, 26_032)
    subfolder = "svhn"
    by_hand = "train_32x32.mat and test_32x32.mat"
    source = "http://ufldl.stanford.edu/housenumbers/"
    torchvision_name = "SVHN"

    def _files(self) -> list[tuple[Path, str | None]]:
        entries = [self._torchvision().split_list[split] for split in ("train", "test")]
        return [(self._folder / file, md5) for _, file, md5 in entries]

    def _download(self) -> None:
        from torchvision.datasets.utils import download_url

        for path, md5 in self._files():
            download_url(self.source + path.name, self._folder, path.name, md5)

    def _read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        part = self._torchvision()(self._folder, split=split)
        return part.data, part.labels


class CIFAR10(TorchvisionImages):
    """Ten kinds of object (Krizhevsky 2009), uint8 (N, 3, 32, 32), labels 0..9: 50,000 train, 10,000 test."""

    name = "cifar10"
    example_shape = (3, 32, 32)
    num_examples = (50_000, 10_000)
    subfolder = "."
    by_hand = "cifar-10-python.tar.gz"
    source = "https://www.cs.toronto.edu/~kriz/cifar.html"
    torchvision_name = "CIFAR10"

    def _files(self) -> list[tuple[Path, str | None]]:
        source = self._torchvision()
        files = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
        return [(self._folder / source.base_folder / file, md5) for file, md5 in files]

    def _download(self) -> None:
        from torchvision.datasets.utils import download_and_extract_archive

        source = self._torchvision()
        download_and_extract_archive(source.url, self._folder, filename=source.filename, md5=source.tgz_md5)

    def _read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        with warnings.catch_warnings():
            # The published pickles describe their dtype as NumPy did in 2009; NumPy 2.4 warns about it.
            warnings.filterwarnings("ignore", message=r"dtype\(\): align")
            part = self._torchvision()(self._folder, train=split == "train")
        return part.data.transpose(0, 3, 1, 2), np.array(part.targets)


class CelebA64(TorchvisionImages):
    """Aligned faces (Liu et al. 2015), uint8 (N, 3, 64, 64), no labels: 162,770 train, 19,962 test.

    The central 148x148 of 178x218 pixels, then antialiased bilinear to 64x64: what most VAE papers with FID
    use (a crop of 140 gives other numbers). Decoded once into celeba/<split>-v<version>-<hash>.npy, 2.2 GB;
    the split `valid` is not used.
    """

    name = "celeba64"
    example_shape = (3, 64, 64)
    num_examples = (162_770, 19_962)
    subfolder = "celeba"
    archives: ClassVar[tuple[str, str]] = ("img_align_celeba.zip", "list_eval_partition.txt")
    by_hand = " and ".join(archives)
    source = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
    crop: ClassVar[int] = 148
    partitions: ClassVar[dict[str, str]] = {"train": "0", "test": "2"}  # in list_eval_partition.txt
    torchvision_name = "CelebA"

    def _files(self) -> list[tuple[Path, str | None]]:
        return [(self._decoded(split), None) for split in self.partitions]

    def _decoded(self, split: str) -> Path:
        return find_kept(self._folder, f"{split}-v{self.version}", ".npy")

    def _download(self) -> None:
        from torchvision.datasets.utils import download_file_from_google_drive

        for file_id, md5, file in self._torchvision().file_list:
            if file in self.archives and not intact(self._folder / file, md5):
                download_file_from_google_drive(file_id, self._folder, file, md5)
        lines = (self._folder / self.archives[1]).read_text(encoding="utf-8").splitlines()
        partition = dict(line.split() for line in lines)
        with zipfile.ZipFile(self._folder / self.archives[0]) as archive:
            for split, code in self.partitions.items():
                members = [f"img_align_celeba/{file}" for file, number in partition.items() if number == code]
                self._decode(archive, members, split)

    def _decode(self, archive: zipfile.ZipFile, members: list[str], split: str) -> None:
        """Write the images in the order of `members`, one chunk of them in memory at a time."""
        from PIL import Image

        def decode(member: str) -> np.ndarray:
            with Image.open(io.BytesIO(archive.read(member))) as image:
                face = square(image.convert("RGB"), self.crop, self.example_shape[1])
            return np.asarray(face).transpose(2, 0, 1)

        header = {"descr": "|u1", "fortran_order": False, "shape": (len(members), *self.example_shape)}
        with kept_by_content(self._folder, f"{split}-v{self.version}", ".npy") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(members), _CELEBA_CHUNK):
                log.info("celeba64: decoded %d of %d", start, len(members))
                chunk = members[start : start + _CELEBA_CHUNK]
                file.write(decode_all(decode, chunk, np.empty((len(chunk), *self.example_shape), np.uint8)).data)

    def _read(self, split: str) -> tuple[np.ndarray, None]:
        require_content(self._decoded(split))
        return np.load(self._decoded(split), allow_pickle=False), None


def _unpacked(archive: Path) -> bool:
    """Whether the file beside a .gz holds what the archive's own CRC-32 says."""
    path = archive.with_suffix("")
    expected = int.from_bytes(archive.read_bytes()[-8:-4], "little")
    return path.is_file() and zlib.crc32(path.read_bytes()) == expected
