"""Agreement with reference cases of the other denoisers, some of which agree with their authors' own code.

`meta` says of case i what is computed; `mean{i}` is its mean, and where given `variance{i}`, `influence{i}`, `vjp{i}`
and `entropy{i}`, all float64; `top` are the heaviest sources of `pixel`, as image, row, column and share.
"""

import json
import os

import numpy as np
import pytest
import torch

import pyels

FILE = "golden/denoisers.npz"
CASES = 192
KINDS = {
    "Square": lambda case: pyels.Square(case["k"], inside=case.get("inside", False)),
    "Gaussian": lambda case: pyels.Gaussian(case["width"], case["k"]),
}


@pytest.fixture(scope="module")
def golden(shared):
    if not (shared / FILE).exists():
        pytest.skip(f"no {FILE} here")
    with np.load(shared / FILE) as arrays:
        return dict(arrays)


def denoiser_of(case, golden, bank, engine):
    kind = case["kind"]
    if kind == "Wiener":
        return pyels.Wiener(bank)
    if kind == "PSPC":
        maps = golden[case["heatmaps"]] if "heatmaps" in case else None
        return pyels.PSPC(bank, case.get("patch_size"), maps, case.get("mass", 1.0), case["mirror"], engine)
    if kind in ("PCALocality", "Golden(PCALocality)"):
        local = pyels.PCALocality(bank, case["threshold"], engine=engine)
        along = int(case["averages"].split("x")[0]) if "averages" in case else None
        return local if along is None else pyels.Golden(local, case["least"], case["most"], along)
    if case["window"] == "Masks":
        window = pyels.Masks(torch.from_numpy(golden[case["weights"]]))
    else:
        window = KINDS[case["window"]](case)
    fold = case.get("fold")
    definition = pyels.Definition(
        window,
        case["sources"],
        fold=pyels.Fold(fold) if isinstance(fold, float) else fold,
        mirror=case.get("mirror", False),
    )
    responses = golden[case["responses"]] if "responses" in case else None
    return pyels.Machine(bank, definition, engine, responses=responses)


@pytest.mark.parametrize(("engine", "bound"), [("reference", 1e-9), ("cpu", 1e-4)])
@pytest.mark.parametrize("number", range(CASES))
def test_case_agrees(golden, number, engine, bound):
    case = json.loads(str(golden["meta"][number]))
    if engine == "reference" and case["t"] not in (0.3, 0.9) and not os.environ.get("PYELS_LARGE"):
        pytest.skip("one level of two takes the slow engine half a minute: PYELS_LARGE=1 runs all")
    bank = pyels.PatchBank(golden[f"bank_{case['data']}"])
    machine = denoiser_of(case, golden, bank, engine)
    x = torch.from_numpy(golden[case["x"]])[None].requires_grad_("vjp" + str(number) in golden)
    levels = case["alpha"], case["sigma"]

    def close(ours, name, scale=1.0):
        expected = torch.from_numpy(golden[f"{name}{number}"])
        rounding = 1e-7 if ours.dtype == torch.float32 else 0.0
        assert float((ours - expected).abs().max()) < bound * scale + rounding, name

    mean = machine.denoise(x, *levels)
    close(mean[0].detach(), "mean")
    if "g" not in case:
        return
    posterior = machine.posterior(x.detach(), *levels)
    close(posterior.variance[0], "variance")
    close(posterior.entropy[0], "entropy", 1.0 if engine == "reference" else 10.0)
    influence = machine.influence(x.detach(), *levels)[0]
    close(influence, "influence", golden[f"influence{number}"].max())
    (mean * torch.from_numpy(golden[case["g"]])).sum().backward()
    # x is float32, and so is its gradient.
    scale = np.abs(golden[f"vjp{number}"]).max()
    close(x.grad[0], "vjp", scale * (1e3 if engine == "reference" else 1.0))
    top = machine.sources(x.detach(), *levels, top=len(case["top"]), pixels=[case["pixel"]])
    for ours, expected in zip(zip(*(part[0, 0].tolist() for part in top), strict=True), case["top"], strict=True):
        assert abs(ours[3] - expected[3]) < bound
        if expected[3] > bound:
            assert list(ours[:3]) == expected[:3]
