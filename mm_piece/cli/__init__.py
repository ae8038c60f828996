"""The command line. Each command parses its arguments, calls one function and prints.

Commands import torch and whatever needs it inside, so that `--help` is quick.

run         train, eval, ask
check       check
assemble    assemble
inspect     log, show, results, diff, verify, report
derive      export, squash, extract, merge, without, convert, import
share       fork, gc, push, pull
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import click

from mm_piece.cli import assemble, check, derive, inspect, run, share
from mm_piece.cli.options import echo, format_error, is_output_closed, printable_messages
from mm_piece.errors import PieceError
from mm_piece.plaintext import make_printable
from mm_piece.threads import prefer_passive_waiting

# The first process prints an error that all of them have, and then the launcher ends the others.
# A process that is still there after so many seconds has an error of its own, or the first is gone.
_ERROR_DELAY_SECONDS = 20


class _CommandGroup(click.Group):
    """Commands whose errors are printed as one line, with status 2 (--debug: a traceback)."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            with printable_messages():
                return super().main(*args, **options)
        except SystemExit as finished:
            is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
            if is_alone or not isinstance(finished.code, int):
                raise

            from mm_piece.distributed import exit_process

            # threads of torch's backends may abort a process of several that exits in order
            exit_process(finished.code)
            raise

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (PieceError, OSError) as error:
            # click ends the process without a word where nobody reads its output any more
            if isinstance(error, BrokenPipeError) and is_output_closed():
                raise
            if ctx.params["debug"]:
                raise

            # all processes may have the same error: only the first prints it at once
            if os.environ.get("RANK", "0") != "0":
                time.sleep(_ERROR_DELAY_SECONDS)
            echo(f"Error: {format_error(error)}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            echo("Aborted!", err=True)
            ctx.exit(128 + signal.SIGINT)
        except click.ClickException as error:  # it may quote the name of a file
            printable = make_printable(error.message)
            vars(error).update(message=printable)  # click declares the attribute Final
            raise


@click.group(
    cls=_CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="mm-piece")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--local_rank", hidden=True, expose_value=False)  # a launcher may give it
def main(debug: bool) -> None:
    """Teach a vision-language model a sequence of tasks; load it at any point of the sequence."""
    prefer_passive_waiting()
    sys.path.append(str(Path.cwd()))  # where a recipe's own rules may lie


_MODULES = (run, check, assemble, inspect, derive, share)
for _module in _MODULES:
    for _command in _module.COMMANDS:
        main.add_command(_command)
