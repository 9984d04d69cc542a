"""``score``: one pass of forward and backward that folds gradients into ESI accumulators."""

from collections.abc import Callable, Iterable, Mapping
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
        ScoringError: the objective did not return a scalar with a graph to the model, or no gradient arrived.
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
    params = eligible_parameters(model, select)
    sigma = _sigma(params)
    device = next(iter(params.values())).device
    compute = objective or _model_loss
    num_batches = 0
    with _GradientFold(model, params, absolute=reduction == "abs") as fold, torch.enable_grad():
        for batch in tqdm(loader, "score", unit="batch", disable=None if progress is None else not progress):
            loss = compute(model, _to_device(batch, device))
            _check_loss(loss, num_batches)
            loss.backward()  # type: ignore[no-untyped-call]
            fold.finish_batch(num_batches)
            num_batches += 1
    if num_batches == 0:
        raise InvalidArgumentError("the loader yielded no batch")
    torch._foreach_div_(list(fold.accs.values()), float(num_batches))
    return Scores(
        fold.accs,
        sigma,
        num_batches=num_batches,
        model_numel=sum(param.numel() for param in model.parameters()),
        meta={
            "objective": getattr(compute, "__qualname__", type(compute).__qualname__) if objective else "model loss",
            "reduction": reduction,
            "safekern": __version__,
            "torch": str(torch.__version__),
        },
    )


class _GradientFold:
    """Folds the gradients of ``params`` into accumulators from inside backward, and puts the model back on exit."""

    def __init__(self, model: nn.Module, params: Mapping[str, nn.Parameter], *, absolute: bool) -> None:
        self._model = model
        self._params = params
        self._absolute = absolute
        self.accs = {name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name, p in params.items()}
        # One flag per parameter, on its device: read once per batch, since a read waits for the device.
        self._nonfinite = {
            device: torch.zeros(len(params), dtype=torch.bool, device=device)
            for device in dict.fromkeys(p.device for p in params.values())
        }
        self._arrived = False
        self._found: list[tuple[nn.Parameter, bool, Tensor | None, Any]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        chosen = {id(param): (i, name) for i, (name, param) in enumerate(self._params.items())}
        try:
            for param in self._model.parameters():
                hooks = param._post_accumulate_grad_hooks  # type: ignore[attr-defined]
                self._found.append((param, param.requires_grad, param.grad, hooks))
                # Gradients of other parameters would be computed and kept for nothing.
                param.requires_grad_(id(param) in chosen)
                if id(param) in chosen:
                    i, name = chosen[id(param)]
                    param.grad = None
                    # Hooks that are there already (an optimizer stepping in backward) must not see these gradients.
                    param._post_accumulate_grad_hooks = None  # type: ignore[attr-defined]
                    flag = self._nonfinite[param.device][i : i + 1]
                    fold = partial(self._fold, name, self.accs[name], flag)
                    self._handles.append(param.register_post_accumulate_grad_hook(fold))
            if any(getattr(module, "gradient_checkpointing", False) for module in self._model.modules()):
                # Reentrant checkpointing drops every gradient below an input that needs none.
                self._handles.extend(
                    module.register_forward_hook(_require_grad)
                    for module in self._model.modules()
                    if isinstance(module, nn.Embedding)
                )
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
        for param, requires_grad, grad, hooks in self._found:
            param.requires_grad_(requires_grad)
            param.grad = grad
            param._post_accumulate_grad_hooks = hooks  # type: ignore[attr-defined]

    def _fold(self, name: str, acc: Tensor, flag: Tensor, param: Tensor) -> None:
        grad, param.grad = param.grad, None
        if grad is None:
            return
        if grad.layout != torch.strided:
            raise ScoringError(f"parameter {name} has a sparse gradient: build its module with sparse=False")
        self._arrived = True
        ops.accumulate_([acc], [grad.detach().contiguous()], flag, self._absolute)

    def finish_batch(self, index: int) -> None:
        if not self._arrived:
            raise ScoringError(
                f"batch {index}: no eligible parameter received a gradient: does the objective use this model's "
                "parameters, with gradients enabled?"
            )
        self._arrived = False
        bad = {i for flags in self._nonfinite.values() for i in flags.nonzero().view(-1).tolist()}
        if bad:
            names = [name for i, name in enumerate(self._params) if i in bad]
            more = f" and {len(names) - 1} more parameters" if len(names) > 1 else ""
            raise NonFiniteError(
                f"batch {index}: the gradient of {names[0]}{more} holds NaN or infinity (or its sum over batches "
                "overflowed); look for an empty or fully masked example in this batch, or score in bfloat16 or float32 "
                "instead of float16"
            )


def _sigma(params: Mapping[str, nn.Parameter]) -> Tensor:
    by_device: dict[torch.device, list[int]] = {}
    tensors = [param.detach() for param in params.values()]
    for i, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(i)
    sigma = torch.empty(len(tensors))
    for members in by_device.values():
        sigma[members] = ops.sigma([tensors[i].contiguous() for i in members]).cpu()
    for name, value in zip(params, sigma.tolist(), strict=True):
        if not value < float("inf"):
            raise NonFiniteError(f"parameter {name} holds NaN or infinity: repair or reload the model before scoring")
    return sigma


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


def _require_grad(module: nn.Module, args: object, output: object) -> None:
    if isinstance(output, Tensor) and output.is_floating_point():
        output.requires_grad_()
