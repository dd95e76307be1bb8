import json

from helpers import run_program as run

import pyels
from pyels.files import read_tensors


def test_demo(tmp_path, capsys):
    assert run("demo", "--num", 2, "--seed", 3, "--out", tmp_path / "demo", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["seeds"] == [3, 4]
    for machine in ("els", "ls", "is"):
        assert set(report["median"][machine]) == {"pearson_r", "pearson_r2", "r2_score"}
    assert report["median"]["els"]["pearson_r"] > 0.85
    assert report["els_beats_is"] == report["beats_is"]["els"]["share"] == 1.0
    tensors = read_tensors(tmp_path / "demo" / "demo.safetensors")
    r = pyels.metrics.pearson_r(tensors["network"], tensors["els"])
    assert report["per_seed"]["els"]["pearson_r"] == r.tolist()
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == [
        "demo.png",
        "demo.safetensors",
        "report.json",
        "run.json",
    ]
