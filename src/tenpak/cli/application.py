"""The application that verbs register with, and what surrounds every run of it: signals, warnings, errors, exit codes.

The exit codes are those of ``tenpak --help``; 1 stands for every TenpakError and OSError.
"""

from __future__ import annotations

import signal
import sys
import warnings
from types import FrameType
from typing import Annotated, Any

import typer

from tenpak.cli.console import err, set_verbosity
from tenpak.errors import ArtifactError, CheckpointError, TenpakError

__all__ = ["app", "main", "options", "quiet"]

# \b keeps the lines as they are.
_EXIT_CODES = """\b
Exit codes:
  0    done
  1    an error, told on stderr in one line with a hint; or verify or doctor found something
  2    wrong usage
  130  interrupted (Ctrl-C); 143 terminated. Nothing half-written is left; the same command goes on"""

app = typer.Typer(
    name="tenpak",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=_EXIT_CODES,
)


class _Interrupted(BaseException):
    """Ctrl-C, or a request to terminate; typer would turn a KeyboardInterrupt into a silent exit."""


def main() -> None:
    """Run the command line; turns errors into one line, a hint and an exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # so that a terminated run also cleans up
        signal.signal(number, _interrupt)
    warnings.showwarning = _warn
    sys.argv[1:], debug = _everywhere(sys.argv[1:])
    try:
        app()
    except (TenpakError, OSError) as error:
        if debug:
            raise
        _fail(str(error), getattr(error, "hint", None) or _hint(error))
        sys.exit(1)
    except _Interrupted as error:
        _fail("interrupted", "no half-written output is left; run the same command again to go on")
        sys.exit(128 + error.args[0])


@app.callback()
def options(
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="no progress, no notes; warnings and errors stay")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="a line for every tensor as well")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show where an error happened")] = False,
) -> None:
    """Make decoder-only language models about ten times smaller, and prove it on the file it wrote."""
    set_verbosity("quiet" if quiet else "verbose" if verbose else "normal")


def _everywhere(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments with the options of ``options``, which may stand anywhere, in front; and whether to debug."""
    known = {"-q", "--quiet", "-v", "--verbose", "--debug"}
    end = arguments.index("--") if "--" in arguments else len(arguments)
    first = [argument for argument in arguments[:end] if argument in known]
    return [*first, *(a for a in arguments[:end] if a not in known), *arguments[end:]], "--debug" in first


def _fail(message: str, hint: str) -> None:
    err.print(f"error: {message}", soft_wrap=True, markup=False)
    err.print(f"hint: {hint}", soft_wrap=True, markup=False)


def _hint(error: Exception) -> str:
    """What to do about an error that does not say it itself."""
    if isinstance(error, CheckpointError):
        return "config.json and weights must be those of one sound model: obtain it again"
    if isinstance(error, ArtifactError):
        return "obtain the artifact again, or compress the model again"
    return "`--debug` shows where it happened"


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise _Interrupted(signum)


def _warn(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
    err.print(f"warning: {message}", soft_wrap=True, markup=False)


def quiet() -> None:
    """Keep transformers' own bars and notes out of the way; what matters comes as an error."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
