"""The same machine on a bank in memory and streamed from its file within a memory limit: rates and resident memory.

    python benchmarks/out_of_core.py                                  # Fashion-MNIST, ELS at k = 3 and 13
    python benchmarks/out_of_core.py bank.npz --machines is ls:3      # any data set name or bank file

The two take turns; medians of the seconds of one `denoise`. The file is in the page cache, as it is after a first pass,
which compares the results. Resident memory is that of a fresh process: by how much its peak exceeds what it held before
it loaded the bank.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

import pyels

ALPHA, SIGMA = 0.8, 0.6


def make(spec, bank):
    kind, _, size = spec.partition(":")
    machine = {"is": pyels.IS, "es": pyels.ES, "ls": pyels.LS, "els": pyels.ELS}[kind]
    return machine(bank, int(size)) if size else machine(bank)


def load(path, limit):
    bank = pyels.PatchBank.load(path, memory_limit=limit)
    return bank if bank.streamed else pyels.PatchBank(bank.images.clone(), bank.labels)


def query(bank, batch):
    noise = torch.randn((batch, *bank.shape), generator=torch.Generator().manual_seed(0))
    return ALPHA * bank.read(torch.arange(batch) % len(bank)) + SIGMA * noise


def status(field):
    """A line of /proc/self/status, in MB."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024 / 1e6


def resident(spec, path, limit, batch):
    """MB by which the peak exceeds what was held before, of a process that runs one `denoise`."""
    arguments = [sys.executable, __file__, path, "--machines", spec, "--batch", batch, "--child", limit or 0]
    return float(subprocess.run(list(map(str, arguments)), check=True, capture_output=True, text=True).stdout)


def child(spec, path, limit, batch):
    small = pyels.PatchBank(torch.zeros((2, *pyels.PatchBank.load(path, memory_limit=limit).shape), dtype=torch.uint8))
    make(spec, small).denoise(query(small, 1), ALPHA, SIGMA)  # loads what the first call loads
    before = status("VmRSS")
    bank = load(path, limit)
    make(spec, bank).denoise(query(bank, batch), ALPHA, SIGMA)
    print(status("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", default="fashion-mnist")
    parser.add_argument("--machines", nargs="+", default=["els:3", "els:13"], help="is, es, ls:K, els:K")
    parser.add_argument("--fraction", type=int, default=8, help="the limit is the bank's size by this")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.machines[0], options.dataset, options.child or None, options.batch)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank.npz"
        pyels.datasets.load(options.dataset).save(path)
        memory = load(path, None)
        limit = memory.nbytes // options.fraction
        streamed, x = load(path, limit), query(memory, options.batch)
        rows = []
        for spec in options.machines:
            contenders = {"memory": make(spec, memory), "streamed": make(spec, streamed)}
            results = {name: machine.denoise(x, ALPHA, SIGMA) for name, machine in contenders.items()}
            difference = float((results["streamed"] - results["memory"]).abs().max())
            assert difference < 5e-6, difference  # the engine's own rounding, in another order
            seconds = {name: [] for name in contenders}
            for _ in range(options.repeats):
                for name, machine in contenders.items():
                    started = time.perf_counter()
                    machine.denoise(x, ALPHA, SIGMA)
                    seconds[name].append(time.perf_counter() - started)
            times = {name: median(values) for name, values in seconds.items()}
            rows.append(
                {
                    "machine": spec,
                    "largest difference": difference,
                    "seconds": {name: round(value, 4) for name, value in times.items()},
                    "rate of streamed to memory": round(times["memory"] / times["streamed"], 3),
                    "resident MB": {
                        "memory": round(resident(spec, path, None, options.batch), 1),
                        "streamed": round(resident(spec, path, limit, options.batch), 1),
                    },
                }
            )
        head = {"bank": repr(memory), "MB": memory.nbytes / 1e6, "limit MB": limit / 1e6}
        print(json.dumps({**head, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
