"""How an engine is chosen, and whose options are whose."""

import pytest
import torch
from helpers import make_bank, noisy

import pyels
from pyels.engines import Cpu, Reference, Sampled, available_engines, find_engine


def test_names_and_aliases(small):
    assert find_engine("faiss") is find_engine("sampled")
    assert pyels.ELS(small, 3, engine="faiss").engine.name == "sampled"
    assert {"reference", "cpu", "sampled"} <= set(available_engines())
    with pytest.raises(ValueError, match="engine must be one of auto, reference, cpu, cuda, sampled, faiss, got 'gpu'"):
        pyels.ELS(small, 3, engine="gpu")


def test_options_are_the_engines_own(small):
    x = noisy(small, 0.6, 0.8)
    assert pyels.ELS(small, 3, engine="cpu", threads=2).engine.threads == 2
    assert pyels.ELS(small, 3, engine="sampled", tolerance=0.5).engine.tolerance == 0.5
    # Those of other engines are checked, and have no effect.
    exact = pyels.ELS(small, 3, tolerance=0.5, precision="high", threads=1)
    assert torch.equal(exact.denoise(x, 0.6, 0.8), pyels.ELS(small, 3, engine=Cpu(3)).denoise(x, 0.6, 0.8))
    for option, error, why in (
        ({"threads": 0}, ValueError, "threads must be between 1 and 4096, got 0"),
        ({"threads": 2.0}, TypeError, "threads must be an int"),
        ({"tolerance": -1}, ValueError, "tolerance must be positive"),
        ({"precision": "low"}, ValueError, "precision must be one of highest, high"),
        ({"lanes": 3}, TypeError, "unknown argument 'lanes'; engines have the options .*threads"),
    ):
        with pytest.raises(error, match=why):
            pyels.ELS(small, 3, **option)


def test_an_engine_may_be_given_itself(small):
    x = noisy(small, 0.6, 0.8)
    machine = pyels.ELS(small, 3, engine=Reference())
    assert machine.denoise(x, 0.6, 0.8).dtype == torch.float64
    with pytest.raises(TypeError, match=r"options are given to the engine, Reference\(\.\.\)"):
        pyels.ELS(small, 3, engine=Reference(), threads=2)
    with pytest.raises(ValueError, match="threads must be between"):
        Cpu(threads=0)


def test_one_engine_for_two_banks(tmp_path):
    pytest.importorskip("faiss")
    bank, sampled = make_bank(300, (1, 12, 12)), Sampled(index=tmp_path / "a")
    x = noisy(bank, 0.6, 0.8)
    pyels.ELS(bank, 5, engine=sampled).denoise(x, 0.6, 0.8)
    with pytest.raises(ValueError, match="is an index with bank_crc32"):
        pyels.ELS(bank[:250], 5, engine=sampled).denoise(x, 0.6, 0.8)


def test_queries_are_made_by_denoisers(small):
    machine, x = pyels.ELS(small, 3), noisy(small, 0.6, 0.8)
    with pytest.raises(TypeError, match=r"query must be what machine\.query\(.*\) gives, got Tensor"):
        machine.partial(x)
    with pytest.raises(TypeError, match=r"alpha and sigma of a Query are \(B,\) float64"):
        pyels.Query(x, 0.6, 0.8)
    other = pyels.ELS(make_bank(3, (1, 4, 4)), 3)
    with pytest.raises(ValueError, match="x has images of shape"):
        machine.partial(other.query(torch.zeros(1, 1, 4, 4), 0.6, 0.8))
    with pytest.raises(ValueError, match="patch_size 5 was given, but WholeImage has none"):
        pyels.IS(small).pairs(None, 5)


def test_why_an_engine_was_chosen_is_logged(small, caplog):
    caplog.set_level("INFO", logger="pyels")
    pyels.ELS(small, 3)
    assert "engine cpu: the bank is on cpu" in caplog.text
    pyels.ELS(small, 3, engine="reference")
    assert "engine reference: asked for" in caplog.text


def test_wishes_that_a_denoiser_has_not(small):
    x = noisy(small, 0.6, 0.8)
    with pytest.raises(TypeError, match="ELS has no argument 'speed'; beyond patch_size it has tolerance, selection"):
        pyels.ELS(small, 3).denoise(x, 0.6, 0.8, speed=2)
    network = pyels.NetworkDenoiser(lambda x, t, labels: x, predicts="x0")
    with pytest.raises(TypeError, match="NetworkDenoiser has no argument 'tolerance'; beyond patch_size it has none"):
        network.denoise(x, 0.6, 0.8, tolerance=0.1)


def test_a_denoiser_of_ones_own():
    class Shrink(pyels.Denoiser):
        def estimate(self, query):
            return query.x / (query.alpha + query.sigma).float()[:, None, None, None]

    class Old(pyels.Denoiser):
        def denoise(self, x, alpha, sigma, labels=None, patch_size=None):
            return x / (alpha + sigma)

    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Shrink().eps(x, 0.6, 0.8), Old().eps(x, 0.6, 0.8))
    torch.testing.assert_close(pyels.sample(Shrink(), x, 3), pyels.sample(Old(), x, 3))
    with pytest.raises(TypeError, match=r"Denoiser must define estimate\(query\)"):
        pyels.Denoiser().denoise(x, 0.6, 0.8)
