"""What ``safekern set`` and ``safekern spa`` share: a training run that can be interrupted and resumed."""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from safekern import resume
from safekern.chat import answer_logits, encode
from safekern.cli import options
from safekern.errors import FileAccessError, InvalidArgumentError
from safekern.mask import Mask
from safekern.modes import frozen
from safekern.progress import Progress
from safekern.prompts import Pairs, builtin, load
from safekern.tables import printable
from safekern.training import Batch, pair_named, tune

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FILE = "training.safetensors"


def add_pairs(parser: argparse.ArgumentParser) -> None:
    """Adds the options of what aligns a model: refusals, and helpful answers."""
    parser.add_argument(
        "--harmful", type=Path, metavar="FILE", help="harmful prompts with refusals (default: built-in)"
    )
    parser.add_argument("--benign", type=Path, metavar="FILE", help="prompts with helpful answers (default: built-in)")


def add_training(
    parser: argparse.ArgumentParser,
    *,
    iterations: int,
    lr: float,
    batch_size: int,
    every: int,
    size: Callable[[str], int] = options.number,
) -> None:
    """Adds the options of a training run with a mask, with the defaults of the command and its type of batch size."""
    parser.add_argument("--mask", type=Path, required=True, metavar="FILE", help="a mask file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    group = parser.add_argument_group("training")
    group.add_argument(
        "--iterations", type=options.number, default=iterations, metavar="N", help=f"steps (default: {iterations})"
    )
    group.add_argument("--lr", type=options.positive, default=lr, help=f"learning rate (default: {lr:g})")
    group.add_argument(
        "--batch-size",
        type=size,
        default=batch_size,
        metavar="N",
        help=f"pairs per step (default: {batch_size})",
    )
    group.add_argument("--seed", type=options.seed, default=0, help="order of the training pairs (default: 0)")
    group.add_argument(
        "--checkpoint-every",
        type=options.number,
        default=every,
        metavar="N",
        help=f"steps between the files that --resume goes on from (default: {every})",
    )
    group.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")


def prepare(args: argparse.Namespace, report: str, settings: dict[str, Any], *, saves_model: bool) -> None:
    """Makes sure that the run can be written, replaces nothing else, and neither loses nor misses an interrupted one.

    Args:
        args: the options of `add_training`.
        report: the name of the report in ``--out``.
        settings: of the run, beside those of `add_training`, as far as they are known without the model.
        saves_model: whether the whole model is written there, too.

    Raises:
        SafekernError: it cannot.
    """
    target = args.out / "model"
    # Only `spa` has --data.
    inputs = {name: getattr(args, name, None) for name in ("mask", "data", "harmful", "benign")}
    if saves_model:
        for name, path in {"model": args.model, **inputs}.items() if target.exists() else ():
            if path is not None and Path(path).resolve().is_relative_to(target.resolve()):
                raise InvalidArgumentError(
                    f"--out {args.out}: the tuned model would take the place of --{name} {path}; give another"
                )
        options.check_replaceable(target, args.out / report)
    elif os.path.lexists(target) and "model/" in options.written_before(args.out / report):
        raise InvalidArgumentError(
            f"--out {args.out}: holds the model of an earlier run, which would stay beside the report of this one; add "
            "--save-model to replace it, or give another --out"
        )
    options.prepare_folder(args.out, _FILE)
    options.check_output("--out", args.out / report, inputs.values())
    options.check_replaceable(args.out / report, args.out / report)
    exists = (args.out / _FILE).exists()
    if args.resume and not exists:
        raise FileAccessError(f"{args.out / _FILE}: no such file, so there is no run to resume; leave --resume out")
    if exists and not args.resume:
        raise InvalidArgumentError(
            f"{args.out / _FILE}: an interrupted run; add --resume to go on with it, or remove the file"
        )
    if args.resume:
        taken = resume.check(args.out / _FILE, _with_training(args, settings))
        if taken > args.iterations:
            raise InvalidArgumentError(
                f"{args.out / _FILE}: has taken {taken} of --iterations {args.iterations} already"
            )


def _with_training(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, **{name: getattr(args, name) for name in ("lr", "batch_size", "seed")}}


def read_pairs(args: argparse.Namespace) -> tuple[Pairs, Pairs]:
    """Refusals and helpful answers, from the files that the options of `add_pairs` name or built-in."""
    harmful = options.load_refusals("--harmful", args.harmful) if args.harmful else builtin("harmful", "tune")
    benign = load(args.benign) if args.benign else builtin("benign", "tune")
    return harmful, benign


def named_pairs(args: argparse.Namespace) -> dict[str, str]:
    """What reports say of where the pairs of `read_pairs` come from."""
    return {name: options.without_folders(getattr(args, name) or "built-in") for name in ("harmful", "benign")}


def check_pairs(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", sources: Mapping[str, Pairs]
) -> dict[str, str]:
    """Makes sure that every pair can be trained on: a run that fails on its way could not go on with other data.

    Args:
        model: what is trained.
        tokenizer: the model's.
        sources: by the option that they are from.

    Returns:
        By source, SHA-256 (hex) of what is trained on: the same data, wherever it came from, in the same template.

    Raises:
        InvalidArgumentError: one cannot; names it.
    """
    lengths: dict[tuple[str, int], int] = {}
    digests: dict[str, str] = {}
    for source, pairs in sources.items():
        digest = hashlib.sha256()
        rows = zip(pairs.prompts, pairs.responses, strict=True)
        with Progress(f"check {source}", "pair", len(pairs), leave=False) as bar:
            for number, pair in enumerate(rows, 1):
                with pair_named(number, source):
                    batch = encode(tokenizer, *pair)
                lengths[source, number] = batch["labels"].shape[1]
                digest.update(json.dumps([batch[name].tolist() for name in ("input_ids", "labels")]).encode())
                bar.update()
        digests[source] = digest.hexdigest()
    source, number = max(lengths, key=lambda row: lengths[row])
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and lengths[source, number] > most:
        # Many models take more, and only trying tells.
        pairs = sources[source]
        batch = encode(tokenizer, pairs.prompts[number - 1], pairs.responses[number - 1])
        with pair_named(number, source), torch.no_grad():
            answer_logits(model, batch)
    return digests


def train(
    args: argparse.Namespace,
    model: "PreTrainedModel",
    weights: resume.Weights,
    make_optimizer: Callable[[], Optimizer],
    make_parts: Callable[[int], Sequence[tuple[float, Iterable[Batch]]]],
    settings: dict[str, Any],
) -> list[float]:
    """Tunes the model, with a checkpoint now and then.

    Args:
        args: the options of `add_training`.
        model: trained in place.
        weights: those that training changes.
        make_optimizer: called once the weights are those to go on from.
        make_parts: the data after so many iterations.
        settings: of the run, beside those of `add_training`.

    Returns:
        The loss of every iteration.

    Raises:
        SafekernError: the run to resume is another one, or something of training.
    """
    path = args.out / _FILE
    settings = _with_training(args, settings)
    run = resume.load(path, settings) if args.resume else None
    if run is not None:
        weights.write(run.weights)
    optimizer = make_optimizer()
    done = []
    if run is not None:
        run.restore(optimizer)
        done = run.losses
    # It holds all weights and moments once more.
    del run

    def checkpoint(losses: list[float]) -> None:
        if len(losses) % args.checkpoint_every == 0 and len(losses) < args.iterations:
            resume.save(path, weights.read(), optimizer, losses, settings)

    try:
        # Of embeddings above all: the gradient of what training leaves alone may be the largest.
        with (
            frozen(weights.others(model)),
            options.stage(f"tune, {len(done)} of {args.iterations} steps done" if done else "tune"),
        ):
            return tune(model, optimizer, make_parts(len(done)), args.iterations, done=done, after_step=checkpoint)
    except KeyboardInterrupt:
        if path.exists():
            print(f"note: the same command with --resume goes on from {printable(str(path))}", file=sys.stderr)
        raise


def finish(
    args: argparse.Namespace,
    model: "PreTrainedModel",
    base: str,
    tuned: str,
    mask: Mask,
    losses: list[float],
    details: dict[str, Any],
    *,
    checked: str,
    written: Sequence[str],
) -> None:
    """Writes the report, removes the checkpoint, which is of no use any more, and says what was done.

    Args:
        args: the options of `add_training`.
        model: the tuned one.
        base: the fingerprint of the model as it was.
        tuned: that of the tuned one, taken before it was saved: a model without its report is not replaced by
            ``--resume``, so nothing that takes time may come between them.
        mask: which weights were updated, or spared.
        losses: of every iteration.
        details: what the report holds beside what all do.
        checked: a sentence on what is certain of the weights.
        written: the files in ``--out``, the report last.
    """
    report = {
        "model": options.without_folders(args.model),
        "model_fingerprint": base,
        "tuned_fingerprint": tuned,
        "dtype": str(model.dtype).removeprefix("torch."),
        "mask": options.without_folders(args.mask),
        "mask_fingerprint": mask.fingerprint,
        "mask_numel": mask.numel,
        "model_numel": mask.model_numel,
        **details,
        "losses": losses,
        "iterations": args.iterations,
        "lr": args.lr,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "versions": options.versions(),
        "written": list(written),
    }
    options.write_json(args.out / written[-1], report)
    (args.out / _FILE).unlink(missing_ok=True)
    if args.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{mask}\n{_summary(losses)}\n{checked}\nWritten to {printable(str(args.out))}: {', '.join(written)}")


def _summary(losses: list[float]) -> str:
    """How the loss went, in words."""
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    return f"loss {first:.3f} at first, {last:.3f} at last (means over {tenth} of {len(losses)} steps)"
