"""Traces: what samples are made of, step by step."""

import json

import pytest
import torch
from helpers import make_bank

import pyels
from pyels.files import TensorFile, write_tensors
from pyels.provenance import Trace, attribute, trace, without

NOISE = torch.randn(2, 1, 9, 8, generator=torch.Generator().manual_seed(0))
SIZES = [3, 5, 7, 7]
# Machines and what they are told at each step.
MACHINES = {
    "els": (lambda bank: pyels.ELS(bank, engine="cpu"), {"patch_size": SIZES}),
    "reference": (lambda bank: pyels.ELS(bank, 3, "circular", engine="reference"), {}),
    "ls": (lambda bank: pyels.LS(bank, 5, mirror=True), {}),
    "is": (pyels.IS, {}),
    "es": (pyels.ES, {}),
    "fold": (lambda bank: pyels.ELS(bank, 3, fold="uniform"), {}),
    "gaussian": (lambda bank: pyels.ELS(bank, window=pyels.Gaussian(1.0)), {"width": [0.5, 0.6, 0.8, 1.0]}),
    "pca": (pyels.PCALocality, {"threshold": [0.3, 0.2, 0.1, 0.1]}),
    "pspc": (pyels.PSPC, {"patch_size": [3, 3, 5, 5]}),
}


@pytest.fixture(params=MACHINES)
def machine_and_told(request, small):
    make, told = MACHINES[request.param]
    return make(small), told


def test_a_trace_is_what_the_machine_says_at_every_step(machine_and_told):
    machine, told = machine_and_told
    steps = []
    expected = pyels.sample(machine, NOISE, 4, per_step=told, callback=steps.append)
    traced = trace(machine, NOISE, 4, per_step=told, top=5)
    torch.testing.assert_close(traced.sample, expected, atol=1e-5, rtol=0)
    for i, (step, level) in enumerate(zip(steps, traced.levels, strict=True)):
        assert (level.t, level.alpha, level.sigma) == (step.level.t, step.level.alpha, step.level.sigma)
        assert set(told) <= set(level.told)
        arguments = traced.x[i], level.alpha, level.sigma
        torch.testing.assert_close(traced.x[i], step.x, atol=1e-5, rtol=0)
        posterior = machine.posterior(*arguments, **level.told)
        influence = machine.influence(*arguments, **level.told).float()
        heaviest = machine.sources(*arguments, top=5, **level.told)
        torch.testing.assert_close(traced.x0[i], posterior.mean.float(), atol=1e-6, rtol=0)
        torch.testing.assert_close(traced.entropy[i], posterior.entropy.float(), atol=1e-6, rtol=0)
        torch.testing.assert_close(traced.log_evidence[i], posterior.log_evidence.float())
        torch.testing.assert_close(traced.influence[i], influence, atol=1e-5, rtol=0)
        torch.testing.assert_close(traced.weight[i], heaviest.weight.float(), atol=1e-5, rtol=0)
        for name in ("image", "row", "column"):
            assert torch.equal(getattr(traced, name)[i], getattr(heaviest, name))
    torch.testing.assert_close(traced.influence.sum(-1), torch.ones(4, 2), atol=1e-5, rtol=0)


def test_all_sources_make_every_estimate():
    bank = make_bank(5, (3, 6, 5))
    noise = torch.randn(1, 3, 6, 5, generator=torch.Generator().manual_seed(1))
    traced = trace(pyels.ELS(bank, 3, "circular"), noise, 3, top=5 * 30)
    images = bank.read(slice(None))
    centres = images[traced.image, :, traced.row, traced.column]
    mean = (traced.weight[..., None] * centres).sum(-2).movedim(-1, 2)
    torch.testing.assert_close(mean, traced.x0, atol=1e-5, rtol=0)
    last = attribute(traced)
    assert last.pixel_share.min() > 0
    assert last.image.shape == last.share.shape == (1, 5)  # as many as there are


def test_each_sample_is_traced_as_if_it_were_alone(small):
    machine = pyels.ELS(small, 3)
    together, alone = trace(machine, NOISE, 3, labels=[1, 2]), trace(machine, NOISE[1:], 3, labels=[2])
    for name in ("x", "x0", "entropy", "image", "weight", "influence"):
        assert torch.equal(getattr(together, name)[:, 1:], getattr(alone, name)), name
    a, b = attribute(together), attribute(alone)
    assert torch.equal(a.shares[1:], b.shares)
    assert torch.equal(a.pixel_image[1:], b.pixel_image)


def test_labels_and_selections_restrict_the_images(small):
    machine = pyels.ELS(small, 3)
    traced = trace(machine, NOISE, 3, labels=[1, 2])
    selected = trace(machine, NOISE, 3, selection=small.select(labels=[1, 2]))
    for one in (traced, selected):
        assert torch.equal(one.candidates, small.labels == torch.tensor([[1], [2]]))
        assert (one.influence[:, ~one.candidates] == 0).all()
    assert torch.equal(traced.sample, selected.sample)
    torch.testing.assert_close(traced.sample, pyels.sample(machine, NOISE, 3, labels=[1, 2]), atol=1e-5, rtol=0)
    few = trace(machine, NOISE, 3, selection=small.select(images=[3, 5]))
    assert set(few.image.flatten().tolist()) == {-1, 3, 5}  # a corner has two sources
    assert trace(machine, NOISE, 3).candidates.all()


