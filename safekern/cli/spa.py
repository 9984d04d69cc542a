"""``safekern spa``: Safety Preserving Adaptation, which fine-tunes a model with the weights of a mask frozen."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from safekern.checkpoint import fingerprint
from safekern.cli import options, tuning
from safekern.errors import InvalidArgumentError, ProtectionError
from safekern.mask import Mask
from safekern.models import save
from safekern.optim import SPAAdamW
from safekern.prompts import load
from safekern.resume import Weights
from safekern.training import (
    REFUSAL_WEIGHT,
    REHEARSAL,
    TUNING_BATCH_SIZE,
    rehearsed_per_step,
    with_rehearsal,
)

# Passes over what is rehearsed within which the NLL of held-out answers and refusals stays below where it began. Beside
# GSM8K it was back there after 1.9 passes over 120 answers, and 5.9 over 170 refusals (benchmarks/README.md).
_PASSES = {"benign": 2, "harmful": 5}
# As many as make no more passes over the built-in pairs.
_ITERATIONS = 150

_DESCRIPTION = """\
Fine-tunes an aligned model on your prompts and responses with the weights of a mask frozen, bit for bit (SPA, arXiv
2604.08297), and rehearses refusals of harmful prompts and helpful answers beside them, which kept a model's safety in
our experiments. The mask has to be that of the aligned model: score that one.

Writes to --out:
  model/      the whole fine-tuned model; all but the mask has changed, so a delta would be no smaller
  spa.json    settings and losses
  training.safetensors, while it runs: what --resume needs, every weight and two moments in fp32, so 10 to 12 bytes
              per weight, and twice that while one takes the other's place; a larger --checkpoint-every writes less

Memory: the model, for every weight a gradient and two moments in fp32, and the activations of a batch. Weights of 16
bits round most steps of a usual learning rate away: --dtype float32 learns more, for 2 bytes more per
weight and per gradient.
"""
_EPILOG = """\
example: keep what makes a model safe while it learns grade-school math

  safekern score --model ./aligned --out run
  safekern spa --model ./aligned --mask run/mask.safetensors --data math.jsonl --out run

--data is JSON, JSONL or CSV with the fields prompt/response, instruction/output, question/answer, or messages. In our
experiments freezing slowed the loss of safety and rehearsal kept it (README, "Does it work?"); --rehearsal 0 leaves it
out. The built-in pairs are few: for more than 150 steps, give your own.

If it is interrupted: the same command again with --resume. It ends with the same bits
where the device computes deterministically.
"""


def add_parser(commands: Any) -> None:
    """Adds ``spa`` to the subcommands."""
    parser = commands.add_parser(
        "spa",
        help="fine-tune a model with the weights of a mask frozen",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_model(parser)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="prompts with the responses to learn")
    tuning.add_pairs(parser)
    parser.add_argument(
        "--rehearsal",
        type=options.less_than_all,
        default=REHEARSAL,
        metavar="W",
        help=f"share of these two in the loss, from 0 (none) to less than 1 (default: {REHEARSAL})",
    )
    tuning.add_training(parser, iterations=_ITERATIONS, lr=2e-5, batch_size=TUNING_BATCH_SIZE, every=100)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Fine-tunes a model.

    Raises:
        SafekernError: an option or a file is wrong, found out before the long work starts; or training failed.
    """
    mask = Mask.load(args.mask)
    pairs = load(args.data)
    if (args.harmful or args.benign) and not args.rehearsal:
        raise InvalidArgumentError("--harmful and --benign mean nothing with --rehearsal 0: leave them out")
    harmful, benign = tuning.read_pairs(args)
    settings = {
        "command": "spa",
        "mask": mask.fingerprint,
        "rehearsal": args.rehearsal,
        "refusal_weight": REFUSAL_WEIGHT,
    }
    tuning.prepare(args, "spa.json", settings, saves_model=True)
    rehearsed = {"benign": benign, "harmful": harmful} if args.rehearsal else {}
    for kind, those in rehearsed.items():
        _note_passes(args, kind, len(those))
    model, tokenizer = options.load_model(args)
    options.note_left_out(model)
    options.check_savable(model)
    base = options.check_mask(mask, model)
    sources = {"--data": pairs, **{f"--{kind}": those for kind, those in rehearsed.items()}}
    digests = tuning.check_pairs(model, tokenizer, sources)
    if any(param.dtype.itemsize < 4 for param in model.parameters()):
        print(
            f"note: 16-bit weights round most steps of --lr {args.lr:g} away, so the model learns little; --dtype "
            "float32 keeps them, for 2 bytes more per weight and per gradient",
            file=sys.stderr,
        )
    protected = Weights(mask.parameters(model))
    original = protected.read()

    losses = tuning.train(
        args,
        model,
        Weights({name: (param, None) for name, param in model.named_parameters()}),
        # Second moments in bfloat16 could not decay.
        lambda: SPAAdamW(model.named_parameters(), mask, lr=args.lr, state_dtype=torch.float32),
        lambda skip: with_rehearsal(
            tokenizer,
            pairs,
            harmful,
            benign,
            batch_size=args.batch_size,
            rehearsal=args.rehearsal,
            seed=args.seed,
            skip=skip,
        ),
        {**settings, "model": base, **digests},
    )
    for name in protected.changed(original):
        raise ProtectionError(f"protected weights of {name} have changed; nothing was written. Please report this")
    with options.stage("save"):
        tuned = fingerprint(model)
        save(model, tokenizer, args.out / "model")
    tuning.finish(
        args,
        model,
        base,
        tuned,
        mask,
        losses,
        {
            "data": options.without_folders(args.data),
            "pairs": len(pairs),
            "rehearsal": args.rehearsal,
            **({**tuning.named_pairs(args), "refusal_weight": REFUSAL_WEIGHT} if args.rehearsal else {}),
        },
        checked="Every weight of the mask was checked to be bit-identical.",
        written=["model/", "spa.json"],
    )


def _note_passes(args: argparse.Namespace, kind: str, pairs: int) -> None:
    """Says on stderr if so little is rehearsed that training learns it by heart."""
    passes = args.iterations * rehearsed_per_step(args.batch_size) / pairs
    if passes > _PASSES[kind]:
        print(
            f"note: {args.iterations:,} steps go {passes:.0f} times over {pairs:,} rehearsed pairs, which are learned "
            f"by heart then, and other prompts get worse answers; give more with --{kind}, or fewer --iterations",
            file=sys.stderr,
        )
