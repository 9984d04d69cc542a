"""``safekern diff``: how far two masks agree, in total and by part."""

import argparse
import json
from pathlib import Path
from typing import Any

from safekern.mask import Mask
from safekern.overlap import COLUMNS, Comparison, row
from safekern.tables import Column, Table, printable

_DESCRIPTION = """\
Compares two masks of the same model: how many weights each selects, how many they share, and the Jaccard index (shared
weights as a share of those that either selects), for the whole model, each component and each layer. "if random" is the
Jaccard index that masks of these sizes would have by chance, drawn from the parameters that either selects from: masks
that agree no better than that have nothing in common.

Exit status, as of diff: 0 where the masks are equal, 1 where they differ, 2 for an error.
"""
_EPILOG = """\
example: does the ranking depend on the prompts? Compare the masks of two sets of prompts.

  safekern diff mask_a.safetensors mask_b.safetensors
"""


def add_parser(commands: Any) -> None:
    """Adds ``diff`` to the subcommands."""
    parser = commands.add_parser(
        "diff",
        help="compare two masks: sizes, shared weights, Jaccard index, by component and layer",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", type=Path, metavar="A", help="a mask file")
    parser.add_argument("b", type=Path, metavar="B", help="another")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=run, error_status=2)


def run(args: argparse.Namespace) -> int:
    """Compares the masks.

    Returns:
        0 where they are equal, 1 where they differ.

    Raises:
        SafekernError: a file cannot be read, or the masks are not of the same model.
    """
    masks = {key: Mask.load(path) for key, path in (("a", args.a), ("b", args.b))}
    found = Comparison(masks["a"], masks["b"])
    tables = {"components": found.table("component"), "layers": found.table("layer")}
    total = Table(COLUMNS, [row(found.total)])
    if args.json:
        sides = {
            key: {
                "file": str(path),
                "numel": masks[key].numel,
                "model_numel": masks[key].model_numel,
                "density": masks[key].density,
                "fingerprint": masks[key].fingerprint,
            }
            for key, path in (("a", args.a), ("b", args.b))
        }
        counts = {key: value for key, value in total.records()[0].items() if key not in sides}
        parts = {key: table.records() for key, table in tables.items()}
        print(json.dumps({"equal": found.equal, **sides, **counts, **parts}, indent=2))
    else:
        for key, path in (("a", args.a), ("b", args.b)):
            print(f"{key}  {printable(str(path))}: {masks[key]}")
        print("\nThe masks are equal." if found.equal else "\nThe masks differ.")
        everything = Table([Column(""), *COLUMNS], [("whole model", *row(found.total))])
        for table in (everything, *tables.values()):
            print(f"\n{table}")
    return 0 if found.equal else 1
