"""Agreement with reference cases on real images, which agree with the paper's released code.

A file of cases holds for case i: meta[i], which is data set, number of its images (the first ones), patch size, t,
1 - alpha^2 and machine; x{i}, the query (C, H, W) float32; out{i}, the posterior mean (C, H, W) float64. Those of
Fashion-MNIST are beside this file, those of MNIST and CIFAR-10 in the folder of reference cases, where there is one.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import MACHINES

import pyels
from pyels.engines import oracle

NAMES = {"ELS": "ELS-circular", "ELS-interior": "ELS-interior", "bbELS": "ELS-zeros"}
HERE = 5  # cases of Fashion-MNIST, which come first in either file
FILES = {"mnist": "mnist-subset.npz", "cifar": "cifar10-subset.npz"}


@pytest.fixture(scope="module", params=range(16))
def case(request, fashion):
    """A function that makes the machine for given options, the query, alpha and sigma, and the expected mean."""
    i, bank = request.param, fashion
    file = Path(__file__).parent / "fashion_mnist.npz"
    if i >= HERE:
        shared = request.getfixturevalue("shared")
        file = shared / "golden" / "posterior_means.npz"
    with np.load(file) as golden:
        name, n, k, _, one_minus_alpha2, kind = golden["meta"][i]
        x, expected = (torch.from_numpy(golden[f"{part}{i}"])[None] for part in ("x", "out"))
    if i >= HERE:
        bank = pyels.PatchBank(np.load(shared / "data" / FILES[name])["train_images"])
    bank, sigma2 = bank[: int(n)], float(one_minus_alpha2)

    def machine(**options):
        return MACHINES[NAMES.get(kind, kind)](bank, int(k), **options)

    return machine, (x, (1 - sigma2) ** 0.5, sigma2**0.5), expected


@pytest.mark.parametrize(
    ("engine", "bound"),
    [
        ("cpu", 1e-4),  # worst seen 2.4e-6
        ("reference", 1e-9),  # worst seen 5e-13
        pytest.param("cuda", 1e-4, marks=pytest.mark.gpu),
    ],
)
def test_engine_agrees(case, engine, bound):
    machine, query, expected = case
    assert float((machine(engine=engine).denoise(*query) - expected).abs().max()) < bound


@pytest.mark.parametrize("case", [1, 4, 12, 13, 14], indirect=True)  # which take it seconds, not minutes
def test_oracle_agrees(case):
    machine, query, expected = case
    assert (
        float((oracle.posterior(machine().definition, machine().bank, *query).mean - expected).abs().max()) < 1e-9
    )  # worst seen 1e-14
