"""``score``: passes of forward and backward that fold gradients into ESI accumulators."""

import itertools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from numbers import Real
from types import TracebackType
from typing import Any, Literal, Self, cast

import torch
import torch.distributed as dist
import torch.utils.hooks
from torch import Tensor, nn

from safekern import ops
from safekern._version import __version__
from safekern.chat import check_batched, to_device
from safekern.claims import claimed
from safekern.deviation import SigmaPer, deviations
from safekern.eligibility import eligible_parameters, own_numel
from safekern.errors import InvalidArgumentError, NonFiniteError, ScoringError
from safekern.faults import out_of_memory_explained, put_back
from safekern.indices import index_dtype
from safekern.progress import Progress
from safekern.scores import RunningTop, Scores, TopScores, count_of
from safekern.sharding import Processes, Shard, failing_together, fully_sharded, is_sharded, like, local, reshard

Objective = Callable[[nn.Module, Any], Tensor]

# Hooks that a parameter has already must neither act on the gradients of scoring (an optimizer that steps in backward)
# nor change them (a mask or a scale that belongs to someone's training). Those on its AccumulateGrad node, which are an
# older way, run all the same, and find no gradient.
_SET_ASIDE = ("grad", "_backward_hooks", "_post_accumulate_grad_hooks")

# Elements of one gradient per batch that are kept to compare sweeps by.
_WATCHED = 256

# Python's warning filters belong to the whole process: who needs ours, and what was there before it.
_FILTER_LOCK = threading.Lock()
_FILTER_HOLDERS: set[object] = set()
_FILTERS_BEFORE: list[AbstractContextManager[Any]] = []


