"""Which parameters of a model are scored."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from safekern.errors import InvalidArgumentError
from safekern.layout import sharing
from safekern.sharding import is_gathered, is_sharded, local

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_WHOLE = "this works on whole models, not on shards: use one process, or gather the model's state_dict first"

_NORM = re.compile(r"Norm(\dd|Gated|PerHead)?$", re.IGNORECASE)
_ROUTERS = ("router", "router_gate", "shared_expert_gate")
_PACKED = (torch.uint8, torch.int16, torch.int32)


def eligible_parameters(
    model: nn.Module, select: Callable[[str, nn.Parameter], bool] | None = None
) -> dict[str, nn.Parameter]:
    """The parameters to score, in the model's order.

    Without ``select``: floating point, at least 2-D, frozen ones too, except embeddings (and a head tied to one),
    biases, norms, mixture-of-experts routers and adapter matrices. A tied parameter appears once, under its first name;
    a parameter without elements never does.

    Args:
        model: any module.
        select: ``select(name, param) -> bool`` replaces the default choice.

    Raises:
        InvalidArgumentError: nothing is chosen, or a chosen parameter cannot be scored; ``select`` is no function; the
            model has lazy modules that have seen no batch yet; or, without ``select``, it is quantised.
    """
    if select is not None and not callable(select):
        raise InvalidArgumentError(
            f"select must be a function select(name, param) -> bool, got {type(select).__name__}: for a list of names "
            "pass select=lambda name, param: name in names"
        )
    for name, param in model.named_parameters():
        check_initialized(name, param)
    by_default = select is None
    if select is None:
        excluded = {id(param) for param in _excluded(model)}

        def select(name: str, param: nn.Parameter) -> bool:
            return param.is_floating_point() and param.ndim >= 2 and id(param) not in excluded

    chosen = {name: param for name, param in model.named_parameters() if param.numel() and select(name, param)}
    if by_default:
        _check_unpacked(model, chosen)
    if not chosen:
        raise InvalidArgumentError(
            "no parameter of the model is eligible for scoring: choose some with select=lambda name, param: ..."
        )
    for name, param in chosen.items():
        check_plain(name, param, sharded=True)
    _check_apart(model, chosen)
    return chosen


def _check_apart(model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> None:
    """Refuses weights that are another parameter's as well: each would have a part of their gradient."""
    for one, other in sharing(model.named_parameters()):
        if one in chosen or other in chosen:
            raise InvalidArgumentError(
                f"parameters {one} and {other} share memory, and each would get a part of the gradient: tie them as "
                "one parameter (a.weight = b.weight, without .data), or give one a copy"
            )


