"""``safekern score``: the Expected Safety Impact of every weight, and the mask of the largest."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from safekern import files
from safekern.checkpoint import fingerprint
from safekern.cli import options
from safekern.errors import InvalidArgumentError
from safekern.objectives import refusal
from safekern.prompts import Pairs, builtin, load_prompts, with_refusals
from safekern.scores import TopScores
from safekern.scoring import score
from safekern.tables import printable
from safekern.training import RATIO, SCORING_BATCH_SIZE, in_order

_DESCRIPTION = """\
Scores every weight of a model by its Expected Safety Impact, |sigma * dS/dtheta| (arXiv 2604.08297), in forward and
backward passes over harmful prompts with refusals, and writes the mask of the exact top 1%.

Writes to --out, a folder or the name of the mask's file:
  mask.safetensors     which weights were selected, and where the ranking comes from
  scores.safetensors   with --save-scores: what `safekern verify --scores` and `safekern report --scores` need

Memory: the model, 4 bytes per scored weight, the largest single gradient, and the activations of a batch. No other
gradient outlives its layer. For an 8B model in bf16 that is 16 GB + 30 GB + 1 GB; on a smaller card, --memory bounds
the 30 GB at the price of several passes over the prompts (the mask stays the same), and --offload moves
them to the CPU's memory at the price of the bus.
"""
_EPILOG = """\
example: the demo's model on the built-in prompts, then your own model on AdvBench-like prompts

  safekern score --model smollm2 --out run
  safekern score --model ./model --prompts advbench.json --limit 256 --memory 6e9 --out run
"""


def add_parser(commands: Any) -> None:
    """Adds ``score`` to the subcommands."""
    parser = commands.add_parser(
        "score",
        help="rank a model's weights by their impact on safety, and write the mask of the top 1%%",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_model(parser)
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--pairs", type=Path, metavar="FILE", help="harmful prompts with refusals (default: built-in)")
    data.add_argument(
        "--prompts", type=Path, metavar="FILE", help="harmful prompts alone; a dozen general refusals take turns"
    )
    parser.add_argument("--limit", type=options.number, metavar="N", help="only the first N pairs (default: all)")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="a folder, or FILE.safetensors")
    parser.add_argument(
        "--ratio",
        type=options.ratio,
        default=RATIO,
        metavar="R",
        help=f"share of the model to select (default: {RATIO})",
    )
    parser.add_argument(
        "--reduction",
        choices=["mean", "abs"],
        default="mean",
        help="rank by the absolute mean gradient, as published, or by the mean absolute gradient (default: mean)",
    )
    parser.add_argument(
        "--sigma-per",
        choices=["tensor", "expert"],
        default="tensor",
        help="over what the standard deviation of a weight is taken: the whole tensor, as published, or, where the "
        "experts of a mixture share one fused tensor, that expert's slice: experts of small weights then rank lower, "
        "those of large weights higher. No difference for other models (default: tensor)",
    )
    parser.add_argument(
        "--batch-size",
        type=options.number,
        default=SCORING_BATCH_SIZE,
        metavar="N",
        help=f"pairs per forward and backward (default: {SCORING_BATCH_SIZE})",
    )
    parser.add_argument(
        "--memory", type=options.number, metavar="BYTES", help="of the accumulators, such as 6e9 (default: no bound)"
    )
    parser.add_argument("--offload", action="store_true", help="accumulate in the CPU's memory")
    parser.add_argument("--save-scores", action="store_true", help="also write the scores (4 bytes per scored weight)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Scores a model.

    Raises:
        SafekernError: an option or a file is wrong, found out before the long work starts; or scoring failed.
    """
    mask_path, scores_path = _outputs(args.out)
    if args.save_scores:
        files.check_writable(scores_path, "scores")
    elif scores_path.exists():
        raise InvalidArgumentError(
            f"{scores_path}: exists already, and would stay beside a mask of other scores; add --save-scores to "
            "replace it, or give another --out"
        )
    pairs = _pairs(args)
    model, tokenizer = options.load_model(args)
    with options.stage(f"score on {len(pairs)} pairs"):
        scores = score(
            model,
            in_order(tokenizer, pairs, args.batch_size),
            refusal,
            reduction=args.reduction,
            memory=args.memory,
            keep=args.ratio,
            offload=args.offload,
            sigma_per=args.sigma_per,
        )
    scores.meta |= {
        "model": options.without_folders(args.model),
        "model_fingerprint": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "data": options.without_folders(args.pairs or args.prompts or "built-in"),
        "pairs": len(pairs),
    }
    with options.stage("select"):
        mask = scores.top(args.ratio)
        mask.save(mask_path)
    if args.save_scores:
        scores.save(scores_path)
        if isinstance(scores, TopScores):
            print(
                f"note: {printable(str(scores_path))}: holds only the top {scores.keep:.3g}, within --memory, which "
                "safekern verify and report cannot use. For all, score with more --memory, or with --offload instead",
                file=sys.stderr,
            )
    written = [mask_path, *([scores_path] if args.save_scores else [])]
    components, layers = mask.summary().table("component"), mask.summary().table("layer")
    if args.json:
        found = {
            "mask": {"numel": mask.numel, "model_numel": mask.model_numel, "fingerprint": mask.fingerprint},
            "meta": mask.meta,
            "components": components.records(),
            "layers": layers.records(),
            "written": [str(path) for path in written],
        }
        print(json.dumps(found, indent=2))
        return
    print(f"{mask}\n\n{mask.summary().heat_map()}\n\n{components}\n")
    print(f"Written to {', '.join(printable(str(path)) for path in written)}")


def _outputs(out: Path) -> tuple[Path, Path]:
    if out.suffix == ".safetensors":
        files.check_writable(out, "mask")
        return out, out.with_name(f"{out.stem}_scores.safetensors")
    options.prepare_folder(out, "mask.safetensors", "mask")
    return out / "mask.safetensors", out / "scores.safetensors"


def _pairs(args: argparse.Namespace) -> Pairs:
    if args.prompts is not None:
        pairs = with_refusals(load_prompts(args.prompts))
    elif args.pairs is not None:
        pairs = options.load_refusals("--pairs", args.pairs)
    else:
        pairs = builtin("harmful", "tune")
    return pairs[: args.limit]
