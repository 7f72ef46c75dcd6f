"""Download public image sets and check them: python scripts/fetch_data.py svhn cifar10 --data-dir data"""

import argparse
import logging
import sys

from lpc_runner.data.torchvision_sets import CIFAR10, MNIST, SVHN, CelebA64, FashionMNIST
from lpc_runner.errors import UserError


def main() -> None:
    datasets = {dataset.name: dataset for dataset in (MNIST, FashionMNIST, SVHN, CIFAR10, CelebA64)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=datasets, metavar="NAME", help=", ".join(datasets))
    parser.add_argument("--data-dir", default="data", help="where the files go (default: data)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in arguments.names:
        try:
            datasets[name](arguments.data_dir).prepare()
        except UserError as error:
            sys.exit(str(error))
        logging.info("%s: complete", name)


if __name__ == "__main__":
    main()
