"""The ``safekern`` command: one module per subcommand, each with ``add_parser`` and ``run``.

``run`` returns the exit status, or None for 0. A subcommand whose status 1 says something other than "error" sets
``error_status`` on its parser.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from safekern._version import __version__
from safekern.cli import apply, bench, demo, diff, doctor, report, score, spa, verify
from safekern.cli import set as set_command
from safekern.errors import SafekernError

_COMMANDS = (demo, score, set_command, spa, verify, report, apply, diff, bench, doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    0, what the command decides, 1 for an error that was explained, 130 for Ctrl-C, or 141 where whoever reads the
    output went away. ``safekern diff`` is like ``diff``: 1 says that the masks differ, and 2 that there was an error.

    Args:
        argv: the arguments after the program's name; by default those of this process.

    Example:
        >>> main(["diff", "mask.safetensors", "mask.safetensors"])                # doctest: +SKIP
        0
    """
    try:
        try:
            return _run(argv)
        finally:
            # Here and not when Python ends, which would show a traceback.
            sys.stdout.flush()
    except BrokenPipeError:
        # As in `safekern report MASK | head`. What is still buffered would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="safekern",
        description="Find and edit the safety-critical 1% of a language model's weights.",
        epilog="Start with `safekern demo --quick`; `safekern COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"safekern {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return int(args.run(args) or 0)
    except SafekernError as error:
        print(f"safekern {args.command}: {error}", file=sys.stderr)
        return int(getattr(args, "error_status", 1))
    except KeyboardInterrupt:
        print(f"safekern {args.command}: interrupted", file=sys.stderr)
        return 130