def score(
    model: nn.Module,
    loader: Iterable[Any],
    objective: Objective | None = None,
    *,
    reduction: Literal["mean", "abs"] = "mean",
    select: Callable[[str, nn.Parameter], bool] | None = None,
    progress: bool | None = None,
    memory: float | None = None,
    keep: float = 0.05,
    offload: bool = False,
    sigma_per: SigmaPer = "tensor",
) -> Scores:
    """Scores every eligible weight by its Expected Safety Impact, ``|sigma * dS/dtheta|`` (arXiv 2604.08297).

    Runs forward and backward once per batch, in the train or eval mode it finds. Every gradient is folded into an fp32
    accumulator and freed inside backward, so that the memory needed above the model and 4 bytes per eligible weight is
    the activations and the largest single gradient. Weights, ``.grad``, ``requires_grad`` and hooks are afterwards as
    they were, also after an exception; those of another model in the objective get gradients, unless it is frozen.
    Models may be scored at once, in threads of their own.

    Args:
        model: a module whose parameters are on real devices: plain tensors, or DTensors of ``fully_shard`` (FSDP2),
            HSDP or tensor parallelism; also in DistributedDataParallel. Every process then calls ``score`` with its own
            batches (processes that share a model by tensor parallelism with the same ones), and gets scores over all of
            them: under DDP as the mean over all batches, added up at the end; under FSDP2, where processes need the
            same number of batches, what they do together is one batch.
        loader: batches: mappings, sequences or tensors, moved to the model's device.
        objective: ``objective(model, batch) -> scalar``. By default ``model(**batch).loss`` for a mapping, else
            ``model(*batch)``. See :mod:`safekern.objectives`. It is a loss, or says that it is to be maximised by an
            attribute ``maximised``; that matters to :meth:`~safekern.scores.Scores.in_conflict_with` alone.
        reduction: ``"mean"`` ranks by the absolute mean gradient over batches (as published), ``"abs"`` by the mean of
            the absolute gradients of the batches.
        select: ``select(name, param) -> bool`` chooses the parameters; by default floating point, at least 2-D, no
            embeddings, biases, norms, routers or adapters.
        progress: show a progress bar; by default when stderr is a terminal, and elsewhere a line about once a minute.
        memory: bytes that accumulators may take. When 4 bytes per eligible weight are more than that, the loader is
            swept several times: each sweep is a full forward and backward over all batches that accumulates a part of
            the parameters and keeps the running global top candidates. ``top(ratio)`` of the result, for a ratio of at
            most ``keep``, is then the same mask bit for bit; anything else raises. Every sweep starts from the same
            state of torch's random numbers, and of the torch.Generator that an objective has as its ``generator``, so
            shuffling, dropout and noise repeat. That each batch has the same loss again is checked, and the same
            gradient of one parameter but for rounding. Backward has to be deterministic too (see
            :func:`torch.use_deterministic_algorithms`).
        keep: the share of the model's weights to keep as candidates, in (0, 1]. A candidate takes 20 bytes of
            ``memory`` (8 between sweeps), so a smaller share leaves more of it to accumulators and needs fewer sweeps.
        offload: accumulate in CPU memory when the model is on a GPU (``memory`` then bounds that). Every gradient
            crosses the bus once per batch, 2 bytes per bf16 weight, and the GPU waits while the CPU adds it.
        sigma_per: ``"tensor"`` takes the standard deviation over the whole tensor that holds a weight (as published).
            Where the experts of a mixture are fused into one 3-D tensor, that one number serves all of them;
            ``"expert"`` takes it over each expert's slice instead, as if every expert had tensors of its own. No
            difference for any other tensor.

    Returns:
        The scores: by parameter, fp32 of its shape, on its device (with ``offload`` on the CPU), sharded as it is; or
        :class:`~safekern.scores.TopScores`, where ``memory`` took several sweeps.

    Raises:
        InvalidArgumentError: an empty loader, nothing to score, a parameter that cannot be scored, a one-shot iterator
            where several sweeps are needed, a ``memory`` too small for the largest parameter and the candidates;
            arguments that differ between processes, or a device mesh or DistributedDataParallel that leaves some out.
        OutOfMemoryError: memory ran out; the message says what takes it, and what to lower.
        ScoringError: the objective did not return a scalar with a graph to the model, no gradient arrived, gradient
            checkpointing would lose some, a backward pass other than that of ``score`` reached the model, or a sweep
            did not see the batches and losses of the first one. Of several processes, those that did not fail: it
            names one that did. What fails before the first batch, or in the loader of a sharded model, all processes
            raise at once; an error in forward or backward, and Ctrl-C, the others hear of at their next batch, or
            where they wait for that process in a collective, when it has ended or after the process group's timeout.
        ModelInUseError: another thread is scoring or perturbing the model.
        NonFiniteError: a weight, or the loss or a gradient of some batch, is NaN or infinite.

    Example:
        >>> batches = [safekern.objectives.encode(tokenizer, p, r) for p, r in pairs]      # doctest: +SKIP
        >>> scores = safekern.score(model, batches, safekern.objectives.refusal)           # doctest: +SKIP
        >>> mask = scores.top(0.01)                                                        # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(f"a model is a torch.nn.Module, got {type(model).__name__}")
    # Its gradients would be averaged over processes batch by batch; once, at the end, is enough.
    model, replicated = _unreplicated(model)
    reshard(model)
    # Several processes hold one model, or each of them a model of its own. Parameters that are not scored count too:
    # a forward takes all that hold some.
    sharded = Processes.of(list(model.parameters()))
    replicas = Processes(_device(model), together=replicated)
    everyone = replicas if replicated else sharded
    # Not by its truth: an objective may be a list of what it has seen.
    compute = _model_loss if objective is None else objective
    with failing_together("score", together=everyone.size > 1) as check_others:
        params, parts, k, model_numel = everyone.alike(
            partial(
                _planned, model, loader, objective, reduction, select, memory, keep, offload, sigma_per, sharded.size
            ),
            lambda plan: (
                reduction,
                sigma_per,
                [(name, tuple(param.shape)) for name, param in plan[0].items()],
                *plan[1:],
            ),
            "all need the same model, reduction, sigma_per, memory and keep, and a select that chooses the same "
            "parameters",
        )
        sigma = deviations(params, sigma_per)
        gpus = sorted({param.device.index for param in model.parameters() if param.is_cuda})
        replay = _Replay(len(parts))
        top = RunningTop(k)

        def begin(part: list[str]) -> _GradientFold:
            _check_finite(sigma)
            watch = replay.watch if len(parts) > 1 else None
            return _GradientFold(model, params, part, sharded, absolute=reduction == "abs", host=offload, watch=watch)

        for sweep, part in enumerate(parts, 1):
            label = "score" if len(parts) == 1 else f"score, sweep {sweep}/{len(parts)}"
            bar = Progress(label, "batch", _length(loader), shown=progress)
            explained = _memory_explained(model, params, part)
            with _chance_repeats(objective, gpus, enabled=sweep < len(parts)), bar, explained:
                fold, _ = everyone.agreed(partial(begin, part))
                _sweep(fold, model, loader, compute, replay, bar, check_others)
            _, counts = replicas.agreed(partial(replay.finish, fold.num_batches), lambda _: replay.num_batches)
            accs = fold.means(replicas, sum(counts))
            if len(parts) > 1:
                top.add(accs, sigma)
    details: dict[str, Any] = {
        "num_batches": sum(counts),
        "model_numel": model_numel,
        "meta": {
            "objective": "model loss"
            if objective is None
            else getattr(objective, "__qualname__", type(objective).__qualname__),
            "reduction": reduction,
            **({"maximised": True} if getattr(objective, "maximised", False) else {}),
            **({"sigma_per": sigma_per} if sigma_per != "tensor" else {}),
            "versions": {"safekern": __version__, "torch": str(torch.__version__)},
        },
    }
    if len(parts) == 1:
        return Scores({name: like(params[name], acc) for name, acc in accs.items()}, sigma, **details)
    shapes = {name: param.shape for name, param in params.items()}
    return TopScores(top.gradients, top.indices, shapes, sigma, keep=float(keep), **details)


def _planned(
    model: nn.Module,
    loader: Iterable[Any],
    objective: Objective | None,
    reduction: str,
    select: Callable[[str, nn.Parameter], bool] | None,
    memory: float | None,
    keep: float,
    offload: bool,
    sigma_per: str,
    holders: int,
) -> tuple[dict[str, nn.Parameter], list[list[str]], int, int]:
    """What is to be scored: the parameters, those of each sweep, how many candidates to keep of how many weights."""
    if reduction not in ("mean", "abs"):
        raise InvalidArgumentError(f"reduction must be 'mean' or 'abs', got {reduction!r}")
    if sigma_per not in ("tensor", "expert"):
        raise InvalidArgumentError(f"sigma_per must be 'tensor' or 'expert', got {sigma_per!r}")
    if isinstance(loader, (Mapping, Tensor, str)) or not isinstance(loader, Iterable):
        raise InvalidArgumentError(
            f"loader must yield batches, got {type(loader).__name__}: to score a single batch, pass [batch]; for a "
            "dataset, its DataLoader"
        )
    if objective is not None and not callable(objective):
        raise InvalidArgumentError(
            f"objective must be a function objective(model, batch) -> loss, got {type(objective).__name__}: for "
            "refusals there is safekern.objectives.refusal"
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise InvalidArgumentError(
            "FullyShardedDataParallel keeps many parameters in one flat tensor: shard the model by fully_shard (FSDP2)"
        )
    if torch.is_inference_mode_enabled():
        raise ScoringError("torch.inference_mode rules gradients out: call score outside of it (torch.no_grad is fine)")
    params = eligible_parameters(model, select)
    if holders > 1:
        _check_spread(model, params)
    _check_replaceable_grads(model)
    if memory is not None and holders > 1:
        raise InvalidArgumentError(
            "memory= sweeps over a model that one process holds; this one is sharded over processes. To keep the "
            "accumulators of each in its CPU memory, use offload=True"
        )
    model_numel = own_numel(model, params.values())
    k = count_of(_positive("keep", keep, most=1), model_numel, sum(param.numel() for param in params.values()))
    parts = [list(params)] if memory is None else _parts(params, _positive("memory", memory), k, offload)
    if len(parts) > 1 and isinstance(loader, Iterator):
        raise InvalidArgumentError(
            f"memory={memory} takes {len(parts)} sweeps over the loader, but a {type(loader).__name__} can be read "
            "only once: pass a list or a DataLoader, or more memory"
        )
    return params, parts, k, model_numel


def _check_spread(model: nn.Module, params: Mapping[str, nn.Parameter]) -> None:
    """What cannot be put together from several processes is found before the long work."""
    has_fsdp = bool(fully_sharded(model))
    for name, param in params.items():
        try:
            Shard.of(param)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{name}: {error}") from error
        if has_fsdp and not is_sharded(param):
            raise InvalidArgumentError(
                f"fully_shard (FSDP2) has left out {name}, whose gradient would be that of each process's own batches: "
                "call fully_shard on the whole model, too, or leave the parameter out with select="
            )


def _check_replaceable_grads(model: nn.Module) -> None:
    """Gradients are set aside, and have to be accepted when they are put back."""
    for name, param in model.named_parameters():
        try:
            param.grad = param.grad
        except RuntimeError as error:
            raise InvalidArgumentError(
                f"the .grad that {name} has is not of its shape and dtype, which have changed since: call "
                "model.zero_grad() first"
            ) from error


def _unreplicated(model: nn.Module) -> tuple[nn.Module, bool]:
    """The model that DistributedDataParallel replicates, and whether it does: all of its gradients or none."""
    replicas = getattr(model, "_orig_mod", model)
    if isinstance(replicas, nn.parallel.DistributedDataParallel):
        _check_group(replicas)
        return cast(nn.Module, replicas.module), True
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise InvalidArgumentError(
                f"{name} is in DistributedDataParallel and the model around it is not, so each process would score its "
                f"own batches alone: pass {name}, or the model before it was wrapped"
            )
    return model, False


def _check_group(model: nn.parallel.DistributedDataParallel) -> None:
    replicas, world = dist.get_world_size(model.process_group), dist.get_world_size()
    if replicas != world:
        raise InvalidArgumentError(
            f"this DistributedDataParallel averages over {replicas} of {world} processes, and scores are over all of "
            "them: make it without process_group=, or score the module inside, in one process"
        )


def _device(model: nn.Module) -> torch.device:
    """Where the inputs go: the first layer of a model that is spread over devices, embeddings included."""
    return next((param.device for param in model.parameters() if not param.is_meta), torch.device("cpu"))


def _sweep(
    fold: "_GradientFold",
    model: nn.Module,
    loader: Iterable[Any],
    compute: Objective,
    replay: "_Replay",
    bar: Progress,
    check_others: Callable[[], None],
) -> None:
    """Folds the gradients of all batches that this process has."""
    device = _device(model)
    with claimed(dict(model.named_parameters()), "scored"), fold, _dropped_gradients_raise():
        for batch in _in_step(loader, fold.processes):
            check_others()
            with torch.enable_grad():
                with _batch_noted(fold.num_batches):
                    loss = compute(model, to_device(batch, device))
                _check_loss(loss, fold.num_batches)
                fold.backward(loss)
                replay.check(fold.num_batches, loss.detach())
            fold.finish_batch()
            bar.update()


@contextmanager
def _batch_noted(number: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"This was in batch {number} of the loader, counted from 0.")
        raise


def _in_step(loader: Iterable[Any], processes: Processes) -> Iterator[Any]:
    """The batches, as long as each of the processes that hold the model has one: a forward takes all of them."""
    if processes.size == 1:
        yield from loader
        return
    batches = _started_late(loader)
    end = object()
    for index in itertools.count():
        batch, ready = processes.agreed(partial(next, batches, end), lambda batch: int(batch is not end))
        if not any(ready):
            return
        if not all(ready):
            raise ScoringError(
                f"{ready.count(0)} of {processes.size} processes had no batch {index}: where a model is "
                "sharded, each needs as many batches as the others, for instance from a DistributedSampler"
            )
        yield batch


def _started_late(loader: Iterable[Any]) -> Iterator[Any]:
    """Starts the loader's workers when the first batch is asked for: where they fail to start, that failed."""
    yield from loader


