"""Write pyels/data/fashion_mnist_6000.npz: the first 600 training images of each Fashion-MNIST class, in file order.

Needs the original idx files (Debian package dataset-fashion-mnist, or any mirror):

    python tools/make_embedded_subset.py /usr/share/datasets/fashion-mnist

Keeping file order makes the first images of the subset the first images of the data set: all of the first
5,552 training images are in it.
"""

import sys
from pathlib import Path

import numpy as np

from pyels.datasets import read_idx

PER_CLASS = 600


def main(folder: str) -> None:
    images = read_idx(Path(folder) / "train-images-idx3-ubyte.gz")
    labels = read_idx(Path(folder) / "train-labels-idx1-ubyte.gz")
    chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[:PER_CLASS] for c in range(10)]))
    target = Path(__file__).parent.parent / "pyels" / "data" / "fashion_mnist_6000.npz"
    np.savez_compressed(target, images=images[chosen, None], labels=labels[chosen])
    print(f"{target.name}: {len(chosen)} images, {target.stat().st_size} bytes; last index {chosen[-1]}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
