"""The ``safekern`` command: one module per subcommand, each with ``add_parser`` and ``run``.

``run`` returns the exit status, or None for 0. A subcommand whose status 1 says something other than "error" sets
``error_status`` on its parser.
"""

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from safekern._version import __version__
from safekern.cli import apply, bench, demo, diff, doctor, report, score, spa, verify
from safekern.cli import set as set_command
from safekern.errors import SafekernError
from safekern.tables import printable


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, as from a job's scheduler: what Ctrl-C puts back and removes is put back and removed."""


_COMMANDS = (demo, score, set_command, spa, verify, report, apply, diff, bench, doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    0, what the command decides, 1 for an error that was explained (one of writing the output, too), 130 for Ctrl-C, 143
    for SIGTERM, or 141 where whoever reads the output went away. ``safekern diff`` is like ``diff``: 1 says that the
    masks differ, and 2 that there was an error.

    Args:
        argv: the arguments after the program's name; by default those of this process.

    Example:
        >>> main(["diff", "mask.safetensors", "mask.safetensors"])                # doctest: +SKIP
        0
    """
    _complete_streams()
    # Filled in place, so that it is there where --help cannot be written.
    args = argparse.Namespace()
    try:
        try:
            return _run(argv, args)
        finally:
            # Here and not when Python ends, which would show a traceback.
            sys.stdout.flush()
    except OSError as error:
        if _takes_text(sys.stdout):
            raise
        # What is still buffered would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # As in `safekern report MASK | head`.
        if isinstance(error, BrokenPipeError):
            return 141
        print(f"{_name(args)}: the output cannot be written: {error.strerror}; send it elsewhere", file=sys.stderr)
        return int(getattr(args, "error_status", 1))


def _complete_streams() -> None:
    """Makes sure that both streams are there, which the caller may have closed, and take every character."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # Text for a missing stderr would go to stdout.
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - until the process ends
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of foreign files, and the shades of a heat map, are in no 8-bit encoding.
        sys.stdout.reconfigure(errors="backslashreplace")


def _takes_text(stream: TextIO) -> bool:
    try:
        stream.write("\n")
        stream.flush()
    except OSError:
        return False
    return True


def _name(args: argparse.Namespace) -> str:
    return f"safekern {args.command}" if getattr(args, "command", None) else "safekern"


def _run(argv: Sequence[str] | None, args: argparse.Namespace) -> int:
    parser = argparse.ArgumentParser(
        prog="safekern",
        description="Find and edit the safety-critical 1% of a language model's weights.",
        epilog="Start with `safekern demo --quick`; `safekern COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"safekern {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    parser.parse_args(argv, args)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with _told_of_termination():
            return int(args.run(args) or 0)
    except SafekernError as error:
        # Line by line, since some have several.
        print("\n".join(map(printable, f"{_name(args)}: {error}".split("\n"))), file=sys.stderr)
        return int(getattr(args, "error_status", 1))
    except KeyboardInterrupt as stopped:
        terminated = isinstance(stopped, _TerminatedError)
        print(f"{_name(args)}: {'terminated' if terminated else 'interrupted'}", file=sys.stderr)
        return 143 if terminated else 130


@contextlib.contextmanager
def _told_of_termination() -> Iterator[None]:
    def tell(*_: Any) -> None:
        raise _TerminatedError

    # Another thread can set no handler, and a program that has its own keeps it.
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, tell)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
