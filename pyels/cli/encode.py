"""`pyels encode`: a bank of latents."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pyels import datasets
from pyels.checks import check_device
from pyels.cli.options import command, option
from pyels.cli.settings import DatasetOptions, JsonOptions, MemoryOptions, ThreadOptions
from pyels.networks.latent import load_autoencoder, measure, write_latents
from pyels.studies import plots

_SHOWN = 10  # pictures


@dataclass(frozen=True, kw_only=True)
class Encode(DatasetOptions, MemoryOptions, ThreadOptions, JsonOptions):
    autoencoder: str | None = option(
        None,
        "FILE.py:NAME, an object of your own with encode(x) and decode(z), or a folder in which diffusers saved an "
        "AutoencoderKL or AutoencoderTiny.  [default: that of --like]",
    )
    like: str | None = option(None, "Scale as this bank of latents, such as that of the other split.")
    as_is: bool = option(False, "Keep the scale of the autoencoder, as a network does that others trained in it.")
    half: bool = option(False, "Store the latents in float16.")
    device: str | None = option(None, "Of the autoencoder: cpu, cuda, cuda:1 ..  [default: cpu]")
    out: Path = option(Path("latents.npz"), "The bank, an npz; a picture with its name is written beside it.")


@command(Encode)
def encode_command(given: Encode) -> None:
    """Encode a data set by an autoencoder, for machines and networks that work in latents.

    Writes a bank that --dataset of the other commands takes: latents, moved so that the mean of every channel is 0 and
    scaled so that they deviate from it by 0.5, which is about what pictures do; labels; and which autoencoder made
    them. Beside it a PNG has some images above what the autoencoder gives back.
    """
    if given.out.suffix != ".npz":
        raise ValueError(f"--out must be an npz file, such as {given.out}.npz")
    picture = given.out.with_suffix(".png")
    if taken := next((path for path in (given.out, picture) if os.path.lexists(path)), None):
        raise ValueError(f"{taken} is there already: choose another --out, or delete it")
    like = None
    if given.like is not None:
        like = datasets.load(given.like).latents
        if like is None:
            raise ValueError(f"--like {given.like} is no bank of latents, as pyels encode writes them")
    if like is not None and given.as_is:
        raise ValueError("give either --like or --as-is, not both")
    source = given.autoencoder or (None if like is None else like.source)
    if source is None:
        raise ValueError("--autoencoder is needed, or --like")
    given.tell_torch()
    autoencoder = load_autoencoder(source, check_device(given.device or "cpu"))
    bank = given.read(memory_limit=given.memory_limit)
    trial = measure(bank, autoencoder, given.as_is, like)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_latents(given.out, bank, autoencoder, trial.latents, given.half)
    made = datasets.load(given.out)
    rows = [
        plots.Row(name, images[:_SHOWN]) for name, images in (("given", trial.pictures), ("decoded", trial.decoded))
    ]
    share, latents = trial.error / max(trial.variance, 1e-12), trial.latents.record()
    plots.draw_rows(picture, rows, title=f"{'/'.join(Path(source).parts[-2:])}, {Path(given.dataset).name}")
    result = given.record(out=str(given.out), **given.record_of_data(bank), latents=latents)
    result |= {"shape": list(made.shape), "error": trial.error, "variance": trial.variance}
    shapes = ("x".join(map(str, shape)) for shape in (bank.shape, made.shape))
    line = f"{len(made)} images of {' as latents of '.join(shapes)}; decoded again they are off by a mean square of "
    given.show(
        result, [f"{line}{trial.error:.3g}, {share:.1%} of their variance; bank: {given.out}; picture: {picture}"]
    )
