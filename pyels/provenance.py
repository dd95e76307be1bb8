"""Why this pixel: which training images a sample is made of, at every step of the way to it.

At every noise level each pixel of a machine's estimate is a weighted mean of patches of the bank. A trace keeps whose,
and how the sample got there; of a network, what the machine makes of the network's own noisy images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyels.bank import PatchBank
from pyels.bank.selection import Selection
from pyels.checks import CPU, Levels, check_count, check_labels
from pyels.definition import Sources
from pyels.denoiser import Denoiser
from pyels.files import TensorFile, path_of, write_tensors
from pyels.machines import Machine
from pyels.records import parse_record
from pyels.sampling import Level, Step, ddim, levels_of
from pyels.schedules import Schedule

if TYPE_CHECKING:
    from pyels.explorer import Page

FORMAT = 1
_KEY = "pyels-trace"
_FORMAT = {"format": range(1, 1 << 31)}
_RECORD = {**_FORMAT, "machine": str, "sources": tuple(one.value for one in Sources), "bank": str, "per_step": {}}


def _kept(letters: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tensor of a trace; sizes of one letter are the same."""
    return field(metadata={"letters": letters, "dtype": dtype})


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """B samples on their way from noise, by S steps, the noisiest first; in CPU memory, float32 where nothing is said.

    Attributes
    ----------
    machine           what the machine computes, in words
    sources           "zeros", "circular", "interior" or "same_position" (see `pyels.definition.Sources`): whether
                      windows wrap around
    bank              the fingerprint of its bank
    per_step          what the machine was told at each step, by name S numbers; "patch_size" wherever windows have one
    t, alpha, sigma   (S,) float64             the noise level that each step starts from
    x                 (S, B, C, H, W)          the noisy image it starts from; x[0] is the noise, scaled
    x0                (S, B, R, H, W)          the machine's estimate at x
    network_x0        (S, B, C, H, W)          the network's, which led on; None: the machine's did
    sample            (B, C, H, W)             where the last step led
    entropy           (S, B, H, W)             of the machine's weights, nats (see `pyels.Posterior`)
    log_evidence      (S, B, H, W)             nats
    image             (S, B, H, W, top) int64  the heaviest sources of every pixel (see `pyels.Machine.sources`): which
                                               images of the bank; -1 where there are fewer, with weight 0
    row, column       (S, B, H, W, top) int64  the pixel at the centre of the source
    weight            (S, B, H, W, top)        its share of the pixel's whole weight, descending
    influence         (S, B, N)                the share of all pixels' weight that each image of the bank has
    candidates        (B, N) bool              the images that counted: all, those of a class, of a selection
    """

    machine: str
    sources: str
    bank: str
    per_step: Mapping[str, Sequence[Any]]
    t: Tensor = _kept("S", torch.float64)
    alpha: Tensor = _kept("S", torch.float64)
    sigma: Tensor = _kept("S", torch.float64)
    x: Tensor = _kept("SBCHW")
    x0: Tensor = _kept("SBRHW")
    network_x0: Tensor | None = _kept("SBCHW")
    sample: Tensor = _kept("BCHW")
    entropy: Tensor = _kept("SBHW")
    log_evidence: Tensor = _kept("SBHW")
    image: Tensor = _kept("SBHWT", torch.int64)
    row: Tensor = _kept("SBHWT", torch.int64)
    column: Tensor = _kept("SBHWT", torch.int64)
    weight: Tensor = _kept("SBHWT")
    influence: Tensor = _kept("SBN")
    candidates: Tensor = _kept("BN", torch.bool)

    __slots__ = ("__dict__", "__weakref__", "_made_by")  # the machine that it was made with is no field

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.t)

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))  # copies and pickles know no machine

    def __repr__(self) -> str:
        return f"Trace({len(self)} steps of {self.x.shape[1]} samples, by {self.machine})"

    def _repr_png_(self) -> bytes:
        """What notebooks show."""
        from pyels.notebook import png_of_trace

        return png_of_trace(self)

    def show(self, machine: Machine | None = None, sample: int = 0, **options: Any) -> Page:
        """One of the samples as a page to look into, pixel by pixel, where this is the last line of a notebook's cell.

        Parameters
        ----------
        machine  the machine it was made with; None: as `trace` was told, which files do not hold
        sample   which of the samples, from 0
        options  title, images and limit, as of `pyels.explorer.write_page`

        Raises
        ------
        TypeError, ValueError  as of `pyels.explorer.write_page`; no machine, and the trace is from a file
        """
        from pyels.explorer import page_of

        if (machine := machine or getattr(self, "_made_by", None)) is None:
            raise ValueError("a trace from a file has no training images: give show the machine it was made with")
        return page_of(self, machine, sample, **options)

    def check_bank(self, bank: PatchBank) -> None:
        """Raise ValueError unless the trace was made with these images and labels."""
        if bank.fingerprint() != self.bank:
            raise ValueError(
                f"the trace was made with a bank of checksum {self.bank}, but this one ({bank!r}) has "
                f"{bank.fingerprint()}; load the images that it was made with"
            )

    @property
    def levels(self) -> list[Level]:
        """The noise levels, and what the machine was told there."""
        rows = zip(self.t.tolist(), self.alpha.tolist(), self.sigma.tolist(), strict=True)
        told = [{name: values[i] for name, values in self.per_step.items()} for i in range(len(self))]
        return [Level(*row, one) for row, one in zip(rows, told, strict=True)]

    def save(self, path: str | Path) -> None:
        """Write it to a safetensors file, with a checksum, for `load`. Raises OSError where that cannot be."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        record = {name: getattr(self, name) for name in _RECORD if name != "format"}
        write_tensors(path_of(path), tensors, {_KEY: json.dumps({"format": FORMAT, **record})})

    @classmethod
    def load(cls, path: str | Path, bank: PatchBank | None = None) -> Trace:
        """Read what `save` wrote.

        Parameters
        ----------
        bank  where it is given, the trace must be of it

        Raises
        ------
        FileNotFoundError  no such file
        ValueError         a damaged file, one that is no trace, or of another format; another bank
        """
        path = path_of(path)
        file = TensorFile.read(path)
        try:
            if not file.has_checksum or _KEY not in file.metadata:
                raise ValueError("it has no checksum, or no record")
            if (found := parse_record(file.metadata[_KEY], _FORMAT)["format"]) != FORMAT:
                raise ValueError(f"its format is {found}, and this pyels reads {FORMAT}: make it anew")
            record = parse_record(file.metadata[_KEY], _RECORD)
            names = {one.name for one in fields(cls)}
            trace = cls(**{"network_x0": None} | {n: v for n, v in (record | file.tensors).items() if n in names})
            trace._check()
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path}: not a trace that can be read ({error})") from None
        if bank is not None:
            trace.check_bank(bank)
        return trace

    def _check(self) -> None:
        """Raise ValueError unless all shapes and dtypes agree, and all that is named is there."""
        sizes: dict[str, int] = {}
        for name, is_to_be in _TENSORS.items():
            if (value := getattr(self, name)) is None:
                continue
            here = list(zip(is_to_be["letters"], value.shape, strict=False))
            agrees = value.dtype == is_to_be["dtype"] and value.dim() == len(is_to_be["letters"])
            if not agrees or any(sizes.setdefault(letter, n) != n for letter, n in here):
                raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}")
        for name, letter in (("image", "N"), ("row", "H"), ("column", "W")):
            low, high = getattr(self, name).aminmax()
            if not -1 <= int(low) <= int(high) < sizes[letter]:
                raise ValueError(f"{name} reaches from {int(low)} to {int(high)}")
        for name, values in self.per_step.items():
            if not isinstance(values, list) or len(values) != len(self):
                raise ValueError(f"per_step has no {len(self)} values of {name}")


_TENSORS = {one.name: one.metadata for one in fields(Trace) if one.metadata}


def trace(
    machine: Machine,
    noise: Tensor,
    steps: int | Levels = 20,
    schedule: str | Schedule = "cosine",
    patch_sizes: Sequence[int] | None = None,
    labels: Any = None,
    callback: Callable[[Step], Any] | None = None,
    per_step: Mapping[str, Sequence[Any]] | None = None,
    *,
    network: Denoiser | None = None,
    selection: Selection | None = None,
    top: int = 8,
) -> Trace:
    """Draw samples as `pyels.sample` does, by DDIM, and keep what they are made of.

    A step of a machine costs a first and a second pass over its bank; memory does not grow with the bank, but for the
    influence of its images.

    Parameters
    ----------
    machine    a `pyels.Machine`, by an engine that has a second pass
    noise      (B, C, H, W) float32; noise, steps, schedule, patch_sizes, labels, callback and per_step as of
               `pyels.sample`. patch_sizes and per_step are told to the machine; labels restrict it to images of their
               classes, and are told to the network
    network    a denoiser that leads the way; the machine is asked at each of its noisy images. None: the machine leads
    selection  which images count, as `machine.bank.select` gives it, instead of labels
    top        how many of the heaviest sources of each pixel are kept

    Raises
    ------
    TypeError, ValueError  bad arguments, as `pyels.sample` raises them; per_step that is not numbers; an engine without
                           a second pass
    """
    if not isinstance(machine, Machine):
        raise TypeError(f"machine must be a pyels.Machine, whose sources can be told, got {type(machine).__name__}")
    if network is not None and not isinstance(network, Denoiser):
        raise TypeError(f"network must be a pyels.Denoiser, got {type(network).__name__}")
    for one in (machine, machine if network is None else network):
        one.check_images(noise)
    if network is None and machine.answer_shape(noise) != tuple(noise.shape):
        raise ValueError(
            f"the machine answers {machine.answer_shape(noise)} to noise {tuple(noise.shape)}, and cannot lead"
        )
    top, labels = check_count("top", top), check_labels(labels, len(noise))
    counting = machine.bank.selection_of(
        None if selection is not None and network is not None else labels, selection, len(noise)
    )
    levels = levels_of(machine, steps, schedule, patch_sizes, per_step)
    told = {name: [level.told[name] for level in levels] for name in levels[0].told}
    if any(not isinstance(value, (int, float)) for values in told.values() for value in values):
        raise TypeError("per_step of a trace are numbers, as files keep them; give selection by its own name")
    if (sizes := [machine.definition_of(**level.told).patch_size for level in levels])[0] is not None:
        told["patch_size"] = sizes
    kept: list[dict[str, Tensor]] = []

    def estimate(x: Tensor, level: Level) -> Tensor:
        query = machine.query(x, level.alpha, level.sigma, selection=counting, **level.told)
        posterior, heaviest, influence = machine.explain(query, top)
        x0 = machine.clipped(posterior.mean).to(x.dtype)
        known = {"x0": x0, "entropy": posterior.entropy, "log_evidence": posterior.log_evidence, "influence": influence}
        kept.append(known | heaviest._asdict())
        return x0 if network is None else network.denoise(x.clone(), level.alpha, level.sigma, labels=labels)

    def on_step(step: Step) -> None:
        kept[-1] |= {"x": step.x} if network is None else {"x": step.x, "network_x0": step.x0}
        kept[-1] = {name: value.to(CPU, _TENSORS[name]["dtype"]) for name, value in kept[-1].items()}
        if callback is not None:
            callback(replace(step, to=step.to.clone()))

    sample = ddim(estimate, noise * max(1.0, levels[0].sigma), levels, on_step)
    candidates = torch.zeros(len(noise), len(machine.bank), dtype=torch.bool, device=CPU)
    for _, images, queries in counting.sets():
        for b in queries:
            candidates[b, slice(images.start, images.stop) if isinstance(images, range) else images] = True
    numbers = {n: [getattr(level, n) for level in levels] for n in ("t", "alpha", "sigma")}
    tensors = {name: torch.tensor(values, dtype=torch.float64, device=CPU) for name, values in numbers.items()}
    tensors |= {name: torch.stack([step[name] for step in kept]) for name in kept[0]}
    made = Trace(
        network_x0=tensors.pop("network_x0", None),
        **tensors,
        sample=sample.cpu(),
        candidates=candidates,
        per_step=told,
        machine=_in_words(machine),
        sources=Sources(machine.definition.sources).value,
        bank=machine.bank.fingerprint(),
    )
    object.__setattr__(made, "_made_by", machine)
    return made


@dataclass(frozen=True, eq=False)
class Attribution:
    """Whom samples owe what, by `attribute`.

    Attributes
    ----------
    steps         (S, B) float64      what each step counts, sums to 1
    shares        (B, N) float64      the share of every image of the bank, sums to 1
    image, share  (B, top)            the images of the largest shares, int64, and these, descending
    pixel_image   (B, H, W) int64     the image that each pixel owes most to, as far as the sources kept tell; -1: none
    pixel_share   (B, H, W) float64   its share of the pixel
    """

    steps: Tensor
    shares: Tensor
    image: Tensor
    share: Tensor
    pixel_image: Tensor
    pixel_share: Tensor


def attribute(trace: Trace, top: int = 10) -> Attribution:
    """The images that samples owe most to over the whole way.

        share(i) = sum_s c_s influence_s(i),    c_s = |x0_s - x0_s-1|^2 / sum_s' |x0_s' - x0_s'-1|^2

    A step counts as far as the machine's estimate moved in it: what it has come to is owed to the images that had the
    weight then (x0 before the first step is the mean colour of that of the first). The last step alone would be the
    plain reading of DDIM, which ends at the last x0; but what that one is of was decided before.

    A share is of weight, not of what would be lost: an image with a near twin has half the share of one without, and
    leaving it out changes nothing. Flat background is owed to all that have it. See `without`.

    Parameters
    ----------
    top  how many images are named
    """
    top = min(check_count("top", top), trace.influence.shape[-1])
    before = torch.cat([trace.x0[:1].mean((-2, -1), keepdim=True).expand_as(trace.x0[:1]), trace.x0[:-1]])
    moved = (trace.x0 - before).double().square().sum((2, 3, 4))
    moved = torch.where(moved.sum(0) > 0, moved, 1.0)  # a picture without content
    steps = moved / moved.sum(0)
    owed = torch.zeros_like(trace.influence[0], dtype=torch.float64)
    for count, influence in zip(steps, trace.influence, strict=True):
        owed += count[:, None] * influence
    shares = owed / owed.sum(1, keepdim=True)
    share, image = shares.sort(descending=True, stable=True)
    return Attribution(steps, shares, image[:, :top], share[:, :top], *_owners(trace, steps))


def _owners(trace: Trace, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Of every pixel the image with the largest share among its sources at all steps, (B, H, W), and that share."""
    weight = trace.weight * steps[:, :, None, None, None]
    image, weight = (of.permute(1, 2, 3, 0, 4).flatten(3) for of in (trace.image, weight))
    image, order = image.sort(dim=-1)
    group = torch.zeros_like(image)  # one for each image of the pixel
    group[..., 1:] = (image[..., 1:] != image[..., :-1]).cumsum(-1)
    sums = torch.zeros_like(weight).scatter_add_(-1, group, weight.gather(-1, order))
    share, largest = sums.max(dim=-1, keepdim=True)
    first = (group == largest).int().argmax(dim=-1, keepdim=True)
    return image.gather(-1, first)[..., 0], share[..., 0]


