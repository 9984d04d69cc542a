"""What other training libraries need beyond an optimizer: a Trainer's way to build one, DDP, merging LoRA adapters.

Most need nothing. ``transformers.Trainer`` and TRL's trainers take ``optimizers=(SETAdamW(...), None)``, and
``Accelerator.prepare(model, optimizer)`` works as with any optimizer.
"""

import inspect
import itertools
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from safekern.eligibility import check_plain
from safekern.errors import InvalidArgumentError
from safekern.faults import put_back
from safekern.layout import memory_indices, read_selected, write_selected
from safekern.mask import Mask, check_mask
from safekern.optim.replicas import LEFT_TO_SET
from safekern.sharding import in_process_group

# Ways of PEFT to initialise an adapter that subtract it from the base weight.
_TAKEN_OUT = ("pissa", "olora", "corda", "loftq", "lora_ga")


def for_trainer(optimizer_class: Callable[..., Optimizer]) -> Callable[[], Callable[..., Optimizer]]:
    """Lets a ``Trainer`` build a masked optimizer itself, once its model is ready.

    Given an ``Optimizer`` class, a Trainer would pass it parameter groups without names, which a mask cannot be matched
    with. It calls anything else as ``factory()(model, **kwargs)``: this makes such a factory.

    Args:
        optimizer_class: `SETAdamW`, `SPAAdamW`, or anything else that takes ``model.named_parameters()`` first.

    Returns:
        What a Trainer takes for the class in ``optimizer_cls_and_kwargs``. The learning rate and others belong there,
        too: the Trainer hands on none of its own arguments.

    Raises:
        InvalidArgumentError: not a class or function; later, from the Trainer, no ``lr`` was given.

    Example:
        >>> factory = safekern.integrations.for_trainer(safekern.SETAdamW)                          # doctest: +SKIP
        >>> options = {"mask": mask, "lr": 1e-4}                                                    # doctest: +SKIP
        >>> Trainer(model, args, optimizer_cls_and_kwargs=(factory, options), ...).train()          # doctest: +SKIP

    Source: ``Trainer.create_optimizer`` of transformers 5.
    """
    if not callable(optimizer_class):
        raise InvalidArgumentError(f"optimizer_class must be one such as SETAdamW, got {optimizer_class!r:.50}")

    def build(model: nn.Module, **options: Any) -> Optimizer:
        if "lr" not in options and "lr" in inspect.signature(optimizer_class).parameters:
            raise InvalidArgumentError(
                "a Trainer does not hand on the learning_rate, weight_decay and adam_* of its arguments: give lr, and "
                "what else differs from the defaults, in optimizer_cls_and_kwargs: (factory, {'mask': mask, 'lr': ...})"
            )
        return optimizer_class(model.named_parameters(), **options)

    return lambda: build


