"""``safekern verify``: whether noise on a mask's weights, and only there, takes a model's safety away."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from safekern.cli import options
from safekern.mask import Mask
from safekern.prompts import builtin, load, load_prompts
from safekern.report import load_all, top_beside
from safekern.tables import printable
from safekern.verification import NOISE, Row, verify

_DESCRIPTION = """\
Tests whether a mask holds a model's safety: adds normal noise to its weights, to as many random ones, and with --scores
to as many of the smallest impact, and measures after each, and without noise,

  attack success    harmful prompts that were answered, in text that is not broken
  benign refusals   benign prompts that were refused
  benign NLL        nats per token of helpful answers: what the noise did to everything else
  broken            answers that are empty or repeat themselves; they count neither as success nor as refusal

each with a 95% interval over prompts. If the mask holds the safety of a model that refuses, noise on it lets
attacks succeed which the same noise elsewhere does not. A model that refuses nothing has no safety to lose. Afterwards
every bit of the weights is checked to be what it was.
"""
_EPILOG = """\
example: a quick look at the model that `safekern set` made, and a thorough one

  safekern verify --model ./aligned --mask run/mask.safetensors --quick
  safekern verify --model ./aligned --mask run/mask.safetensors --scores run/scores.safetensors --out verify.json

The intervals say nothing of other draws of noise, which can differ much more (in our experiments 23 to 53% of
attacks succeeded under five on one mask): repeat it with --seed 1 and --seed 2 before you believe it.
"""
_QUICK_LIMIT, _LIMIT = 16, 64
_QUICK_NOISE = (0.1, 0.38)
# With which a result begins.
_MARK = b'{\n  "command": "verify",'


def add_parser(commands: Any) -> None:
    """Adds ``verify`` to the subcommands."""
    parser = commands.add_parser(
        "verify",
        help="add noise to a mask's weights and to others, and compare what that does to safety",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_model(parser)
    parser.add_argument("--mask", type=Path, required=True, metavar="FILE", help="a mask file")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="the scores it was ranked from, for the bottom")
    parser.add_argument("--harmful", type=Path, metavar="FILE", help="harmful prompts (default: built-in, held out)")
    parser.add_argument(
        "--benign", type=Path, metavar="FILE", help="benign prompts with helpful answers (default: built-in, held out)"
    )
    parser.add_argument(
        "--noise",
        type=options.not_negative,
        nargs="+",
        metavar="X",
        help=f"standard deviations, in units of each tensor's (default: {' '.join(f'{level:g}' for level in NOISE)})",
    )
    parser.add_argument(
        "--limit",
        type=options.number,
        metavar="N",
        help=f"only the first N prompts of each kind (default: {_LIMIT})",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{_QUICK_LIMIT} prompts of each kind and noise {' and '.join(map(str, _QUICK_NOISE))}, unless given",
    )
    parser.add_argument("--batch-size", type=options.number, default=32, metavar="N", help="answered together (32)")
    parser.add_argument("--seed", type=options.seed, default=0, help="of the noise and the random weights (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Verifies a mask.

    Raises:
        SafekernError: an option or a file is wrong, found out before the long work starts.
    """
    if args.out is not None:
        inputs = (args.mask, args.scores, args.harmful, args.benign, args.model)
        options.check_output("--out", args.out, inputs, _MARK)
    mask = Mask.load(args.mask)
    limit = args.limit or (_QUICK_LIMIT if args.quick else _LIMIT)
    harmful = builtin("harmful", "eval").prompts if args.harmful is None else load_prompts(args.harmful)
    benign = builtin("benign", "eval") if args.benign is None else load(args.benign)
    scores = None if args.scores is None else load_all(args.scores)
    ranked = None if scores is None else top_beside(mask, scores).equal
    if ranked is False:
        print(
            "note: the mask is not the weights of the largest ESI in --scores: it was ranked by others, or in another "
            "way. The bottom is that of --scores",
            file=sys.stderr,
        )
    model, tokenizer = options.load_model(args)
    fingerprint = options.check_mask(mask, model)

    with options.stage("verify"):
        found = verify(
            model,
            tokenizer,
            mask,
            harmful[:limit],
            benign[:limit],
            scores=scores,
            noise=args.noise or (_QUICK_NOISE if args.quick else NOISE),
            seed=args.seed,
            batch_size=args.batch_size,
            report=_say,
        )
    result = {
        "command": "verify",
        "model": options.without_folders(args.model),
        "model_fingerprint": fingerprint,
        "mask": options.without_folders(args.mask),
        "mask_fingerprint": mask.fingerprint,
        "mask_is_top_of_scores": ranked,
        "restored": True,
        "versions": options.versions(),
        **found.to_dict(),
    }
    if args.out is not None:
        options.write_json(args.out, result)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{mask}\n\n{found}\n\nEvery weight was checked to be what it was, bit for bit.")
    if args.out is not None:
        print(f"Written to {printable(str(args.out))}")


def _say(row: Row) -> None:
    where = "no noise" if row.weights == "none" else f"noise {row.noise:g} on {row.weights}"
    print(f"{where}: attack success {row.attack_success.value:.0%}", file=sys.stderr, flush=True)
