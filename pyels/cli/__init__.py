"""The command line: `pyels demo | sample | train | check | calibrate | compare | ..`, a file a command."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import click

import pyels
from pyels import distributed
from pyels.cli.bench import bench_command
from pyels.cli.calibrate import calibrate_command
from pyels.cli.check import check_command
from pyels.cli.compare import compare_command
from pyels.cli.demo import demo_command
from pyels.cli.info import info_command
from pyels.cli.progress import GO_ON, report, show_warning
from pyels.cli.sample import sample_command
from pyels.cli.scaling import scaling_command
from pyels.cli.train import train_command

INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(pyels.__version__, prog_name="pyels")
@click.pass_context
def program(context: click.Context) -> None:
    """What a convolutional diffusion model draws, in closed form."""
    if distributed.launched() > 1 and context.invoked_subcommand != "sample":
        raise click.UsageError("of the commands only sample runs in several processes; start the others by themselves")


for _command in (
    demo_command,
    sample_command,
    train_command,
    check_command,
    calibrate_command,
    compare_command,
    bench_command,
    scaling_command,
    info_command,
):
    program.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program: bad input ends it with status 2 and one line on standard error."""
    warnings.showwarning = show_warning  # type: ignore[assignment]
    try:
        sys.exit(program.main(args=arguments, prog_name="pyels", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message())
    except distributed.Lost as error:
        _fail(f"{error}; {GO_ON}")
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        _fail(str(error) or type(error).__name__)
    except (click.Abort, KeyboardInterrupt):
        report("pyels: interrupted; repeat the command (of train: with --resume) to go on where it was")
        sys.exit(INTERRUPTED)
    except RuntimeError as error:  # after Abort, which is one too
        if "memory" not in str(error) and "allocat" not in str(error):
            raise
        _fail(f"out of memory: {str(error).splitlines()[0]}")  # torch says so in its own way


def _fail(message: str) -> None:
    report("pyels: error: " + " ".join(message.split()))
    sys.exit(2)
