import numpy as np
import pytest
import torch

from pyels import metrics


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 3, 8, 8, generator=generator)
    return a, a + 0.5 * torch.randn(a.shape, generator=generator)


def test_definitions(pair):
    a, b = pair
    for i in range(5):
        x, y = a[i].double().numpy().ravel(), b[i].double().numpy().ravel()
        r = np.corrcoef(x, y)[0, 1]
        assert metrics.pearson_r(a, b)[i] == pytest.approx(r, abs=1e-12)
        assert metrics.pearson_r2(a, b)[i] == pytest.approx(r**2, abs=1e-12)
        assert metrics.r2_score(a, b)[i] == pytest.approx(1 - ((x - y) ** 2).sum() / ((x - x.mean()) ** 2).sum())
        assert metrics.mse(a, b)[i] == pytest.approx(((x - y) ** 2).mean())
        assert metrics.cosine(a, b)[i] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def test_shape_and_self_agreement(pair):
    a, _ = pair
    for measure, best in ((metrics.pearson_r, 1), (metrics.pearson_r2, 1), (metrics.r2_score, 1), (metrics.cosine, 1)):
        torch.testing.assert_close(measure(a, a), torch.full((5,), best, dtype=torch.float64))
    assert (metrics.mse(a, a) == 0).all()
    assert (metrics.r2_score(a, -10 * a) < 0).all()


def test_constant_images_give_no_nan():
    flat, other = torch.full((1, 1, 4, 4), 0.1), torch.randn(1, 1, 4, 4)
    for measure in (metrics.pearson_r, metrics.pearson_r2, metrics.r2_score, metrics.cosine, metrics.mse):
        for a, b in ((flat, other), (other, flat), (flat, flat), (0 * flat, 0 * flat)):
            assert torch.isfinite(measure(a, b)).all()
    assert float(metrics.pearson_r(flat, other)) == 0
    assert float(metrics.r2_score(flat, flat)) == 1


@pytest.mark.parametrize(
    ("a", "b", "error"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), "same shape"),
        (torch.zeros(3), torch.zeros(3), r"shape \(B"),
        (torch.full((1, 2), torch.nan), torch.zeros(1, 2), "NaN"),
    ],
)
def test_bad_input(a, b, error):
    with pytest.raises(ValueError, match=error):
        metrics.pearson_r(a, b)
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        metrics.mse(np.zeros((1, 2)), a)
