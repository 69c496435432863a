"""What a person types. Every command prints its result on stdout and everything else on stderr.

Exit status: 0 done; 2 wrong usage or unusable input, with one line that says what is wrong; 1 anything else.

Imports that take time stay inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Sequence

import click

from ..errors import InstantFTError
from . import adapting, data, exporting, hardware, inspecting, measuring, using, watching
from .options import commands

__all__ = ["commands", "main", "run"]

# Commands in the order of the story.
for _command in (
    measuring.demo,
    adapting.pretrain,
    adapting.finetune,
    using.evaluate,
    using.predict,
    inspecting.inspect,
    exporting.export,
    watching.watch,
    watching.history,
    watching.rollback,
    watching.forget,
    measuring.bench,
    measuring.reproduce,
    data.data,
    hardware.hw,
):
    commands.add_command(_command)


def main() -> None:
    """The console script."""
    sys.exit(run())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        Exit status.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: click.echo(f"warning: {message}", err=True)
        try:
            commands.main(None if arguments is None else list(arguments), prog_name="instantft", standalone_mode=False)
            sys.stdout.flush()
        except click.exceptions.NoArgsIsHelpError as e:
            click.echo(e.ctx.get_help() if e.ctx else str(e), err=True)
            return 2
        except click.ClickException as e:
            context = getattr(e, "ctx", None)
            hint = f" (see {context.command_path} --help)" if context else ""
            return _fail(e.format_message() + hint)
        except click.exceptions.Exit as e:
            return e.exit_code
        except (click.Abort, KeyboardInterrupt) as e:
            click.echo(str(e.__cause__ or e) or "interrupted; nothing was replaced", err=True)
            return 130
        except InstantFTError as e:
            return _fail(str(e))
        except MemoryError as e:
            return _fail(f"the work must fit in memory, but it does not: {e or 'use fewer or smaller samples'}")
        except BrokenPipeError:
            _drop_stdout()
            return 1
        except OSError as e:
            _drop_stdout()
            return _fail(
                f"files must be readable and writable, but {e.filename or 'the output'} is not: {e.strerror or e}"
            )
    return 0


def _fail(message: str) -> int:
    click.echo("error: " + " ".join(message.split()), err=True)
    return 2


def _drop_stdout() -> None:
    """What could not be written will not be tried again when Python closes."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
