"""Agreement with reference cases on real images, which agree with the paper's released code."""

import numpy as np
import pytest
import torch
from helpers import MACHINES

import pyels
from pyels.engines import oracle

NAMES = {"ELS": "ELS-circular", "ELS-interior": "ELS-interior", "bbELS": "ELS-zeros"}


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "golden" / "posterior_means.npz")


@pytest.fixture(scope="module")
def banks(shared, fashion):
    def load(name):
        return pyels.PatchBank(np.load(shared / "data" / f"{name}-subset.npz")["train_images"])

    return {"fashion": fashion, "mnist": load("mnist"), "cifar": load("cifar10")}


@pytest.mark.parametrize("case", range(16))
def test_engines_and_oracles_agree_with_golden_case(golden, banks, case):
    name, n, k, _, one_minus_alpha2, kind = golden["meta"][case]
    sigma2 = float(one_minus_alpha2)
    bank = banks[name][: int(n)]
    make = MACHINES[NAMES.get(kind, kind)]
    x, expected = torch.from_numpy(golden[f"x{case}"])[None], torch.from_numpy(golden[f"out{case}"])[None]
    levels = (1 - sigma2) ** 0.5, sigma2**0.5

    def error(mean):
        return float((mean - expected).abs().max())

    assert error(make(bank, int(k)).denoise(x, *levels)) < 1e-4  # worst seen 2.4e-6
    assert error(make(bank, int(k), engine="reference").denoise(x, *levels)) < 1e-9  # worst seen 5e-13
    assert error(oracle.posterior(make(bank, int(k)).definition, bank, x, *levels).mean) < 1e-9  # worst seen 1e-14