@torch.no_grad()
def leave_to_set(model: nn.Module, mask: Mask) -> "LeftToSet":
    """Keeps ``DistributedDataParallel`` away from the masked parameters, which `SETAdamW` then looks after.

    With ``in_backward=True`` no dense gradient is left for DDP to average, and it would write zeros back. So it is told
    to ignore the masked parameters; `SETAdamW` averages their selected entries over all processes in ``step()``, one
    all-reduce of 4 bytes per selected weight. DDP does not send ignored parameters to the other processes at the start
    either: this does, from process 0.

    DDP goes on averaging gradients of the other parameters that train. What is given to `SETAdamW` beyond its mask has
    gradients of zero, so give it the masked parameters alone where another optimizer trains others. Freeze those that
    nobody trains. Where none is left, DDP has nothing to do and refuses the model: train it without, each process on
    its own batches.

    Args:
        model: about to be wrapped: `torch.compile` and wrappers for checkpointing, which rename parameters, come
            before. The same in all processes, which call this together.
        mask: of the optimizer.

    Returns:
        What ends it. The model is marked until then, also when the optimizer is gone, and wrapped in DDP for another
        optimizer, its masked parameters would be averaged by nobody. The masked optimizers and `protect` refuse that;
        others cannot know.

    Raises:
        MaskMismatchError: the mask does not fit the model.
        InvalidArgumentError: a masked parameter is sharded, which DDP is not for; or there is no process group yet,
            though the environment says that there are several processes.

    Example:
        >>> left = safekern.integrations.leave_to_set(model, mask)                                  # doctest: +SKIP
        >>> masked = [(name, param) for name, param in model.named_parameters() if name in mask]    # doctest: +SKIP
        >>> opt = safekern.SETAdamW(masked, mask, in_backward=True)                                 # doctest: +SKIP
        >>> train(DistributedDataParallel(model), opt)                                              # doctest: +SKIP
        >>> left.remove()                                                                           # doctest: +SKIP

    The Trainer and ``Accelerator.prepare`` wrap the model themselves: call this after ``TrainingArguments`` or the
    ``Accelerator`` was made, and before them.
    """
    check_mask(mask)
    masked = mask.parameters(model)
    for name, (param, _) in masked.items():
        check_plain(name, param)
    together = in_process_group()
    if not together and os.environ.get("WORLD_SIZE", "1") != "1":
        # As torchrun sets it. Without a word from process 0, each would go on from masked weights of its own.
        raise InvalidArgumentError(
            f"this is one of {os.environ['WORLD_SIZE']} processes, and there is no process group yet to send the "
            "masked weights over: call torch.distributed.init_process_group() before, or make the Accelerator or the "
            "Trainer's TrainingArguments, which do"
        )
    params = {id(param): param for param, _ in masked.values()}
    aliases = [
        alias
        for name, param in model.named_parameters(remove_duplicate=False)
        if id(param) in params
        # The second is what DDP calls a parameter of the model itself.
        for alias in ([name] if "." in name else [name, f".{name}"])
    ]
    left = LeftToSet(model, aliases, list(params.values()))
    if together:
        for param in params.values():
            dist.broadcast(param.detach(), src=0)
    return left


