"""The options of a command are the fields of a dataclass: type, default, help and what a value must be, said there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click

import pyels
from pyels.files import path_of

S = TypeVar("S", bound="Settings")
T = TypeVar("T")
Rule = tuple[str, Callable[[Any], bool]]  # in words, and whether a value keeps to it
AT_LEAST_1: Rule = ("at least 1", lambda value: value >= 1)


def option(
    default: Any = MISSING,
    help: str | None = None,
    type: Any = None,
    must_be: Rule | None = None,
    recorded: bool = True,
    elsewhere: str | None = None,
    also: str | None = None,
) -> Any:
    """A field that is an option.

    Parameters
    ----------
    default    left out, the option is required
    type       as click takes it, where the annotation of the field is not enough
    must_be    what a value that is not None must be
    recorded   False: it changes no result, or `Settings.record` is told what it stands for
    elsewhere  of an option of engines: what to say where it is given to one that does not have it
    also       another flag for the same
    """
    about = {"help": help, "type": type, "must_be": must_be, "recorded": recorded}
    return field(default=default, metadata={**about, "elsewhere": elsewhere, "also": also})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a command was asked for. Commands share groups of options as bases."""

    def __post_init__(self) -> None:
        for one in fields(self):
            if one.metadata["must_be"] is not None:
                check(one.name, getattr(self, one.name), one.metadata["must_be"])

    def record(self, **resolved: Any) -> dict[str, Any]:
        """What run.json says of a run: the command's own options, those in `resolved` as they are there, and the rest
        of `resolved`: what the groups of shared options came to."""
        shared = {one.name for base in type(self).__bases__ for one in fields(base)}
        own = [one.name for one in fields(self) if one.name not in shared and one.metadata["recorded"]]
        head = {"command": _name(type(self)), "version": pyels.__version__}
        return {**head, **{name: getattr(self, name) for name in own}, **resolved}

    def passed_to(self, kind: type[T], **resolved: Any) -> T:
        """A dataclass made of the options of the same names, and of `resolved`."""
        given = {one.name: getattr(self, one.name) for one in fields(kind) if hasattr(self, one.name)}  # type: ignore[arg-type]
        return kind(**{**given, **resolved})


def check(name: str, value: Any, rule: Rule) -> None:
    words, keeps_to_it = rule
    if value is not None and not keeps_to_it(value):
        raise ValueError(f"{flag(name)} must be {words}, got {value}")


def command(kind: type[S]) -> Callable[[Callable[[S], None]], click.Command]:
    """Makes a function of the settings a command, of the class's name in small letters."""

    def made(run: Callable[[S], None]) -> click.Command:
        def call(**given: Any) -> None:
            click.get_current_context().obj = sys.stdout  # for results; what a network of the user's prints is none
            with redirect_stdout(sys.stderr):
                run(kind(**given))

        call.__doc__ = run.__doc__
        hints = get_type_hints(kind)
        return click.command(_name(kind), params=[_option(one, hints[one.name]) for one in _listed(kind)])(call)

    return made


def _listed(kind: type[Settings]) -> list[Field[Any]]:
    """As --help lists them: those of the first base, which says what the command works on, its own, and the others."""
    by_name = {one.name: one for one in fields(kind)}
    first, *others = kind.__bases__
    own = (each.__annotations__ for each in (*first.__mro__, kind) if is_dataclass(each))
    names = chain(*own, *([one.name for one in fields(base)] for base in others))
    return [by_name[name] for name in dict.fromkeys(names)]


def _option(one: Field[Any], hint: Any) -> click.Option:
    shown = {} if one.default in (MISSING, None, ()) or hint is bool else {"default": one.default, "show_default": True}
    return click.Option(
        [one.name, flag(one.name), *filter(None, [one.metadata["also"]])],
        type=one.metadata["type"] or _click_type(hint),
        help=one.metadata["help"],
        required=one.default is MISSING,
        is_flag=True if hint is bool else None,  # click takes False for an option with a value that may be left out
        multiple=get_origin(hint) is tuple,
        **shown,
    )


def _click_type(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):  # X | None
        return _click_type(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return click.Choice(get_args(hint))
    return AnyPath() if hint is Path else hint


class AnyPath(click.Path):
    """A path as the shell would have it: `~` is the home folder, and nothing is no path."""

    def __init__(self, **rules: Any) -> None:
        super().__init__(path_type=Path, **rules)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(path_of(value), param, ctx)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _name(kind: type[Settings]) -> str:
    return kind.__name__.lower()


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def in_words(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def values_of(name: str, text: str, parameter: str) -> list[Any]:
    """Values of a parameter, in the text of an option."""
    if parameter == "patch_size":
        return integers(name, text)
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag(name)} must be numbers separated by commas, such as .02,.05, got {text!r}") from None


def integers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
        if all(abs(number) < 1 << 63 for number in numbers):
            return numbers
        raise ValueError
    except ValueError:
        raise ValueError(f"{flag(name)} must be integers separated by commas, such as 3,3,5, got {text!r}") from None
