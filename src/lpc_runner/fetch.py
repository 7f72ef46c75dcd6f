"""`lpc-runner fetch svhn cifar10 --data-dir data`: download public image sets and check them."""

from __future__ import annotations

import argparse
import logging

from lpc_runner.base.surroundings import one_line_errors
from lpc_runner.data.torchvision_sets import CIFAR10, MNIST, SVHN, CelebA64, FashionMNIST


def main() -> None:
    """The command."""
    datasets = {dataset.name: dataset for dataset in (MNIST, FashionMNIST, SVHN, CIFAR10, CelebA64)}
    parser = argparse.ArgumentParser(prog="lpc-runner fetch", description=__doc__)
    parser.add_argument("names", nargs="+", choices=datasets, metavar="NAME", help=", ".join(datasets))
    parser.add_argument("--data-dir", default="data", help="where the files go (default: data)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in arguments.names:
        with one_line_errors():
            datasets[name](arguments.data_dir).prepare()
        logging.info("%s: complete", name)


if __name__ == "__main__":
    main()
