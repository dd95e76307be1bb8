"""Which images of a bank count for each query."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALL = "all"


@dataclass(frozen=True)
class Selection:
    """Query b is compared with the images order[begin[b]] .. order[end[b] - 1] of a bank, whose numbers ascend.

    Made by `PatchBank.select`. All images, those of a class, a list, all but some, and one process's share are the same
    to an engine.

    Attributes
    ----------
    order  (M,) int64 image numbers, those of one set side by side; None: 0 .. N-1
    begin  (B,) int64, in CPU memory; (1,) where it serves any number of queries
    end    (B,) int64, likewise
    names  (B,) what the set of images of each query is called: sets of one name are the same; may stand in the name of
           a file
    """

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
        return Selection(self.order, self.begin.repeat(batch), self.end.repeat(batch), self.names * batch)

    def of(self, queries: Sequence[int]) -> Selection:
        """That of some of the queries."""
        which = torch.tensor(queries, dtype=torch.int64)
        return Selection(self.order, self.begin[which], self.end[which], tuple(self.names[b] for b in queries))

    def share(self, part: int, parts: int) -> Selection:
        """Of every query's images part number `part`, 0 .. parts - 1; the parts have none in common and are together
        all."""
        names = tuple(f"{name}-{part}of{parts}" for name in self.names)
        first, last = (self.begin + self.counts * i // parts for i in (part, part + 1))
        return Selection(self.order, first, last, names)

    def last(self) -> int:
        """The highest image number."""
        return max((int(images[-1]) for _, images, _ in self.sets() if len(images)), default=-1)

    def nothing(self) -> Selection:
        """No image for any query."""
        return Selection(None, torch.zeros_like(self.begin), torch.zeros_like(self.begin), self.names)

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
        return torch.cat([as_numbers(images) for images in sets]).unique()  # type: ignore[no-any-return, no-untyped-call]

    def among(self, numbers: Tensor) -> Selection:
        """The same for neighbours in `images`, (n,): images then are places in `numbers`."""
        sets = list(self.sets())
        if self.order is None and len(sets) == 1:
            return Selection(None, torch.zeros_like(self.begin), torch.full_like(self.end, len(numbers)), self.names)
        begin, end = torch.zeros_like(self.begin), torch.zeros_like(self.end)
        ends = torch.stack([numbers[0], numbers[-1] + 1])
        order: list[Tensor] = []
        for _, images, queries in sets:
            images = as_numbers(images)
            first, last = torch.searchsorted(images, ends).tolist()
            begin[queries] = sum(map(len, order))
            order.append(torch.searchsorted(numbers, images[first:last]))
            end[queries] = sum(map(len, order))
        return Selection(torch.cat(order), begin, end, self.names)


def check_selection(selection: Selection) -> Selection:
    if not isinstance(selection, Selection):
        raise TypeError(f"selection must be what bank.select(..) gives, got {type(selection).__name__}")
    return selection


def as_numbers(images: range | Tensor) -> Tensor:
    return images if isinstance(images, Tensor) else torch.arange(images.start, images.stop, images.step)


def select(bank: Any, labels: Tensor | None, images: Any, without: Any) -> Selection:
    """`PatchBank.select`, of labels that are checked."""
    if images is None and without is None:
        if labels is None:
            return Selection(None, torch.tensor([0]), torch.tensor([len(bank)]), (ALL,))
        classes = labels.tolist()
        ranges = [bank.class_range(c) for c in classes]
        begin, end = (torch.tensor([ends[i] for ends in ranges], dtype=torch.int64) for i in (0, 1))
        return Selection(bank.order, begin, end, tuple(f"class{c}" for c in classes))
    chosen, left_out = _lists(bank, "images", images), _lists(bank, "without", without)
    batch = max(1 if labels is None else len(labels), len(chosen), len(left_out))
    for name, given in (("labels", labels), ("images", chosen), ("without", left_out)):
        if given is not None and len(given) not in (1, batch):
            raise ValueError(f"{name} is for {len(given)} queries, but the rest for {batch}; give one list, or {batch}")
    order, names = [], []
    for b in range(batch):
        numbers = torch.arange(len(bank))
        if labels is not None:
            begin, end = bank.class_range(int(labels[b % len(labels)]))
            numbers = bank.order[begin:end]
        if images is not None:
            numbers = numbers[torch.isin(numbers, chosen[b % len(chosen)])]
        if without is not None:
            numbers = numbers[~torch.isin(numbers, left_out[b % len(left_out)])]
        if len(numbers) == 0:
            raise ValueError(f"no images are left for query {b}; select some")
        order.append(numbers)
        names.append(f"images{zlib.crc32(numbers.numpy().tobytes()):08x}")
    ends = torch.tensor([len(numbers) for numbers in order]).cumsum(0)
    begins = ends - torch.tensor([len(numbers) for numbers in order])
    return Selection(torch.cat(order), begins, ends, tuple(names))


def _lists(bank: Any, name: str, given: Any) -> list[Tensor]:
    """Image numbers, one list for all queries or one for each."""
    if given is None:
        return [torch.arange(0)]
    try:
        each = [given] if torch.as_tensor(given).dim() < 2 else list(given)
    except (TypeError, ValueError, RuntimeError):  # lists of several lengths
        each = list(given)
    lists = []
    for one in each:
        try:
            numbers = torch.as_tensor(one).cpu().reshape(-1)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name} must be image numbers, one list or one for each query, got {one!r}") from None
        if len(numbers) and (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool):
            raise TypeError(f"{name} must be image numbers, got {numbers.dtype}")
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(bank):
            raise ValueError(f"{name} must be image numbers from 0 to {len(bank) - 1}, got {one}")
        lists.append(numbers.to(torch.int64))
    return lists