def test_a_network_leads_and_the_machine_is_asked_along_its_way(small):
    network = pyels.NetworkDenoiser(lambda x, t, labels: 0.5 * x, predicts="x0")
    machine, seen = pyels.ELS(small), []
    traced = trace(machine, NOISE, 4, patch_sizes=SIZES, network=network, callback=seen.append)
    steps = []
    assert torch.equal(traced.sample, pyels.sample(network, NOISE, 4, callback=steps.append))
    assert [step.index for step in seen] == [0, 1, 2, 3]
    assert torch.equal(traced.x, torch.stack([step.x for step in steps]))
    assert torch.equal(traced.network_x0, torch.stack([step.x0 for step in steps]))
    for i, level in enumerate(traced.levels):
        expected = machine.denoise(traced.x[i], level.alpha, level.sigma, **level.told)
        torch.testing.assert_close(traced.x0[i], expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="a network's"):
        without(traced, machine, [0])


def test_shares_sum_to_one_and_are_those_of_the_steps(machine_and_told):
    machine, told = machine_and_told
    traced = trace(machine, NOISE, 4, per_step=told)
    owed = attribute(traced, top=3)
    torch.testing.assert_close(owed.steps.sum(0), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(owed.shares.sum(1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(owed.shares.float(), (owed.steps[:, :, None] * traced.influence).sum(0).float())
    assert torch.equal(owed.share, owed.shares.gather(1, owed.image))
    assert (owed.share.diff(dim=1) <= 0).all()
    assert float(owed.share[0, 0]) == float(owed.shares[0].max())
    # Pixel by pixel, one after the other.
    for b, y, x in ((0, 0, 0), (1, 4, 3), (1, 8, 7)):
        found = {}
        for s in range(4):
            for image, weight in zip(
                traced.image[s, b, y, x].tolist(), traced.weight[s, b, y, x].tolist(), strict=True
            ):
                found[image] = found.get(image, 0.0) + weight * float(owed.steps[s, b])
        best = max(found.values())
        assert abs(float(owed.pixel_share[b, y, x]) - best) < 1e-6
        assert abs(found[int(owed.pixel_image[b, y, x])] - best) < 1e-6


def test_a_flat_picture_is_owed_to_all_alike():
    bank = pyels.PatchBank(torch.full((3, 1, 5, 5), 51, dtype=torch.uint8))
    owed = attribute(trace(pyels.ELS(bank, 3), torch.randn(1, 1, 5, 5), 2))
    torch.testing.assert_close(owed.shares, torch.full((1, 3), 1 / 3, dtype=torch.float64), atol=1e-5, rtol=0)


def test_without_an_image_is_a_bank_without_it(small):
    for make in (lambda bank: pyels.ELS(bank), lambda bank: pyels.LS(bank, mirror=True)):
        traced = trace(make(small), NOISE, 4, patch_sizes=SIZES)
        rest = make(small[[i for i in range(12) if i not in (2, 7)]])
        ours = without(traced, make(small), [2, 7])
        torch.testing.assert_close(ours, pyels.sample(rest, NOISE, 4, patch_sizes=SIZES), atol=1e-5, rtol=0)
    each = without(traced, make(small), [[2], [7]])
    torch.testing.assert_close(each[1:], without(traced, make(small), 7)[1:], atol=1e-5, rtol=0)
    labelled = trace(pyels.ELS(small, 3), NOISE, 2, labels=[0, 2])
    rest = pyels.ELS(small[1:], 3)
    torch.testing.assert_close(
        without(labelled, pyels.ELS(small, 3), 0), pyels.sample(rest, NOISE, 2, labels=[0, 2]), atol=1e-5, rtol=0
    )
    with pytest.raises(ValueError, match="no images are left"):
        without(labelled, pyels.ELS(small, 3), [2, 5, 8])
    with pytest.raises(ValueError, match=r"trace is of ELS: .* but the machine is LS"):
        without(labelled, pyels.LS(small, 3), 0)
    with pytest.raises(ValueError, match="checksum"):
        without(labelled, rest, 0)


def test_what_images_are_owed_is_what_leaving_them_out_changes(fashion):
    machine = pyels.ELS(fashion[:100])
    noise = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    traced = trace(machine, noise, 10, patch_sizes=[3, 5, 7, 9, 9, 11, 13, 13, 15, 17])
    order = attribute(traced, top=100).image
    most, least = (
        pyels.metrics.mse(without(traced, machine, some), traced.sample) for some in (order[:, :5], order[:, -5:])
    )
    assert (most > least).all(), (most, least)
    assert most.sum() > 2 * least.sum(), (most, least)


def test_saved_and_loaded_it_is_the_same(machine_and_told, small, tmp_path):
    machine, told = machine_and_told
    network = pyels.NetworkDenoiser(lambda x, t, labels: 0.5 * x, predicts="x0")
    for leads in (None, network):
        traced = trace(machine, NOISE, 4, per_step=told, network=leads)
        traced.save(tmp_path / "trace.safetensors")
        again = Trace.load(tmp_path / "trace.safetensors", small)
        for name, value in vars(traced).items():
            same = torch.equal(getattr(again, name), value) if torch.is_tensor(value) else getattr(again, name) == value
            assert same, name
        assert torch.equal(attribute(again).shares, attribute(traced).shares)
    with pytest.raises(ValueError, match=r"checksum .* load the images that it was made with"):
        Trace.load(tmp_path / "trace.safetensors", small[1:])


def changed(**values):
    def change(tensors, record):
        for name, value in values.items():
            (tensors if name in tensors else record)[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(format=2), "its format is 2, and this pyels reads 1"),
        (changed(sources="left"), "sources must be"),
        (changed(per_step={"patch_size": [3]}), "per_step has no 2 values"),
        (lambda tensors, record: record.pop("bank"), "it has no 'bank'"),
        (lambda tensors, record: tensors.pop("entropy"), "entropy"),
        (changed(t=torch.zeros(3, dtype=torch.float64)), r"alpha is torch.float64 \(2,\)"),
        (changed(x=torch.zeros(2, 2, 1, 9, 8).double()), "x is torch.float64"),
        (changed(image=torch.full((2, 2, 9, 8, 8), 12)), "image reaches from 12 to 12"),
        (changed(row=torch.full((2, 2, 9, 8, 8), -2)), "row reaches from -2"),
    ],
)
def test_other_files_are_refused_in_words(small, tmp_path, change, message):
    path = tmp_path / "trace.safetensors"
    trace(pyels.ELS(small, 3), NOISE, 2).save(path)
    file = TensorFile.read(path)
    record = json.loads(file.metadata["pyels-trace"])
    change(file.tensors, record)
    write_tensors(path, file.tensors, {"pyels-trace": json.dumps(record)})
    with pytest.raises(ValueError, match=rf"{path}: not a trace that can be read .*{message}"):
        Trace.load(path)


def test_damaged_files_and_those_of_others_are_refused(small, tmp_path):
    path = tmp_path / "trace.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        Trace.load(path)
    trace(pyels.ELS(small, 3), NOISE, 2).save(path)
    whole = bytearray(path.read_bytes())
    whole[-100] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="checksum does not match"):
        Trace.load(path)
    write_tensors(path, {"noise": NOISE})
    with pytest.raises(ValueError, match=r"not a trace .*no record"):
        Trace.load(path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"machine": "els"}, TypeError, "machine must be a pyels.Machine"),
        ({"noise": NOISE[:, :, 1:]}, ValueError, "the bank's are"),
        ({"noise": NOISE.double()}, TypeError, "float32"),
        ({"labels": [0, 3]}, ValueError, "label 3: no images of this class"),
        ({"labels": [0]}, ValueError, r"shape \(2,\)"),
        ({"patch_sizes": [3, 4]}, ValueError, "odd"),
        ({"patch_sizes": [3]}, ValueError, "1 entries for 2 steps"),
        ({"top": 0}, ValueError, "top must be at least 1"),
        ({"network": "resnet"}, TypeError, "network must be a pyels.Denoiser"),
        ({"per_step": {"selection": 2 * [make_bank(12, (1, 9, 8)).select(images=[1])]}}, TypeError, "are numbers"),
        ({"schedule": "sine"}, ValueError, "schedule must be one of"),
    ],
)
def test_bad_arguments_are_refused_in_words(small, arguments, error, message):
    with pytest.raises(error, match=message):
        trace(**{"machine": pyels.ELS(small, 3), "noise": NOISE, "steps": 2} | arguments)


def test_machines_without_sources_are_refused_in_words(small, tmp_path):
    other = pyels.ELS(make_bank(12, (3, 9, 8)), 3)
    with pytest.raises(TypeError, match=r"whose sources can be told, got Wiener"):
        trace(pyels.Wiener(small), NOISE, 2)
    with pytest.raises(ValueError, match=r"answers \(2, 3, 9, 8\)"):
        trace(pyels.Machine(small, pyels.Definition(pyels.Square(3)), responses=other.bank), NOISE, 2)
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="no second pass"):
        trace(pyels.ELS(small, 3, engine="sampled", index=tmp_path), NOISE, 2)


def test_a_streamed_bank_gives_the_same(small, tmp_path):
    small.save(tmp_path / "bank.npz")
    streamed = pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=4 * small[:1].nbytes)
    ours, whole = (trace(pyels.ELS(bank, 3), NOISE, 3) for bank in (streamed, small))
    for name in ("x0", "influence", "weight"):
        torch.testing.assert_close(getattr(ours, name), getattr(whole, name), atol=1e-5, rtol=0)
    assert ours.bank == whole.bank
