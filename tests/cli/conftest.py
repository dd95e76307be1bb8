import pytest
from helpers import make_bank


@pytest.fixture
def bank_file(tmp_path):
    make_bank(20, (1, 8, 8), labels=[0, 1] * 10).save(tmp_path / "bank.npz")
    return tmp_path / "bank.npz"
