"""Pictures say what they are of."""

import pytest
import torch

from pyels.schedules import make_schedule
from pyels.studies import plots
from pyels.studies.calibration import Calibration

DATA = {"dataset": "/somewhere/garments.npz", "bank": {"images": 300}}


@pytest.mark.parametrize(
    ("run", "title"),
    [
        (
            {"network": {"source": "/a/b/mine.py:build"}, "data": DATA, "seeds": [3, 4, 5]},
            "b/mine.py:build, garments.npz (300 images), seeds 3 to 5",
        ),
        (
            {"machine": "els", "boundary": "zeros", **DATA, "seed": 7, "num": 1},
            "els zeros, garments.npz (300 images), seed 7",
        ),
        (
            {"machine": "is", "boundary": None, **DATA, "seed": 0, "num": 4},
            "is, garments.npz (300 images), seeds 0 to 3",
        ),
        ({"network": "resnet", "data": DATA}, "resnet, garments.npz (300 images)"),
    ],
)
def test_titles(run, title):
    assert plots.title_of(run) == title


@pytest.mark.parametrize(
    ("parameter", "sizes", "scale"),
    [("patch_size", [3, 5], "linear"), ("threshold", [0.005, 0.05], "log"), ("mass", [0.3, 0.5], "linear")],
)
def test_the_axis_is_that_of_the_parameter(tmp_path, monkeypatch, parameter, sizes, scale):
    (drawn := []), monkeypatch.setattr(plots, "_save", lambda figure, path, title: drawn.append(figure))
    scores = torch.rand(2, 3, 2)
    calibration = Calibration([0.25, 0.5, 0.75], sizes, scores, scores, parameter=parameter)
    plots.draw_calibration(tmp_path / "a.png", calibration, make_schedule("cosine"))
    for axis in drawn[0].axes[:2]:
        assert axis.get_yscale() == scale
        assert axis.get_ylabel().startswith(parameter.replace("_", " "))
        assert [label.get_text() for label in axis.get_yticklabels()] == [f"{size:g}" for size in sizes]
    plots.draw_receptive_field(
        tmp_path / "b.png", torch.rand(3, 9, 9), calibration.times, None, make_schedule("cosine")
    )
    assert drawn[1].axes[0].get_title().startswith("t = 0.25\n")


def test_times_have_a_second_axis(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path, title: drawn.append((figure, title)))
    times, sizes = [0.25, 0.5, 0.75, 1.0], [3, 5]
    scores = torch.rand(2, 4, 2)
    calibration = Calibration(times, sizes, scores, scores, None)
    plots.draw_calibration(tmp_path / "a.png", calibration, make_schedule("flow"), "of what")
    plots.draw_receptive_field(
        tmp_path / "b.png", torch.rand(4, 9, 9), times, [3] * 4, make_schedule("flow"), "of what"
    )
    (both, title), (fields, other) = drawn
    assert title == other == "of what"
    for axis in both.axes[:2]:
        (top,) = axis.child_axes
        assert top.get_xlabel() == "sigma / alpha"
        assert [label.get_text() for label in top.get_xticklabels()] == ["0.33", "1", "3", "∞"]
    assert fields.axes[1].get_title().splitlines() == ["t = 0.50, k = 3", "sigma / alpha = 1"]