def _check_unpacked(model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> None:
    # Of a model in 4 or 8 bits little is left that is floating point, often an output head alone.
    packed = dict(_packed(model))
    if sum(map(_weights_in, packed.values())) > sum(param.numel() for param in chosen.values()):
        name, tensor = next(iter(packed.items()))
        raise InvalidArgumentError(
            f"most weights of the model are integers ({name} is {tensor.dtype}), which no gradient reaches: it is "
            "quantised; load it in bfloat16, or choose what to score all the same with select=lambda name, param: ..."
        )


def _packed(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Integers in place of weights: GPTQ and AWQ keep them in buffers, which hold masks and positions as well."""
    for name, param in model.named_parameters():
        if not (param.is_floating_point() or param.is_complex()):
            yield name, param
    for name, buffer in model.named_buffers():
        if buffer.dtype in (torch.int8, *_PACKED) and buffer.ndim >= 2 and buffer.shape[0] > 1:
            yield name, buffer


def _weights_in(packed: Tensor) -> int:
    """Bytes of types that are packed hold two weights of 4 bits each."""
    return 2 * packed.nbytes if packed.dtype in _PACKED else packed.numel()


def own_numel(model: nn.Module, chosen: Iterable[nn.Parameter] = ()) -> int:
    """How many weights a model has without its adapters: what a ratio is of, whatever is being trained on it.

    Adapters that were chosen to be scored are among the weights that the ratio selects, and count.
    """
    adapters = {id(param) for param in _adapters(model)} - {id(param) for param in chosen}
    return sum(param.numel() for param in model.parameters() if id(param) not in adapters)


def check_initialized(name: str, param: Tensor) -> None:
    """Refuses parameters of lazy modules, whose shape is known only after the first batch.

    Args:
        name: of the parameter, for messages.
        param: the parameter.

    Raises:
        InvalidArgumentError: as above.
    """
    if is_lazy(param):
        raise InvalidArgumentError(
            f"parameter {name} is of a lazy module and has no shape yet: run the model on a batch first"
        )


def check_plain(name: str, param: Tensor, *, sharded: bool = False) -> None:
    """Refuses parameters whose memory the kernels cannot address, or whose gradient autograd cannot compute.

    Args:
        name: of the parameter, for messages.
        param: the parameter.
        sharded: the caller can work on the part that this process holds.

    Raises:
        InvalidArgumentError: as above.
    """
    check_kept(name, param, sharded=sharded)
    if sharded and is_sharded(param):
        param = local(param)
    if param.is_meta:
        raise InvalidArgumentError(
            f"parameter {name} is on the meta device (offloaded or not loaded yet), so no gradient will reach it: "
            "load the model's weights onto a real device first"
        )
    is_wrapper: bool = is_traceable_wrapper_subclass(param)
    if is_wrapper:
        raise InvalidArgumentError(
            f"parameter {name} is a {type(param).__name__}, not a plain tensor: "
            + (_WHOLE if is_sharded(param) else "quantised parameters are not supported")
        )
    if param.dtype not in SUPPORTED_DTYPES:
        raise InvalidArgumentError(
            f"parameter {name} has dtype {param.dtype}; bfloat16, float16, float32 and float64 are supported: leave it "
            "out, or load the model unquantised"
        )
    if param.is_inference():
        raise InvalidArgumentError(
            f"parameter {name} was made under torch.inference_mode, so it can have no gradient: load the model outside "
            "of it"
        )
    if param.layout == torch.strided and param.numel() and not param.untyped_storage().size():
        raise InvalidArgumentError(
            f"the memory of parameter {name} was freed: ask the model for its parameters again, once what sharded or "
            "offloaded it has put them back"
        )


def check_kept(name: str, param: Tensor, *, sharded: bool = False) -> None:
    """Refuses parameters that FSDP2 puts into a model for a time only.

    Whatever is done to them is lost when FSDP2 frees them, without a word: no gradient reaches them either.

    Args:
        name: of the parameter, for messages.
        param: the parameter.
        sharded: the caller can work with the sharded parameter in its place.

    Raises:
        InvalidArgumentError: as above.
    """
    if is_gathered(param):
        raise InvalidArgumentError(
            f"parameter {name} is what FSDP2 gathered for a forward without a backward, such as an evaluation, and "
            "frees later: "
            + (
                "call model.reshard() before this (and reshard() of submodules that fully_shard() was to leave whole "
                "after a forward), or do this before the evaluation"
                if sharded
                else _WHOLE
            )
        )


def _adapters(model: nn.Module) -> Iterator[nn.Parameter]:
    for prefix, module in model.named_modules():
        if prefix.rpartition(".")[2].startswith("lora_"):
            yield from module.parameters()
        # PEFT layers say themselves which of their attributes are adapters.
        for attribute in getattr(module, "adapter_layer_names", ()):
            adapter = getattr(module, attribute, None)
            if isinstance(adapter, nn.Module):
                yield from adapter.parameters()
        for leaf, param in module.named_parameters(recurse=False):
            if leaf.startswith("lora_"):
                yield param


def _excluded(model: nn.Module) -> Iterator[nn.Parameter]:
    yield from _adapters(model)
    for prefix, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or _is_router(model, prefix, module):
            yield from module.parameters()
        # What PEFT's modules_to_save replace has no part in the model's output.
        original = getattr(module, "original_module", None)
        if isinstance(original, nn.Module) and not getattr(module, "disable_adapters", False):
            yield from original.parameters()
        # Only what is the norm's own, and not LayerNormLinear, NormHead or RobertaPreLayerNormModel: their weights are
        # none, but for vectors, which are left out anyway.
        if _NORM.search(type(module).__name__):
            yield from module.parameters(recurse=False)
        for leaf, param in module.named_parameters(recurse=False):
            if "bias" in leaf.split("_") or "embed" in leaf:
                yield param


def _is_router(model: nn.Module, prefix: str, module: nn.Module) -> bool:
    """`mlp.gate` beside `mlp.experts` routes, `mlp.gate_proj` does not; nor does a `gate` in a dense block."""
    parent, _, own = prefix.rpartition(".")
    if own in _ROUTERS or type(module).__name__.endswith("Router"):
        return True
    return own == "gate" and hasattr(model.get_submodule(parent), "experts")
