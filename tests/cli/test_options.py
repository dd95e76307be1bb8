"""Options as fields of a dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
import pytest
from click.testing import CliRunner
from helpers import run_program

import pyels
from pyels.cli import COMMANDS, program
from pyels.cli.options import AT_LEAST_1, Settings, command, option
from pyels.machines import MACHINES


@dataclass(frozen=True, kw_only=True)
class Shared(Settings):
    source: str = option(help="What it works on.")
    count: int = option(1, "Of both.", must_be=AT_LEAST_1)


@dataclass(frozen=True, kw_only=True)
class Output(Settings):
    out: Path = option()


@dataclass(frozen=True, kw_only=True)
class Draw(Shared, Output):
    kind: Literal["a", "b"] = option("a")
    many_words: tuple[str, ...] = option((), type=click.Choice(["x", "y"]))
    limit: float | None = option(None, must_be=("below 2", lambda value: value < 2))
    fast: bool = option(False, recorded=False)
    count: int = option(3)
    out: Path = option(Path("drawn"))


@dataclass(frozen=True)
class Plan:
    kind: str
    count: int
    seconds: float = 1.0


@pytest.fixture
def asked():
    """Runs the command with some arguments: its settings, or what it printed."""
    given = []

    @command(Draw)
    def draw(settings: Draw) -> None:
        """Draws."""
        given.append(settings)

    def run(*arguments):
        result = CliRunner().invoke(draw, arguments)
        if isinstance(result.exception, ValueError):
            raise result.exception
        return given.pop() if given else result.output

    return run


def test_fields_are_options(asked):
    assert asked("--source", "s") == Draw(source="s")
    arguments = ("--source=-3,5", "--many-words", "x", "--many-words", "y", "--limit", "0.5", "--fast", "--kind", "b")
    assert asked(*arguments, "--out", "there") == Draw(
        source="-3,5", many_words=("x", "y"), limit=0.5, fast=True, kind="b", out=Path("there")
    )
    assert "Missing option '--source'" in asked()
    assert "'c' is not one of 'a', 'b'" in asked("--source", "s", "--kind", "c")


def test_help_lists_what_is_worked_on_then_its_own_then_the_rest(asked):
    lines = asked("--help").splitlines()
    names = [line.split()[0] for line in lines if line.startswith("  --")]
    assert names == ["--source", "--count", "--kind", "--many-words", "--limit", "--fast", "--out", "--help"]
    assert any("[default: drawn]" in line for line in lines)


def test_values_are_checked(asked):
    with pytest.raises(ValueError, match="--limit must be below 2, got"):
        asked("--source", "s", "--limit", "2")
    with pytest.raises(ValueError, match="--count must be at least 1, got 0"):
        Shared(source="s", count=0)


def test_the_record_has_a_commands_own_options_and_what_they_came_to():
    record = Draw(source="s", limit=1.0).record(kind="resolved", data={"images": 3})
    head = {"command": "draw", "version": pyels.__version__}
    assert record == {**head, "kind": "resolved", "many_words": (), "limit": 1.0, "data": {"images": 3}}


def test_settings_are_passed_to_what_has_fields_of_the_same_names():
    assert Draw(source="s").passed_to(Plan, count=7) == Plan("a", 7)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_the_help(name, capsys):
    assert run_program(name, "--help") == 0
    text = capsys.readouterr().out
    for one in program.get_command(None, name).params:
        assert one.opts[0] in text


def test_choices_of_machines_are_those_there_are():
    choices = {
        name: {one.name: one.type for one in program.get_command(None, name).params} for name in ("sample", "calibrate")
    }
    assert choices["sample"]["machine"].choices == tuple(MACHINES)
    calibrated = set(choices["calibrate"]["machine"].choices)
    assert calibrated == {"ls", "els", "pspc", "pca", "golden"}