def _memory_explained(
    model: nn.Module, params: Mapping[str, nn.Parameter], part: list[str]
) -> AbstractContextManager[None]:
    def held() -> dict[str, int]:
        return {
            "the model": sum(local(tensor).nbytes for tensor in itertools.chain(model.parameters(), model.buffers())),
            f"the accumulators of {len(part)} parameters": sum(4 * local(params[name]).numel() for name in part),
            "the largest gradient": max(local(param).nbytes for param in params.values()),
        }

    return out_of_memory_explained(
        held,
        "use smaller batches or shorter examples, or gradient checkpointing, for what else takes memory are a batch's "
        "activations; or give the accumulators less by memory=, or keep them in CPU memory with offload=True",
    )


def _positive(name: str, value: object, most: float = float("inf")) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= most:
        raise InvalidArgumentError(
            f"{name} must be a number above 0{f' and at most {most}' * (most == 1)}, got {value!r}"
        )
    return float(value)


def _parts(params: Mapping[str, nn.Parameter], memory: float, k: int, offload: bool) -> list[list[str]]:
    """Cuts the parameters into runs of neighbours whose accumulators fit into ``memory`` beside k candidates."""
    accumulators = {name: 4 * param.numel() for name, param in params.items()}
    if sum(accumulators.values()) <= memory:
        return [list(params)]
    if len({param.device for param in params.values()}) > 1 and not offload:
        raise InvalidArgumentError(
            "memory= ranks weights on one device, and this model is spread over several: add offload=True, which "
            "accumulates in CPU memory"
        )
    largest = max(accumulators, key=accumulators.__getitem__)
    # A gradient and an index each, and while they are merged an index more and the selection's 8 bytes.
    candidates = k * (12 + 2 * index_dtype(params[largest].numel()).itemsize)
    room = memory - candidates
    if accumulators[largest] > room:
        raise InvalidArgumentError(
            f"memory={memory:,.0f} bytes is too little: {largest} needs {accumulators[largest]:,} for its accumulator, "
            f"and {k:,} candidates need {candidates:,}. Give at least {accumulators[largest] + candidates:,} bytes, "
            "lower keep= (--ratio), or leave memory= out and accumulate in CPU memory with offload=True (--offload)"
        )
    parts: list[list[str]] = [[]]
    left = room
    for name, size in accumulators.items():
        if size > left:
            parts.append([])
            left = room
        parts[-1].append(name)
        left -= size
    return parts


