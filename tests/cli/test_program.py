import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers import make_bank
from helpers import run_program as run

import pyels


def test_unwritable_output_folder():
    """As a user without rights, which root becomes for the purpose."""
    code = (
        "import os, sys, pyels.cli.sample; pyels.datasets.load(sys.argv[1]); os.getuid() == 0 and os.setuid(65534); "
        "pyels.cli.main(['sample', '--dataset', sys.argv[1], '--patch-size', '3', '--out', '/no-rights-here'])"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        make_bank(5, (1, 8, 8)).save(Path(folder) / "bank.npz")
        ended = subprocess.run(
            [sys.executable, "-c", code, str(Path(folder) / "bank.npz")], capture_output=True, text=True, check=False
        )
    assert ended.returncode == 2
    assert re.search(r"pyels: error: .*Permission denied: '/no-rights-here", ended.stderr.splitlines()[-1])
    assert "Traceback" not in ended.stderr


def test_interrupt_inside_a_long_call_ends_it_at_once(tmp_path):
    """Ctrl-C while the engine is at work on a single call of many seconds."""
    code = (
        "import torch, pyels; print('go', flush=True); bank = pyels.PatchBank(torch.zeros(100000, 1, 28, 28, "
        "dtype=torch.uint8)); pyels.ELS(bank, 7, 'circular').denoise(torch.zeros(1, 1, 28, 28), 0.5, 0.8)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "go\n"
    time.sleep(1.0)
    started = time.time()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert time.time() - started < 10
    assert "KeyboardInterrupt" in err


def test_help_of_everything(capsys):
    for arguments in ((), ("demo",), ("sample",), ("train",), ("check",), ("calibrate",), ("compare",), ("info",)):
        assert run(*arguments, "--help") == 0
        assert "Usage: pyels" in capsys.readouterr().out
    assert run("--version") == 0
    assert pyels.__version__ in capsys.readouterr().out