def without(trace: Trace, machine: Machine, images: Any) -> Tensor:
    """What the samples would have been without some images of the bank: from the same noise, by the same steps.

    Parameters
    ----------
    trace    of a machine
    machine  the machine it was made with
    images   image numbers, for all samples, or a list of them for each

    Returns
    -------
    (B, C, H, W) float32

    Raises
    ------
    TypeError, ValueError  a network's trace; another machine or bank; numbers that are none of the bank's; a sample
                           that is left no image
    """
    if trace.network_x0 is not None:
        raise ValueError(
            "the way of this trace is a network's, and what it would have drawn without an image only training tells; "
            "trace the machine alone"
        )
    if _in_words(machine) != trace.machine:
        raise ValueError(f"the trace is of {trace.machine}, but the machine is {_in_words(machine)}")
    trace.check_bank(machine.bank)
    counted = [one.nonzero()[:, 0] for one in trace.candidates]
    selection = machine.bank.select(images=counted, without=images)

    def estimate(x: Tensor, level: Level) -> Tensor:
        return machine.denoise(x, level.alpha, level.sigma, selection=selection, **level.told).to(x.dtype)

    return ddim(estimate, trace.x[0], trace.levels, lambda step: None)


def _in_words(machine: Machine) -> str:
    return f"{type(machine).__name__}: {machine.definition!r}"
