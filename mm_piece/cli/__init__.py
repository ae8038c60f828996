"""The command line: parse, call one function, print. Torch is imported inside commands only.

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
from mm_piece.cli.options import echo, format_error, printable_messages
from mm_piece.errors import PieceError
from mm_piece.plaintext import make_printable

# Of several processes the first tells a mistake, and the launcher ends the others when it has. One
# that is still there after so many seconds has a mistake of its own, or has lost the first.
_ERROR_DELAY_SECONDS = 20


class _CommandGroup(click.Group):
    """Prints a user's mistake as one line and exits with status 2; --debug shows the traceback."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            with printable_messages():
                return super().main(*args, **options)
        except SystemExit as finished:
            if os.environ.get("WORLD_SIZE", "1") != "1" and isinstance(finished.code, int):
                from mm_piece.distributed import exit_process

                exit_process(finished.code)
            raise

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (PieceError, OSError) as error:
            if ctx.params["debug"]:
                raise
            if os.environ.get("RANK", "0") != "0":
                time.sleep(_ERROR_DELAY_SECONDS)
            echo(f"Error: {format_error(error)}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            echo("Aborted!", err=True)
            ctx.exit(128 + signal.SIGINT)
        except click.ClickException as error:  # it may quote what a file is called
            vars(error).update(message=make_printable(error.message))
            raise


@click.group(cls=_CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mm-piece")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--local_rank", hidden=True, expose_value=False)  # a launcher may give it
def main(debug: bool) -> None:
    """Teach a vision-language model a sequence of tasks; load it at any point of the sequence."""
    sys.path.append(str(Path.cwd()))  # where a recipe's own rules may lie


for _module in (run, check, assemble, inspect, derive, share):
    for _command in _module.COMMANDS:
        main.add_command(_command)
