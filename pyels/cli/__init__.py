"""The command line: `pyels demo | sample | train | check | calibrate | compare | evaluate | ..`, a file a command."""

from __future__ import annotations

import ast
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import click

COMMANDS = (
    "demo",
    "sample",
    "encode",
    "train",
    "check",
    "calibrate",
    "compare",
    "explain",
    "evaluate",
    "bench",
    "scaling",
    "info",
)
INTERRUPTED = 130


class _Commands(click.Group):
    """Each is imported when it is run; the list of them takes no more than their files: torch takes seconds."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"pyels.cli.{name}"), f"{name}_command")
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _summary(name)) for name in COMMANDS])


def _summary(name: str) -> str:
    """The first sentence of a command's docstring."""
    tree = ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))
    (function,) = (one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == f"{name}_command")
    return " ".join((ast.get_docstring(function) or "").split("\n\n")[0].split())


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="pyels", prog_name="pyels")
@click.pass_context
def program(context: click.Context) -> None:
    """What a convolutional diffusion model draws, in closed form."""
    from pyels import distributed
    from pyels.cli.progress import show_warning

    warnings.showwarning = show_warning  # type: ignore[assignment]
    if distributed.launched() > 1 and context.invoked_subcommand != "sample":
        raise click.UsageError("of the commands only sample runs in several processes; start the others by themselves")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program: bad input ends it with status 2 and one line on standard error."""
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files; a notebook's backend may not be installed here
    try:
        sys.exit(program.main(args=arguments, prog_name="pyels", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        _report("pyels: interrupted; repeat the command (of train: with --resume) to go on where it was")
        sys.exit(INTERRUPTED)
    except Exception as error:
        if (why := _why(error)) is None:
            raise
        _fail(why)


def _why(error: Exception) -> str | None:
    """What went wrong, where it is the user's to mend."""
    from pyels.cli.progress import GO_ON
    from pyels.distributed import Lost
    from pyels.networks.adapters import in_words, line_of_own

    if isinstance(error, Lost):
        return f"{error}; {GO_ON}"
    if line_of_own(error):
        return in_words(error)
    if isinstance(error, (ValueError, TypeError, OSError, ImportError, MemoryError)):
        return str(error) or type(error).__name__
    if isinstance(error, RuntimeError) and ("memory" in str(error) or "allocat" in str(error)):
        return f"out of memory: {str(error).splitlines()[0]}"  # torch says so in its own way
    return None


def _fail(message: str) -> None:
    _report("pyels: error: " + " ".join(message.split()))
    sys.exit(2)


def _report(line: str) -> None:
    from pyels.cli.progress import report

    report(line)
