"""Autoencoders: banks of latents, and pictures of what is drawn in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pyels.bank import PatchBank
from pyels.bank.archive import write_arrays
from pyels.bank.latents import Latents
from pyels.checks import CPU
from pyels.networks.adapters import in_words
from pyels.networks.identity import checksum
from pyels.networks.load import class_name, from_pretrained, import_diffusers, kind_of, load_python, place_of
from pyels.networks.modules import modules_of, ready, vary

DEVIATION = 0.5  # of latents, about that of pictures in [-1, 1]: so a noise level hides as much of either
_AT_ONCE = 1 << 18  # pixels
_MEASURED = 1000  # images by which latents are scaled
_OF_DIFFUSERS = ("AutoencoderKL", "AutoencoderTiny")


@dataclass(frozen=True)
class Autoencoder:
    """Pictures (B, C, H, W) in [-1, 1] to latents (B, c, h, w) and back, float32 in CPU memory, a few at a time.

    Attributes
    ----------
    model   an object with encode(x) and decode(z), such as one of diffusers, of whose posterior the mean is taken, and
            whose scaling_factor and shift_factor are kept to
    source  where it was read
    crc32   its checksum
    device  where it works
    """

    model: Any
    source: str
    crc32: str
    device: torch.device = CPU

    def encode(self, x: Tensor) -> Tensor:
        shift, factor = self._factors()
        return (self._ask("encode", x) - shift) * factor

    def decode(self, z: Tensor) -> Tensor:
        shift, factor = self._factors()
        return self._ask("decode", z / factor + shift)

    def _factors(self) -> tuple[float, float]:
        config = getattr(self.model, "config", None)
        shift, factor = (getattr(config, name, None) for name in ("shift_factor", "scaling_factor"))
        return shift or 0.0, factor or 1.0

    def _ask(self, name: str, given: Tensor) -> Tensor:
        answers = [self._answer(name, given[:1])]  # which says how large both are
        length = max(1, _AT_ONCE // max(images[0, 0].numel() for images in (given, answers[0])))
        answers += [self._answer(name, given[i : i + length]) for i in range(1, len(given), length)]
        return torch.cat(answers)

    @torch.no_grad()
    def _answer(self, name: str, given: Tensor) -> Tensor:
        try:
            out = getattr(self.model, name)(given.to(self.device))
            out = out.latent_dist.mode() if hasattr(out, "latent_dist") else out
            out = next((getattr(out, part) for part in ("latents", "sample") if hasattr(out, part)), out)
        except Exception as error:  # one of one's own may fail in any way
            shape = "x".join(map(str, given.shape[1:]))
            raise ValueError(
                f"{self.source}: the autoencoder cannot {name} images of {shape}: {in_words(error)}"
            ) from error
        if not isinstance(out, Tensor) or out.dim() != 4 or len(out) != len(given):
            what = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"{self.source}: {name} gave {what} for {tuple(given.shape)}; it must give (B, c, h, w)")
        if not torch.isfinite(out).all():
            raise ValueError(f"{self.source}: {name} gave NaN or infinite values")
        return out.float().cpu()


def load_autoencoder(source: str | Path, device: torch.device = CPU) -> Autoencoder:
    """An autoencoder from disk.

    Parameters
    ----------
    source  FILE.py:NAME, a Python file of your own and the name in it of an object with encode(x) and decode(z), or of
            a function without arguments that returns one; or a folder in which diffusers saved an AutoencoderKL or
            AutoencoderTiny, or a pipeline that has one. No pickle is read

    Raises
    ------
    FileNotFoundError, ValueError  there is no autoencoder there; ImportError: diffusers is needed and not installed
    """
    path, name = place_of(source, "autoencoder", "the object with encode and decode")
    folder = path / "vae" if (path / "vae").is_dir() else path
    if name:
        model, where, files = load_python(path, name), f"{path}:{name}", [path]
    elif (folder / "config.json").exists():
        kind = class_name(folder / "config.json")
        if kind not in _OF_DIFFUSERS:
            raise ValueError(f"{source}: needed is one of {', '.join(_OF_DIFFUSERS)} of diffusers, got {kind}")
        model, where = from_pretrained(getattr(import_diffusers(folder), kind), folder), str(folder)
        files = [folder / "config.json"]
    else:
        there = "no config.json, as diffusers saves it with an autoencoder" if path.is_dir() else "no such folder"
        raise FileNotFoundError(f"{source}: {there}; one of your own is given as FILE.py:NAME")
    if not all(callable(getattr(model, name, None)) for name in ("encode", "decode")):
        raise ValueError(f"{where} gave {kind_of(model)}; it must be or return an object with encode(x) and decode(z)")
    # Of a model of diffusers, which knows the folder it was read from, the weights.
    crc32 = checksum(model if name else dict(model.state_dict()), *files)
    model = ready(model).to(device) if isinstance(model, nn.Module) else model
    if varying := vary([*modules_of(model.encode), *modules_of(model.decode)]):
        raise ValueError(
            f"{where}: the autoencoder has {' and '.join(varying)} in training mode, or without running statistics: "
            "its answers differ from call to call, or with what else is in the batch; call .eval() before"
        )
    return Autoencoder(model, where, crc32, device)


@dataclass(frozen=True)
class Trial:
    """What an autoencoder makes of some images of a bank.

    Attributes
    ----------
    latents    the space in which they are stored
    pictures   (n, C, H, W) some of the images
    decoded    (n, C, H, W) what it gives back
    error      mean squared error of what it gives back
    variance   of the images
    """

    latents: Latents
    pictures: Tensor
    decoded: Tensor
    error: float
    variance: float


def measure(bank: PatchBank, autoencoder: Autoencoder, as_is: bool = False, like: Latents | None = None) -> Trial:
    """Try an autoencoder on up to 1,000 images, and scale its latents by them.

    Parameters
    ----------
    as_is  do not shift or scale them
    like   shift and scale them as these
    """
    if bank.latents is not None:
        raise ValueError("these are latents already: give the data set of the pictures")
    if like is not None and like.crc32 != autoencoder.crc32:
        raise ValueError(of_another(like, autoencoder))
    x = bank.read(torch.linspace(0, len(bank) - 1, min(len(bank), _MEASURED), device=CPU).round().long())
    z = autoencoder.encode(x)
    decoded = autoencoder.decode(z)
    if decoded.shape != x.shape:
        made, given = ("x".join(map(str, images.shape[1:])) for images in (decoded, x))
        raise ValueError(
            f"{autoencoder.source}: the autoencoder makes pictures of {made} of those of {given}: it is for another "
            "size (--size)"
        )
    shift, scale = torch.zeros(z.shape[1]), 1.0
    if not as_is:
        shift = z.double().mean(dim=(0, 2, 3))
        scale = DEVIATION / max(1e-12, float((z - shift[:, None, None]).square().mean().sqrt()))
    latents = Latents(autoencoder.source, autoencoder.crc32, bank.shape, tuple(shift.tolist()), scale)
    if like is not None:
        latents = replace(latents, shift=like.shift, scale=like.scale)
    error, variance = (float(values) for values in ((decoded - x).square().mean(), x.var()))
    return Trial(latents, x, decoded, error, variance)


def write_latents(path: str | Path, bank: PatchBank, autoencoder: Autoencoder, latents: Latents, half: bool) -> None:
    """Write the latents of all images, with the bank's labels and class names, as an npz for `PatchBank.load`."""
    length = max(1, _AT_ONCE // (bank.shape[1] * bank.shape[2]))
    dtype = torch.float16 if half else torch.float32

    def pieces() -> Iterator[Tensor]:
        with tqdm(total=len(bank), desc="encoding", unit="image") as bar:
            for i in range(0, len(bank), length):
                stored = latents.scaled(autoencoder.encode(bank.read(slice(i, i + length)))).to(dtype)
                if not torch.isfinite(stored).all():
                    raise ValueError("latents reach beyond what float16 holds; leave out --half")
                yield stored
                bar.update(len(stored))

    _, c, h, w = autoencoder.encode(bank.read(slice(0, 1))).shape
    write_arrays(path, (len(bank), c, h, w), dtype, pieces(), latents, labels=bank.labels, class_names=bank.class_names)


def decoder_of(bank: PatchBank, source: str | None = None) -> Callable[[Tensor], Tensor]:
    """What makes pictures of the images of a bank: of latents the autoencoder, of others nothing.

    Parameters
    ----------
    source  where the autoencoder is now; None: where it was

    Raises
    ------
    FileNotFoundError, ValueError  it is not there, or another one is; it was given, but the bank is not of latents
    """
    latents = bank.latents
    if latents is None:
        if source is not None:
            raise ValueError(
                "--autoencoder is for banks of latents, as pyels encode writes them; this one is of pictures"
            )
        return lambda images: images
    try:
        autoencoder = load_autoencoder(source or latents.source)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} (the bank is of latents: say where their autoencoder is with --autoencoder)"
        ) from None
    if autoencoder.crc32 != latents.crc32:
        raise ValueError(of_another(latents, autoencoder))

    def decode(images: Tensor) -> Tensor:
        return autoencoder.decode(latents.unscaled(images))

    return decode


def of_another(latents: Latents, autoencoder: Autoencoder) -> str:
    return (
        f"{autoencoder.source} (checksum {autoencoder.crc32}) is another autoencoder than that of the {latents}, or it "
        "has changed"
    )
