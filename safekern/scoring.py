"""``score``: one pass of forward and backward that folds gradients into ESI accumulators."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.utils.hooks
from torch import Tensor, nn
from tqdm.auto import tqdm

from safekern import ops
from safekern._version import __version__
from safekern.eligibility import eligible_parameters
from safekern.errors import InvalidArgumentError, NonFiniteError, ScoringError
from safekern.scores import Scores

Objective = Callable[[nn.Module, Any], Tensor]

# Hooks that a parameter has already must neither act on the gradients of scoring (an optimizer that steps in backward)
# nor change them (a mask or a scale that belongs to someone's training).
_SET_ASIDE = ("grad", "_backward_hooks", "_post_accumulate_grad_hooks")


def score(
    model: nn.Module,
    loader: Iterable[Any],
    objective: Objective | None = None,
    *,
    reduction: Literal["mean", "abs"] = "mean",
    select: Callable[[str, nn.Parameter], bool] | None = None,
    progress: bool | None = None,
) -> Scores:
    """Scores every eligible weight by its Expected Safety Impact, ``|sigma * dS/dtheta|`` (arXiv 2604.08297).

    Runs forward and backward once per batch, in the train or eval mode it finds. Every gradient is folded into an fp32
    accumulator and freed inside backward, so that the memory needed above the model and 4 bytes per eligible weight is
    the activations and the largest single gradient. Weights, ``.grad``, ``requires_grad`` and hooks are afterwards as
    they were, also after an exception.

    Args:
        model: a module whose parameters are plain tensors on real devices.
        loader: batches: mappings, sequences or tensors, moved to the model's device.
        objective: ``objective(model, batch) -> scalar``. By default ``model(**batch).loss`` for a mapping, else
            ``model(*batch)``. See :mod:`safekern.objectives`.
        reduction: ``"mean"`` ranks by the absolute mean gradient over batches (as published), ``"abs"`` by the mean of
            the absolute gradients of the batches.
        select: ``select(name, param) -> bool`` chooses the parameters; by default floating point, at least 2-D, no
            embeddings, biases, norms, routers or adapters.
        progress: show a progress bar; by default when stderr is a terminal.

    Raises:
        InvalidArgumentError: an empty loader, nothing to score, a parameter that cannot be scored.
        ScoringError: the objective did not return a scalar with a graph to the model, no gradient arrived, or gradient
            checkpointing would lose some.
        NonFiniteError: a weight, or a gradient of some batch, is NaN or infinite.

    Example:
        >>> batches = [safekern.objectives.encode(tokenizer, p, r) for p, r in pairs]      # doctest: +SKIP
        >>> scores = safekern.score(model, batches, safekern.objectives.refusal)           # doctest: +SKIP
        >>> mask = scores.top(0.01)                                                        # doctest: +SKIP
    """
    if reduction not in ("mean", "abs"):
        raise InvalidArgumentError(f"reduction must be 'mean' or 'abs', got {reduction!r}")
    if isinstance(loader, (Mapping, Tensor, str)) or not isinstance(loader, Iterable):
        raise InvalidArgumentError(
            f"loader must yield batches, got {type(loader).__name__}: to score a single batch, pass [batch]"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise InvalidArgumentError("scoring under DistributedDataParallel is not supported yet: pass model.module")
    if torch.is_inference_mode_enabled():
        raise ScoringError("torch.inference_mode rules gradients out: call score outside of it (torch.no_grad is fine)")
    params = eligible_parameters(model, select)
    sigma = _sigma(params)
    # Where the inputs go: the first layer of a model that is spread over devices, embeddings included.
    device = next(param.device for param in model.parameters() if not param.is_meta)
    compute = objective or _model_loss
    hidden = None if progress is None else not progress
    with (
        _GradientFold(model, params, absolute=reduction == "abs") as fold,
        tqdm(desc="score", unit="batch", total=_length(loader), disable=hidden) as bar,
    ):
        for batch in loader:
            # Once, since it touches the process's warning filters, and every batch takes the same way.
            guard = nullcontext() if fold.num_batches else _dropped_gradients_raise()
            with torch.enable_grad(), guard:
                loss = compute(model, _to_device(batch, device))
                _check_loss(loss, fold.num_batches)
                loss.backward()
            fold.finish_batch()
            bar.update()
    if fold.num_batches == 0:
        raise InvalidArgumentError("the loader yielded no batch")
    torch._foreach_div_(list(fold.accs.values()), float(fold.num_batches))
    return Scores(
        fold.accs,
        sigma,
        num_batches=fold.num_batches,
        model_numel=sum(param.numel() for param in model.parameters()),
        meta={
            "objective": getattr(compute, "__qualname__", type(compute).__qualname__) if objective else "model loss",
            "reduction": reduction,
            "versions": {"safekern": __version__, "torch": str(torch.__version__)},
        },
    )


class _GradientFold:
    """Folds the gradients of ``params`` into accumulators from inside backward, and puts the model back on exit."""

    def __init__(self, model: nn.Module, params: Mapping[str, nn.Parameter], *, absolute: bool) -> None:
        self._model = model
        self._params = params
        self._absolute = absolute
        self.accs = {name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name, p in params.items()}
        self.num_batches = 0
        # One flag per parameter, on its device: read once per batch, since a read waits for the device.
        self._nonfinite = {
            device: torch.zeros(len(params), dtype=torch.bool, device=device)
            for device in dict.fromkeys(p.device for p in params.values())
        }
        self._arrived: set[str] = set()
        self._found: list[tuple[nn.Parameter, bool, dict[str, Any]]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        chosen = {id(param): (i, name) for i, (name, param) in enumerate(self._params.items())}
        try:
            for param in self._model.parameters():
                aside = {attribute: getattr(param, attribute) for attribute in _SET_ASIDE}
                self._found.append((param, param.requires_grad, aside))
                # Gradients of other parameters would be computed and kept for nothing.
                param.requires_grad_(id(param) in chosen)
                if id(param) in chosen:
                    i, name = chosen[id(param)]
                    for attribute in _SET_ASIDE:
                        setattr(param, attribute, None)
                    flag = self._nonfinite[param.device][i : i + 1]
                    fold = partial(self._fold, name, self.accs[name], flag)
                    self._handles.append(param.register_post_accumulate_grad_hook(fold))
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for handle in self._handles:
            handle.remove()
        for param, requires_grad, aside in self._found:
            param.requires_grad_(requires_grad)
            for attribute, value in aside.items():
                setattr(param, attribute, value)

    def _fold(self, name: str, acc: Tensor, flag: Tensor, param: Tensor) -> None:
        grad, param.grad = param.grad, None
        if grad is None:
            return
        if grad.layout != torch.strided:
            raise ScoringError(f"parameter {name} has a sparse gradient: build its module with sparse=False")
        if self._absolute and name in self._arrived:
            raise ScoringError(
                f"the gradient of {name} came in parts, whose absolute values do not add up to that of the whole: use "
                'reduction="mean", or gradient checkpointing with use_reentrant=False'
            )
        self._arrived.add(name)
        ops.accumulate_([acc], [grad.detach().contiguous()], flag, self._absolute)

    def finish_batch(self) -> None:
        if not self._arrived:
            raise ScoringError(
                f"batch {self.num_batches}: no eligible parameter received a gradient: does the objective use this "
                "model's parameters, with gradients enabled?"
            )
        self._arrived.clear()
        read = [flags.tolist() for flags in self._nonfinite.values()]
        names = [name for name, *flags in zip(self._params, *read, strict=True) if any(flags)]
        if names:
            more = f" (and of {len(names) - 1} more)" if len(names) > 1 else ""
            raise NonFiniteError(
                f"batch {self.num_batches}: the gradient of {names[0]}{more} holds NaN or infinity (or its sum over "
                "batches overflowed); look for an empty or fully masked example in this batch, or score in bfloat16 or "
                "float32 instead of float16"
            )
        self.num_batches += 1


@contextmanager
def _dropped_gradients_raise() -> Iterator[None]:
    """Reentrant checkpointing drops every gradient below an input that needs none, and would only warn."""
    message = "None of the inputs have requires_grad=True"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message, UserWarning)
        try:
            yield
        except UserWarning as warning:
            if not str(warning).startswith(message):
                raise
            raise ScoringError(
                "gradient checkpointing would lose the gradients of a whole block, since nothing that enters it needs "
                "one: use checkpointing with use_reentrant=False"
            ) from warning


def _sigma(params: Mapping[str, nn.Parameter]) -> Tensor:
    tensors = [param.detach() for param in params.values()]
    sigma = torch.empty(len(tensors), device="cpu")
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        here = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        dense = [i for i in here if tensors[i].is_contiguous()]
        # Those that have to be copied, one at a time: together, the copies could be as large as the model.
        groups = [dense, *([i] for i in here if not tensors[i].is_contiguous())]
        values = [ops.sigma([tensors[i].contiguous() for i in group]) for group in groups if group]
        sigma[[i for group in groups for i in group]] = torch.cat(values).cpu()
    for name, value in zip(params, sigma.tolist(), strict=True):
        if not value < float("inf"):
            raise NonFiniteError(f"parameter {name} holds NaN or infinity: repair or reload the model before scoring")
    return sigma


def _length(loader: Iterable[Any]) -> int | None:
    """How many batches the progress bar is to expect; loaders without a length raise all sorts of errors."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except Exception:
        return None


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        loss = getattr(model(**batch), "loss", None)
        if loss is None:
            raise ScoringError(
                "the model returned no loss for a batch: put 'labels' into the batch, or pass an objective such as "
                "safekern.objectives.refusal"
            )
        return loss  # type: ignore[no-any-return]
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)  # type: ignore[no-any-return]


def _check_loss(loss: object, index: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ScoringError(f"batch {index}: the objective must return a scalar tensor, got {got}")
    if not loss.requires_grad:
        raise ScoringError(
            f"batch {index}: the objective's result has no graph to the model's parameters: was it detached, or "
            "computed under torch.no_grad or inference_mode?"
        )


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        moved = [_to_device(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch
