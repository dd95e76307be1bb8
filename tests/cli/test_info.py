import json

from helpers import run_program as run

import pyels
from pyels.machines import MACHINES


def test_info(bank_file, capsys):
    assert run("info", "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert described["isa"] in pyels._core.available_isas()
    assert described["machines"] == list(MACHINES)
    assert run("info", "--dataset", bank_file, "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert described["images"] == 20
    assert described["images_per_class"] == {"0": 10, "1": 10}
    assert run("info") == 0
    assert pyels._core.isa_in_use() in capsys.readouterr().out
