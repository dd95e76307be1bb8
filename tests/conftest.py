import os
from pathlib import Path

import pytest
import torch
from helpers import make_bank

import pyels
from pyels.engines import cuda


def pytest_runtest_setup(item):
    """Skip what needs more than there is: see the markers in pyproject.toml."""
    for needed in item.iter_markers("needs"):
        pytest.importorskip(needed.kwargs["package"])
    if item.get_closest_marker("gpu") and cuda.missing() is not None:
        pytest.skip(str(cuda.missing()))


@pytest.fixture(scope="session")
def fashion():
    """The embedded 6,000 Fashion-MNIST images."""
    return pyels.datasets.load("fashion-mnist-6000")


@pytest.fixture(scope="session")
def shared():
    """The folder with reference cases and further real images, where there is one beside the checkout."""
    folder = Path(os.environ.get("PYELS_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip("no folder of reference cases beside the checkout")
    return folder


@pytest.fixture
def small():
    """A bank of 12 random 1x9x8 images in three classes of 5, 4 and 3."""
    return make_bank(12, (1, 9, 8), labels=[0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 0])


@pytest.fixture(scope="module")
def one_thread():
    """On busy processors the threads of k-means wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", str(os.cpu_count()))  # so that engines have one too
        yield
    torch.set_num_threads(before)
