"""What is told on standard error: how far a command is, and why it ended."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from tqdm import tqdm

from pyels import distributed
from pyels.sampling import Step

GO_ON = "finished samples are kept: repeat the command to go on"


def report(line: str) -> None:
    """Print on standard error why the program ends; of several processes, the first that ends says it."""
    try:
        several = distributed.launched() > 1
    except ValueError:  # which may be what is reported
        several = False
    if several:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which torchrun sends as soon as another one has ended
        if not distributed.first_to_report():
            return
        line = "\n" + line  # not behind the progress bar that a killed process left
    tqdm.write(line, file=sys.stderr)  # nor behind one of this process


def show_warning(message: Warning | str, *_: Any) -> None:
    """As `warnings.showwarning`, without the line of code that the user of a command has not written."""
    tqdm.write(f"pyels: warning: {' '.join(str(message).split())}", file=sys.stderr)


def join_processes() -> None:
    """`distributed.join`; from then on, what torchrun does when one of the processes has ended is reported."""
    distributed.join()  # where the default action of the signal ends the wait for the others
    if distributed.size() > 1:
        signal.signal(signal.SIGTERM, _terminated)


def _terminated(*_: Any) -> None:
    report(f"pyels: error: another process of this run ended, or it was stopped from outside; {GO_ON}")
    sys.exit(1)  # which lets files be closed and threads end


class StepBar:
    """Progress in steps of denoisers over samples of `steps` steps each, and `more` of some of them. May be told by
    several threads."""

    def __init__(self, samples: int, steps: int, what: str = "sampling", more: int = 0) -> None:
        self._bar = tqdm(total=samples * steps + more, desc=what, unit="step", file=sys.stderr)
        self._steps = steps
        self._lock = threading.Lock()

    def __enter__(self) -> StepBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def skip(self) -> None:
        with self._lock:
            self._bar.update(self._steps)

    def step(self, step: Step) -> None:
        with self._lock:
            self._bar.update()