@contextmanager
def _chance_repeats(objective: object, gpus: list[int], *, enabled: bool) -> Iterator[None]:
    """Gives back the random numbers that were used, torch's and the objective's: shuffling, dropout, noise repeat."""
    generator = getattr(objective, "generator", None)
    state = generator.get_state() if enabled and isinstance(generator, torch.Generator) else None
    try:
        with torch.random.fork_rng(gpus, enabled=enabled):
            yield
    finally:
        if state is not None:
            put_back(lambda: cast(torch.Generator, generator).set_state(state))


class _Replay:
    """Makes sure that every sweep over the loader sees the batches of the first one, by their losses and gradients."""

    def __init__(self, sweeps: int) -> None:
        self._sweeps = sweeps
        self._sweep = 1
        self._losses: list[Tensor] = []
        # Of one parameter, some of its gradient in each batch, from all over it: an expert may have none.
        self._watched: str | None = None
        self._gradients: list[Tensor | None] = []
        self._arrived: dict[str, Tensor] = {}
        self.num_batches = 0

    def watch(self, name: str, grad: Tensor) -> None:
        """Takes note of a gradient, or a part of one."""
        if self._watched in (None, name):
            some = grad.reshape(-1)[:: max(1, grad.numel() // _WATCHED)].float()
            self._arrived[name] = self._arrived[name] + some if name in self._arrived else some.clone()

    def check(self, batch: int, loss: Tensor) -> None:
        """Compares a batch whose gradients have arrived with that of the first sweep."""
        if self._sweeps == 1:
            return
        # The first to arrive, since others may belong to no batch.
        self._watched = self._watched or next(iter(self._arrived), None)
        gradient = self._arrived.get(self._watched or "")
        self._arrived.clear()
        if self._sweep == 1:
            self._losses.append(loss.clone())
            self._gradients.append(gradient)
            return
        if batch >= self.num_batches:
            return
        # Bit for bit, but for a NaN, of which the gradients are going to tell more.
        if not torch.allclose(loss, self._losses[batch], 0, 0, equal_nan=True):
            raise ScoringError(
                f"batch {batch} of sweep {self._sweep} has a loss of {loss.item()!r}, in the first sweep it was "
                f"{self._losses[batch].item()!r}: {_REPLAYED}"
            )
        if not _alike(gradient, self._gradients[batch]):
            raise ScoringError(
                f"batch {batch} of sweep {self._sweep} has the loss but not the gradients of the first sweep: "
                f"{_REPLAYED}. An objective that draws noise may have its torch.Generator as its attribute "
                "`generator`, which is put back for every sweep"
            )

    def finish(self, num_batches: int) -> None:
        if num_batches == 0 and self._sweep == 1:
            raise InvalidArgumentError("the loader yielded no batch")
        if self._sweep > 1 and num_batches != self.num_batches:
            raise ScoringError(
                f"the loader yielded {self.num_batches} batches in the first sweep and {num_batches} in sweep "
                f"{self._sweep}: pass one that can be read again and again, such as a list"
            )
        self.num_batches = num_batches
        self._sweep += 1


_REPLAYED = (
    "sweeps need the same batches in the same order and a deterministic objective. Sources of chance are a DataLoader "
    "with a generator of its own or persistent_workers, NumPy or Python random numbers, and kernels that "
    "torch.use_deterministic_algorithms(True) replaces"
)


def _alike(gradient: Tensor | None, before: Tensor | None) -> bool:
    """Whether gradients differ by rounding at most, as those of kernels that add in any order do."""
    if gradient is None or before is None:
        return gradient is before
    distance, size = (gradient - before).norm().item(), before.norm().item()
    # Of NaN and infinity, finish_batch tells more.
    return not distance > 0.1 * size


class _GradientFold:
    """Folds the gradients of a part of ``params`` into accumulators from inside backward, frees those of the others,
    and puts the model back on exit.

    All of ``params`` require gradients whatever the part is: the same graph, and so the same gradients, in every sweep.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, nn.Parameter],
        part: list[str],
        processes: Processes,
        *,
        absolute: bool,
        host: bool,
        watch: Callable[[str, Tensor], None] | None,
    ) -> None:
        self._model = model
        self._params = params
        self._absolute = absolute
        self.processes = processes
        held = {name: local(params[name]) for name in part}
        self.accs = {
            name: torch.zeros(tensor.shape, dtype=torch.float32, device="cpu" if host else tensor.device)
            for name, tensor in held.items()
        }
        self._watch = watch
        self.num_batches = 0
        # On each device a flag per accumulator, and one for the loss: read once per batch, since a read waits for it.
        self._nonfinite: dict[torch.device, Tensor] = {}
        for acc in self.accs.values():
            self._flags_on(acc.device)
        self._arrived: set[str] = set()
        self._backward_of: int | None = None  # the thread that runs it
        self._modes: list[tuple[nn.Module, bool]] = []
        self._found: dict[str, tuple[nn.Parameter, bool, dict[str, Any]]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        chosen = {id(param): name for name, param in self._params.items()}
        flags = {name: self._flags_on(acc.device)[i : i + 1] for i, (name, acc) in enumerate(self.accs.items())}
        try:
            self._modes = [(module, module.training) for module in self._model.modules()]
            for found, param in self._model.named_parameters():
                aside = {attribute: getattr(param, attribute) for attribute in _SET_ASIDE}
                self._found[found] = param, param.requires_grad, aside
                # Gradients of other parameters would be computed and kept for nothing.
                _set_requires_grad(param, id(param) in chosen)
                if id(param) in chosen:
                    name = chosen[id(param)]
                    for attribute in _SET_ASIDE:
                        setattr(param, attribute, None)
                    fold = partial(self._fold, name, self.accs.get(name), flags.get(name))
                    self._handles.append(param.register_post_accumulate_grad_hook(fold))
        except BaseException:
            put_back(self._restore)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        put_back(self._restore)

    def backward(self, loss: Tensor) -> None:
        """The one backward pass whose gradients are folded."""
        self._flags_on(loss.device)[-1].logical_or_(~local(loss.detach()).isfinite().all())
        self._backward_of = threading.get_ident()
        try:
            loss.backward()
        finally:
            self._backward_of = None

    def _flags_on(self, device: torch.device) -> Tensor:
        if device not in self._nonfinite:
            self._nonfinite[device] = torch.zeros(len(self.accs) + 1, dtype=torch.bool, device=device)
        return self._nonfinite[device]

    def _restore(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module, training in self._modes:
            module.training = training
        for param, requires_grad, aside in self._found.values():
            _set_requires_grad(param, requires_grad)
            for attribute, value in aside.items():
                setattr(param, attribute, value)

    def _fold(self, name: str, acc: Tensor | None, flag: Tensor | None, param: Tensor) -> None:
        # For what lies on the CPU, autograd works in the thread that called it; each GPU has a thread of its own.
        # What FSDP2 offloads to the CPU is reduced in that of its mesh's GPU.
        computed_on = param.device_mesh.device_type if is_sharded(param) else param.device.type
        elsewhere = computed_on == "cpu" and self._backward_of != threading.get_ident()
        if self._backward_of is None or elsewhere:
            raise ScoringError(
                f"a backward pass other than that of score reached {name} while it was scored: the objective must "
                "return its loss and leave backward() to score, and no other thread may train the model meanwhile"
            )
        grad, param.grad = param.grad, None
        if grad is None:
            return
        if grad.layout != torch.strided:
            raise ScoringError(f"parameter {name} has a sparse gradient: build its module with sparse=False")
        if is_sharded(grad) and is_sharded(param) and grad.placements != param.placements:
            raise ScoringError(
                f"the gradient of {name} came with the placements {grad.placements}, the parameter has "
                f"{param.placements}: leave it out with select=, or shard it in the plan of its module"
            )
        if self._absolute and name in self._arrived:
            raise ScoringError(
                f"the gradient of {name} came in parts, whose absolute values do not add up to that of the whole: use "
                'reduction="mean", or gradient checkpointing with use_reentrant=False'
            )
        self._arrived.add(name)
        if self._watch is not None:
            self._watch(name, grad.detach())
        if acc is not None and flag is not None:
            ops.accumulate_([acc], [_beside(acc, local(grad.detach()).contiguous())], flag, self._absolute)

    def finish_batch(self) -> None:
        if not self._arrived:
            raise ScoringError(
                f"batch {self.num_batches}: no eligible parameter received a gradient: does the objective use this "
                "model's parameters, with gradients enabled"
                + (", and with set_requires_gradient_sync(True)?" if self.processes.size > 1 else "?")
            )
        self._arrived.clear()
        if not self.num_batches:
            self._check_still_there()
        read = [flags.tolist() for flags in self._nonfinite.values()]
        *flags, is_bad_loss = [any(each) for each in zip(*read, strict=True)]
        names = [name for name, flag in zip(self.accs, flags, strict=True) if flag]
        if not self.processes.every(not names and not is_bad_loss):
            more = f" (and of {len(names) - 1} more)" if len(names) > 1 else ""
            if names:
                found = f"the gradient of {names[0]}{more} holds NaN or infinity (or its sum over batches overflowed)"
            elif is_bad_loss:
                # Where no label counts, the mean over none is NaN, of which every gradient is an exact zero.
                found = "the loss is NaN or infinite"
            else:
                found = "the loss or a gradient in another process holds NaN or infinity"
            raise NonFiniteError(
                f"batch {self.num_batches}: {found}; look for an empty or fully masked example in this batch (labels "
                "that are all -100, as where truncation cut the answers off), or score in bfloat16 or float32 instead "
                "of float16"
            )
        self.num_batches += 1

    def _check_still_there(self) -> None:
        """Gradients of parameters that the first forward made, or made anew, would not be folded, and would be kept."""
        watched = {id(param) for param in self._params.values() if not is_sharded(param)}
        new = []
        for name, param in self._model.named_parameters():
            before = self._found[name][0] if name in self._found else None
            # What FSDP2 gathers, or accelerate loads, for a forward takes the place of another one, too.
            if before is not param and (id(before) in watched or param.grad is not None):
                new.append(name)
                param.grad = None
        for name in new:
            raise ScoringError(
                f"forward {'replaced' if name in self._found else 'made'} parameter {name} when it saw the first "
                "batch: run the model on a batch before it is scored"
            )

    def means(self, replicas: Processes, num_batches: int) -> dict[str, Tensor]:
        """What was folded here and in replicas of the model, over all of their batches."""
        for name in self.accs:
            if replicas.size > 1:
                self.accs[name].copy_(replicas.total(self.accs[name]))
            self.accs[name].div_(num_batches)
        return self.accs


def _set_requires_grad(param: nn.Parameter, requires_grad: bool) -> None:
    # One made under torch.inference_mode takes none, not even what it has.
    if param.requires_grad != requires_grad:
        param.requires_grad_(requires_grad)


def _beside(acc: Tensor, grad: Tensor) -> Tensor:
    if acc.device == grad.device:
        return grad
    # Pinned, for the full speed of the bus; torch keeps the memory for the next one. This copy waits for the device.
    return torch.empty(grad.shape, dtype=grad.dtype, device=acc.device, pin_memory=grad.is_cuda).copy_(grad)


@contextmanager
def _dropped_gradients_raise() -> Iterator[None]:
    """Reentrant checkpointing drops every gradient below an input that needs none, and would only warn.

    Of several threads that score, the first sets the filter, and the last takes it away.
    """
    message = "None of the inputs have requires_grad=True"
    holder = object()

    def release() -> None:
        with _FILTER_LOCK:
            _FILTER_HOLDERS.discard(holder)
            if not _FILTER_HOLDERS and _FILTERS_BEFORE:
                _FILTERS_BEFORE[0].__exit__(None, None, None)
                _FILTERS_BEFORE.clear()

    try:
        with _FILTER_LOCK:
            _FILTER_HOLDERS.add(holder)
            if not _FILTERS_BEFORE:
                before = warnings.catch_warnings()
                before.__enter__()
                _FILTERS_BEFORE.append(before)
                warnings.filterwarnings("error", message, UserWarning)
        yield
    except UserWarning as warning:
        if not str(warning).startswith(message):
            raise
        raise ScoringError(
            "gradient checkpointing would lose the gradients of a whole block, since nothing that enters it needs "
            "one: use checkpointing with use_reentrant=False"
        ) from warning
    finally:
        put_back(release)


def _check_finite(sigma: Mapping[str, Tensor]) -> None:
    for name, values in sigma.items():
        if not (values < float("inf")).all():
            raise NonFiniteError(f"parameter {name} holds NaN or infinity: repair or reload the model before scoring")


def _length(loader: Iterable[Any]) -> int | None:
    """How many batches the progress bar is to expect; loaders without a length raise all sorts of errors."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except Exception:
        return None


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        # Models of packed sequences take all of them in one dimension.
        check_batched(batch, least_dims=1)
        output = model(**batch)
        loss = getattr(output, "loss", None)
        if loss is None:
            held = "" if hasattr(output, "loss") else f" as the attribute of its {type(output).__name__}"
            raise ScoringError(
                f"the model returned no loss{held} for a batch: put 'labels' into the batch, or pass an objective such "
                "as safekern.objectives.refusal"
            )
        return loss  # type: ignore[no-any-return]
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)  # type: ignore[no-any-return]


def _check_loss(loss: object, index: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ScoringError(f"batch {index}: the objective must return a scalar tensor, got {got}")
    if loss.is_complex():
        raise ScoringError(f"batch {index}: the objective must return a real number, got {loss.dtype}: take its .real")
    if not loss.requires_grad:
        raise ScoringError(
            f"batch {index}: the objective's result has no graph to the model's parameters: was it detached, or "
            "computed under torch.no_grad or inference_mode?"
        )