class LeftToSet:
    """What `leave_to_set` returns: the parameters that ``DistributedDataParallel`` is kept away from.

    Args:
        model: whose they are.
        names: what DDP calls them.
        params: the parameters.

    Example:
        >>> left = safekern.integrations.leave_to_set(model, mask)                                  # doctest: +SKIP
        >>> train(DistributedDataParallel(model), set_optimizer)                                    # doctest: +SKIP
        >>> left.remove()                                                                           # doctest: +SKIP
        >>> train(DistributedDataParallel(model), spa_optimizer)                                    # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, names: list[str], params: list[torch.Tensor]) -> None:
        self._model, self._names, self._params = model, names, params
        # What DistributedDataParallel asks a model for; torch has no public function to set it.
        model._ddp_params_and_buffers_to_ignore = [*self._ignored(), *names]  # type: ignore[assignment]
        for param in params:
            setattr(param, LEFT_TO_SET, True)

    def remove(self) -> None:
        """Leaves the parameters to DDP again, of the next time that the model is wrapped."""
        names = self._ignored()
        for name in self._names:
            with suppress(ValueError):
                names.remove(name)
        self._model._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]
        for param in self._params:
            with suppress(AttributeError):
                delattr(param, LEFT_TO_SET)
        self._names, self._params = [], []

    def _ignored(self) -> list[str]:
        return list(getattr(self._model, "_ddp_params_and_buffers_to_ignore", []))


@torch.no_grad()
def merge_lora(peft_model: Any, mask: Mask) -> nn.Module:
    """Merges the active adapters of a PEFT model into its base weights, except into the weights of a mask.

    Fine-tuning with LoRA leaves the base weights alone, but merging the adapter moves most of them, protected ones too.
    Here the masked weights keep their bits (safety-preserving adaptation, arXiv 2604.08297), and every other weight is
    what ``peft_model.merge_and_unload()`` makes of it. The adapter was trained as if it moved those too, so measure
    the merged model again.

    Args:
        peft_model: a ``peft.PeftModel`` whose adapters are not merged yet. It is used up, as by ``merge_and_unload``,
            but left as it was by an exception or Ctrl-C. For that, the base weights under adapters are copied to the
            CPU's memory until it is done.
        mask: the weights to keep; its names are those of the base model.

    Returns:
        The base model with the adapters merged.

    Raises:
        InvalidArgumentError: not a PEFT model, quantised base weights, adapters that are merged already, or such that
            took their part out of the base weights when they were made (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA). Nothing
            was changed.
        MaskMismatchError: the mask does not fit the base model. Nothing was changed.

    Example:
        >>> merged = safekern.merge_lora(peft_model, mask)          # doctest: +SKIP
        >>> merged.save_pretrained("merged")                        # doctest: +SKIP
    """
    check_mask(mask)
    if not hasattr(peft_model, "merge_and_unload"):
        raise InvalidArgumentError(
            f"a peft.PeftModel with adapters in its layers is needed, got {type(peft_model).__name__}: a model without "
            "adapters needs no merging, and prompt tuning cannot be merged"
        )
    for name, module in peft_model.named_modules():
        if getattr(module, "merged", False):
            raise InvalidArgumentError(
                f"the adapter of {name} is merged already, so the base weights are gone: call unmerge_adapter() first, "
                "or load the base model and the adapter again"
            )
    for adapter, config in getattr(peft_model, "peft_config", {}).items():
        made_by = getattr(config, "init_lora_weights", None)
        if isinstance(made_by, str) and made_by.startswith(_TAKEN_OUT):
            raise InvalidArgumentError(
                f"the adapter {adapter} was made by {made_by}, which takes a part of the base weights out of them, so "
                "that those to keep are not there: turn it into a plain LoRA adapter by save_pretrained(..., "
                "path_initial_model_for_weight_conversion=...), and load that on the base model"
            )
    # Without the copies that modules_to_save trains: the mask means the base, whose bits are to take their place.
    params = {
        name: param
        for name, param in peft_model.named_parameters(remove_duplicate=False)
        if "modules_to_save" not in name.split(".")
    }
    kept = {}
    for name, given in mask.resolve(params).items():
        param = params[given]
        check_plain(given, param)
        kept[name] = read_selected([param], [memory_indices(param, mask.compact(name))])
    undo = _undo_of_merging(peft_model)
    try:
        merged: nn.Module = peft_model.merge_and_unload()
        params = dict(merged.named_parameters(remove_duplicate=False))
        for name, given in mask.resolve(params).items():
            param = params[given]
            write_selected([param], [memory_indices(param, mask.compact(name))], kept[name])
    except BaseException:
        put_back(undo)
        raise
    return merged


def _undo_of_merging(peft_model: nn.Module) -> Callable[[], None]:
    """What gives a PEFT model back its modules, and the bits of the weights that its adapters would change."""
    modules = list(peft_model.modules())
    wrapped = [base for module in modules if isinstance(base := getattr(module, "base_layer", None), nn.Module)]
    values = {
        tensor: tensor.detach().to("cpu", copy=True)
        for base in wrapped
        for tensor in itertools.chain(base.parameters(), base.buffers())
    }
    # A module keeps its parts in dictionaries and lists, and PEFT what it has merged. It may change the config too.
    configs = [vars(config) for module in modules if hasattr(config := getattr(module, "config", None), "__dict__")]
    noted: list[dict[str, Any] | list[Any]] = [*(vars(module) for module in modules), *configs]
    noted += [held for module in modules for held in vars(module).values() if isinstance(held, dict | list)]
    contents = [held.copy() for held in noted]

    @torch.no_grad()
    def undo() -> None:
        for held, content in zip(noted, contents, strict=True):
            held.clear()
            if isinstance(held, list):
                held.extend(content)
            else:
                held.update(content)
        for tensor, value in values.items():
            tensor.copy_(value)

    return undo
