"""Which images of a bank count for each query."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyels.checks import CPU

ALL, LIST = "all", "images-"  # the name of all images; what those of lists begin with


@dataclass(frozen=True, eq=False)
class Selection:
    """Query b is compared with the images order[begin[b]] .. order[end[b] - 1] of a bank, whose numbers ascend.

    Made by `PatchBank.select`. All images, those of a class, a list, all but some, and one process's share are the same
    to an engine.

    Attributes
    ----------
    bank_size  number of images of the bank
    order      (M,) int64 image numbers, those of one set side by side; None: 0 .. N-1
    begin      (B,) int64, in CPU memory; (1,) where it serves any number of queries
    end        (B,) int64, likewise
    names      (B,) what the set of images of each query is called: sets of one name are the same; may stand in the name
               of a file
    """

    bank_size: int
    order: Tensor | None
    begin: Tensor
    end: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.begin)

    @property
    def counts(self) -> Tensor:
        """(B,) int64 number of images of each query."""
        return self.end - self.begin

    def expand(self, batch: int) -> Selection:
        """The same for so many queries. Raises ValueError where it was made for another number of them."""
        if len(self) == batch:
            return self
        if len(self) != 1:
            raise ValueError(f"the selection is for {len(self)} queries, but x has {batch} images; give one for each")
        return self.of([0] * batch)

    def of(self, queries: Sequence[int]) -> Selection:
        """That of some of the queries."""
        which = torch.tensor(queries, dtype=torch.int64, device=CPU)
        return replace(self, begin=self.begin[which], end=self.end[which], names=tuple(self.names[b] for b in queries))

    def share(self, part: int, parts: int) -> Selection:
        """Of every query's images part number `part`, 0 .. parts - 1; the parts have none in common and are together
        all."""
        first, last = (self.begin + self.counts * i // parts for i in (part, part + 1))
        names = tuple(f"{name}-share{part + 1}of{parts}" for name in self.names)
        return replace(self, begin=first, end=last, names=names)

    def nothing(self) -> Selection:
        """No image for any query."""
        return replace(self, order=None, begin=torch.zeros_like(self.begin), end=torch.zeros_like(self.begin))

    def sets(self) -> Iterator[tuple[str, range | Tensor, list[int]]]:
        """Every set of images once: its name, its image numbers, and the queries that it is for."""
        queries: dict[str, list[int]] = {}
        for b, name in enumerate(self.names):
            queries.setdefault(name, []).append(b)
        for name, bs in queries.items():
            begin, end = int(self.begin[bs[0]]), int(self.end[bs[0]])
            yield name, range(begin, end) if self.order is None else self.order[begin:end], bs

    def images(self) -> range | Tensor:
        """All images that some query needs, ascending."""
        sets = [images for _, images, _ in self.sets() if len(images)]
        if len(sets) <= 1:
            return sets[0] if sets else range(0)
        together: Tensor = torch.cat([as_numbers(images) for images in sets]).unique()  # type: ignore[no-untyped-call]
        return together

    def among(self, numbers: Tensor) -> Selection:
        """The same for neighbours in `images`, (n,): images then are places in `numbers`."""
        sets = list(self.sets())
        if self.order is None and len(sets) == 1:
            begin, end = torch.zeros_like(self.begin), torch.full_like(self.end, len(numbers))
            return replace(self, begin=begin, end=end)
        begin, end = torch.zeros_like(self.begin), torch.zeros_like(self.end)
        ends = torch.stack([numbers[0], numbers[-1] + 1])
        order: list[Tensor] = []
        for _, images, queries in sets:
            images = as_numbers(images)
            first, last = torch.searchsorted(images, ends).tolist()
            begin[queries] = sum(map(len, order))
            order.append(torch.searchsorted(numbers, images[first:last]))
            end[queries] = sum(map(len, order))
        return replace(self, order=torch.cat(order), begin=begin, end=end)


def check_selection(selection: Selection) -> Selection:
    if not isinstance(selection, Selection):
        raise TypeError(f"selection must be what bank.select(..) gives, got {type(selection).__name__}")
    order, begin, end = selection.order, selection.begin, selection.end
    last = selection.bank_size if order is None else len(order)
    sound = bool(((begin >= 0) & (begin <= end) & (end <= last)).all())
    if order is not None and len(order):
        sound &= 0 <= int(order.min()) <= int(order.max()) < selection.bank_size
    if not sound:
        raise ValueError("selection has images that its bank has not; make one by bank.select(..)")
    return selection


def as_numbers(images: range | Tensor) -> Tensor:
    return images if isinstance(images, Tensor) else torch.arange(images.start, images.stop, images.step, device=CPU)


def select(
    size: int,
    order: Tensor,
    class_range: Callable[[int], tuple[int, int]],
    labels: Tensor | None,
    images: Any,
    without: Any,
) -> Selection:
    """`PatchBank.select`: of a bank of so many images, its order by class, and labels that are checked."""
    classes: list[Any] = [None] if labels is None else labels.tolist()
    if images is None and without is None:
        if labels is None:
            return Selection(size, None, torch.tensor([0], device=CPU), torch.tensor([size], device=CPU), (ALL,))
        ranges = [class_range(c) for c in classes]
        begin, end = (torch.tensor([ends[i] for ends in ranges], dtype=torch.int64, device=CPU) for i in (0, 1))
        return Selection(size, order, begin, end, tuple(f"class{c}" for c in classes))
    only, but = _lists(size, "images", images), _lists(size, "without", without)
    batch = max(len(classes), len(only), len(but))
    for name, given in (("labels", classes), ("images", only), ("without", but)):
        if len(given) not in (1, batch):
            raise ValueError(f"{name} is for {len(given)} queries, but the rest for {batch}; give one list, or {batch}")
    sets: dict[Any, tuple[int, int, str]] = {}  # each once, whichever queries it is for
    chosen: list[Tensor] = []
    queries = [tuple(b % len(given) for given in (classes, only, but)) for b in range(batch)]
    for b, (c, i, w) in enumerate(queries):
        if (key := (classes[c], i, w)) in sets:
            continue
        if key[0] is None:
            numbers: Tensor = torch.arange(size, device=CPU) if images is None else only[i].unique()  # type: ignore[no-untyped-call]
        else:
            numbers = order[slice(*class_range(key[0]))]
            numbers = numbers if images is None else numbers[torch.isin(numbers, only[i])]
        if without is not None:
            numbers = numbers[~torch.isin(numbers, but[w])]
        if len(numbers) == 0:
            raise ValueError(f"no images are left for query {b}; select some")
        begins = sum(map(len, chosen))
        name = LIST + hashlib.blake2b(numbers.numpy().tobytes(), digest_size=16).hexdigest()
        sets[key] = begins, begins + len(numbers), name
        chosen.append(numbers)
    found = [sets[classes[c], i, w] for c, i, w in queries]
    begin, end = (torch.tensor([one[i] for one in found], device=CPU) for i in (0, 1))
    return Selection(size, torch.cat(chosen), begin, end, tuple(name for _, _, name in found))


def _lists(size: int, name: str, given: Any) -> list[Tensor]:
    """Image numbers, one list for all queries or one for each."""
    if given is None:
        return [torch.arange(0, device=CPU)]
    arrays = (Tensor, np.ndarray)
    if isinstance(given, int):
        given = [given]
    if not isinstance(given, (*arrays, list, tuple, range)):
        raise TypeError(f"{name} must be image numbers, one list or one for each query, got {type(given).__name__}")
    nested = given.ndim > 1 if isinstance(given, arrays) else any(not isinstance(n, (int, float)) for n in given)
    return [image_numbers(size, name, one) for one in (given if nested and len(given) else [given])]


def image_numbers(size: int, name: str, given: Any) -> Tensor:
    """(n,) int64, of a bank of so many images."""
    try:
        numbers = torch.as_tensor(given, device=CPU).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be image numbers, one list or one for each query, got {given!r}") from None
    if len(numbers) and (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool):
        raise TypeError(f"{name} must be image numbers, got {numbers.dtype}")
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < size:
        raise ValueError(f"{name} must be image numbers from 0 to {size - 1}, got {given}")
    return numbers.to(torch.int64)
