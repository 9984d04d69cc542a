"""Training that is measured on the way, and goes on where it was interrupted."""

import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch.optim import Optimizer

from safekern import Mask, SETAdamW, resume
from safekern.modes import frozen
from safekern.training import Batch, tune

from .lab import Lab, checksum
from .runs import Record, Row

# Between the steps at which everything is measured; at these, forward passes only.
WATCHED = (20, 50, 70, 200, 500, 700)
# Between two files of all that a run goes on from, each of which takes seconds; about what an interruption loses.
_SAVED_EVERY_SECONDS = 300.0

Parts = Sequence[tuple[float, Iterable[Batch]]]


def select_all(model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, None]]:
    """For `resume.Weights`: every weight."""
    return {name: (param, None) for name, param in model.named_parameters()}


def optimizer_for(
    model: torch.nn.Module, mask: Mask | None, lr: float
) -> tuple[Callable[[int], Optimizer], resume.Weights]:
    """What makes AdamW on the weights of a mask, or on all, and the weights that it is going to change."""
    if mask is None:
        return lambda done: torch.optim.AdamW(model.parameters(), lr=lr), resume.Weights(select_all(model))
    return lambda done: SETAdamW(model.named_parameters(), mask, lr=lr), resume.Weights(mask.parameters(model))


def tune_and_measure(
    lab: Lab,
    record: Record,
    make_optimizer: Callable[[int], Optimizer],
    weights: resume.Weights,
    make_parts: Callable[[int], Parts],
    steps: Sequence[int],
    *,
    watched: Sequence[int] = WATCHED,
    saved_every: int = 1,
    extra: Callable[[Row], Row] = lambda row: {},
) -> None:
    """Takes as many steps as the last of ``steps``, with a row of the record at each of them and each watched one.

    Args:
        lab: its model is trained as it is.
        record: where the rows go.
        make_optimizer: called with the steps already taken, once the weights are those to go on from.
        weights: those that training changes.
        make_parts: the data after so many steps.
        steps: when to measure everything.
        watched: when to do forward passes only.
        saved_every: go on only where a multiple of so many steps was taken.
        extra: adds measurements to those of every row.
    """
    # Of one file of results: the same run with another --out has a training of its own.
    path = lab.path(f"{record.path.stem}-{checksum([str(record.path.resolve())])}-training")
    # What is left of a run whose results were removed is not that of this one.
    if not record.rows:
        path.unlink(missing_ok=True)
    run = resume.load(path, record.settings) if path.exists() else None
    done = [] if run is None else run.losses
    record.keep([row for row in record.rows if row["step"] <= len(done)])
    if run is not None:
        weights.write(run.weights)
    optimizer = make_optimizer(len(done))
    if run is not None:
        run.restore(optimizer)
    saved = time.monotonic()

    def after(losses: list[float]) -> None:
        nonlocal saved
        step = len(losses)
        if step in steps or step in watched:
            measured = lab.measure() if step in steps else lab.watch()
            recent = losses[-10:]
            record.add({"step": step, "loss": round(sum(recent) / len(recent), 4), **measured, **extra(measured)})
        if step < steps[-1] and step % saved_every == 0 and time.monotonic() - saved >= _SAVED_EVERY_SECONDS:
            resume.save(path, weights.read(), optimizer, losses, record.settings)
            saved = time.monotonic()

    with frozen(weights.others(lab.model)):
        tune(lab.model, optimizer, make_parts(len(done)), steps[-1], done=done, after_step=after)
    path.unlink(missing_ok=True)
