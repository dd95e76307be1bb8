import pytest
import torch

from pyels.networks.prediction import PREDICTIONS, target, x0_from

LEVELS = [(1.0, 0.0), (0.99, 0.1), (0.6, 0.8), (0.05, 0.999), (0.0, 1.0), (3.0, 4.0)]


def column(*levels):
    return torch.tensor(levels, dtype=torch.float64)[:, None, None, None]


@pytest.mark.parametrize("predicts", [*PREDICTIONS, "sum"])
def test_x0_follows_from_what_a_perfect_network_predicts(predicts, monkeypatch):
    monkeypatch.setitem(PREDICTIONS, "sum", lambda alpha, sigma: (1, -2, 1))  # a new one is a line
    alpha, sigma = (column(*values) for values in zip(*LEVELS, strict=True))
    known = torch.tensor([predicts != "score" or s > 0 for _, s in LEVELS])  # which is infinite at sigma = 0
    known &= torch.tensor([predicts not in ("eps", "score") or a > 0 for a, _ in LEVELS])
    alpha, sigma = alpha[known], sigma[known]
    x0, noise = torch.randn(2, len(alpha), 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = target(predicts, x0, noise, alpha, sigma)
    torch.testing.assert_close(x0_from(predicts, y, alpha * x0 + sigma * noise, alpha, sigma), x0)


@pytest.mark.parametrize("predicts", ["eps", "score"])
def test_noise_alone_says_nothing_of_x0(predicts):
    y = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match=rf"predicts {predicts} says nothing of x0 at alpha = 0, sigma = 0\.9"):
        x0_from(predicts, y, y, column(0.6, 0.0), column(0.8, 0.9))


def test_what_the_formula_would_spoil():
    """Scores stay finite without noise, and a predicted x0 is passed on as it is, not multiplied and divided."""
    x, y = torch.randn(2, 8, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    clean = column(*[1.0] * 8), column(*[0.0] * 8)
    assert torch.equal(x0_from("score", y, x, *clean), x)
    for levels in (clean, (column(*[0.7] * 8), column(*[0.3] * 8))):
        assert torch.equal(x0_from("x0", y, x, *levels), y)
