"""``safekern set``: Safety Enhancement Tuning, which makes a model refuse by updating the weights of a mask alone."""

import argparse
from typing import Any

from safekern import files
from safekern.checkpoint import Patched, fingerprint
from safekern.cli import options, tuning
from safekern.delta import save_delta
from safekern.errors import InvalidArgumentError, SafekernError
from safekern.mask import Mask
from safekern.models import save
from safekern.optim import SETAdamW
from safekern.resume import Weights
from safekern.training import LEARNING_RATE, REFUSAL_WEIGHT, TUNING_BATCH_SIZE, balanced

_DESCRIPTION = """\
Makes a model refuse harmful prompts by updating the weights of a mask alone (SET, arXiv 2604.08297); every other weight
stays bit-identical, which is checked. Half of each batch are refusals of harmful prompts, half ordinary helpful
answers: tuned on refusals alone, a model learns to refuse everything.

Writes to --out:
  delta.safetensors   the new values of the masked weights, for `safekern apply` onto the same model
  set.json            settings and losses
  model/              the whole tuned model, with --save-model

Memory: the model, at most 16 bytes per masked weight, the largest single gradient, and the activations of a batch.
"""
_EPILOG = """\
example: score a model, align it, look at what that did, and ship the change

  safekern score --model ./model --out run
  safekern set --model ./model --mask run/mask.safetensors --out run
  safekern apply --model ./model run/delta.safetensors --out ./aligned
  safekern verify --model ./aligned --mask run/mask.safetensors --quick

If it is interrupted: the same command again with --resume. It ends with the same bits
where the device computes deterministically.
"""


def add_parser(commands: Any) -> None:
    """Adds ``set`` to the subcommands."""
    parser = commands.add_parser(
        "set",
        help="align a model by updating only the weights of a mask",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_model(parser)
    tuning.add_pairs(parser)
    parser.add_argument(
        "--refusal-weight",
        type=options.share,
        default=REFUSAL_WEIGHT,
        metavar="W",
        help="share of the refusals in the loss, from 0 to 1; more of it refuses more, also what is harmless "
        f"(default: {REFUSAL_WEIGHT})",
    )
    # Half of each batch is of each kind.
    tuning.add_training(
        parser, iterations=100, lr=LEARNING_RATE, batch_size=TUNING_BATCH_SIZE, every=25, size=options.even
    )
    parser.add_argument("--save-model", action="store_true", help="also write the whole tuned model")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Tunes a model.

    Raises:
        SafekernError: an option or a file is wrong, found out before the long work starts; or training failed.
    """
    mask = Mask.load(args.mask)
    harmful, benign = tuning.read_pairs(args)
    settings = {"command": "set", "mask": mask.fingerprint, "refusal_weight": args.refusal_weight}
    tuning.prepare(args, "set.json", settings, saves_model=args.save_model)
    files.check_writable(args.out / "delta.safetensors", "delta")
    model, tokenizer = options.load_model(args)
    if args.save_model:
        options.note_left_out(model)
        options.check_savable(model)
    base = options.check_mask(mask, model)
    digests = tuning.check_pairs(model, tokenizer, {"--harmful": harmful, "--benign": benign})
    selected = mask.parameters(model)
    weights = Weights(selected)
    original = weights.read()

    losses = tuning.train(
        args,
        model,
        weights,
        # No dense gradient outlives its layer, so that the memory above the model is that of the mask.
        lambda: SETAdamW(model.named_parameters(), mask, lr=args.lr, in_backward=True),
        lambda skip: balanced(
            tokenizer,
            harmful,
            benign,
            batch_size=args.batch_size,
            refusal_weight=args.refusal_weight,
            seed=args.seed,
            skip=skip,
        ),
        {**settings, "model": base, **digests},
    )
    before: dict[str, Any] = dict(model.named_parameters())
    before |= {
        name: Patched(name, param.detach(), indices, original[name]) for name, (param, indices) in selected.items()
    }
    if not weights.changed(original):
        raise InvalidArgumentError(
            f"no weight has changed: --lr {args.lr:g} is too small for {args.iterations} steps on weights in "
            f"{str(model.dtype).removeprefix('torch.')}, so there is nothing to save; give a larger one"
        )
    with options.stage("save"):
        if fingerprint(before) != base:
            raise SafekernError("weights outside the mask have changed; nothing was written. Please report this")
        tuned = fingerprint(model)
        save_delta(model, mask, args.out / "delta.safetensors", base=before)
        if args.save_model:
            save(model, tokenizer, args.out / "model")
    tuning.finish(
        args,
        model,
        base,
        tuned,
        mask,
        losses,
        {**tuning.named_pairs(args), "refusal_weight": args.refusal_weight},
        checked="Every weight outside the mask was checked to be bit-identical.",
        written=["delta.safetensors", *["model/"] * args.save_model, "set.json"],
    )
