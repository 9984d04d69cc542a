"""``safekern report``: which weights a mask selects, where they lie and how sure that is."""

import argparse
import json
from pathlib import Path
from typing import Any

from safekern import files
from safekern.cli import options
from safekern.report import Audit
from safekern.report_page import MARK, to_html
from safekern.tables import printable

_DESCRIPTION = """\
Shows what a mask selects: how many weights, in which components and layers, and how far that can be trusted.

Without --html it prints tables. With it, everything goes into one HTML file with pictures that opens from disk, needs
no network and can be sent on or printed (needs matplotlib: pip install "safekern[plot]").

  --scores    adds the distribution of ESI, and checks that the mask is exactly the weights of the largest ESI
  --compare   adds how far other masks agree with it, for instance of other prompts or of the model after tuning
"""
_EPILOG = """\
example: a page about a mask, its scores and the mask that other prompts gave

  safekern report mask.safetensors --scores scores.safetensors --compare other.safetensors --html report.html
"""


def add_parser(commands: Any) -> None:
    """Adds ``report`` to the subcommands."""
    parser = commands.add_parser(
        "report",
        help="describe a mask in tables or as one HTML page with pictures",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("mask", type=Path, metavar="MASK", help="a mask file")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="the scores it was ranked from")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", nargs="+", default=[], help="other masks of the same model"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page there instead of printing tables")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead of tables")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Reports on a mask.

    Raises:
        SafekernError: a file cannot be read or written, or the files do not belong together.
    """
    if args.html is not None:
        options.check_output("--html", args.html, (args.mask, args.scores, *args.compare), MARK.encode())
    audit = Audit.load(args.mask, args.scores, args.compare)
    if args.html is not None:
        page = to_html(audit).encode()
        with files.replacing(args.html) as file:
            file.write(page)
    if args.json:
        print(json.dumps(audit.to_dict(), indent=2))
    elif args.html is None:
        print(_text(audit))
    else:
        print(f"Written to {printable(str(args.html))}")


def _text(audit: Audit) -> str:
    marks = {True: "yes ", False: "NO  ", None: "note"}
    parts = [
        f"{printable(audit.files[0].name)}: {audit.mask}",
        "\n".join(f"{marks[check.holds]}  {printable(check.text)}" for check in audit.checks()),
    ]
    if audit.summary:
        parts += [audit.summary.heat_map(), str(audit.summary.table("component")), str(audit.summary.table("layer"))]
    if audit.experts:
        parts.append(str(audit.experts.table()))
    if audit.ranking:
        parts.append(f"ESI of the scored weights, of which the mask holds {audit.ranking.share:.1%}:")
        parts.append(str(audit.ranking.report.table("component")))
    if audit.comparisons:
        parts.append(str(audit.overlap_table()))
    return "\n\n".join(parts)
