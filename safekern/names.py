"""Parameter names: seeing through wrappers, and sorting parameters into layers and components for reports."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from safekern.errors import MaskMismatchError

COMPONENTS = ("embed", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
"""The components that most models have, in the order in which reports show them."""

_WRAPPERS = ("module", "_orig_mod", "base_layer", "original_module", "_checkpoint_wrapped_module", "token_adapter")
# Names that attention and MLP both use, or that say nothing at all, are shown with their parent's.
_VAGUE = ("c_proj", "dense", "proj")


def canonical(name: str) -> str:
    """Strips what DDP, ``torch.compile``, PEFT and torch's checkpoint wrapper add to a parameter's name.

    These are the components ``module``, ``_orig_mod``, ``base_layer``, ``original_module``, ``token_adapter`` and
    ``_checkpoint_wrapped_module`` anywhere, and ``base_model.model.`` at the start. The last component is the
    parameter's own name and always stays.

    Args:
        name: A name as ``named_parameters()`` gives it.

    Example:
        >>> from safekern.names import canonical
        >>> canonical("module._orig_mod.base_model.model.layers.0.q_proj.base_layer.weight")
        'layers.0.q_proj.weight'
    """
    *modules, own = name.split(".")
    modules = [part for part in modules if part not in _WRAPPERS]
    while modules[:2] == ["base_model", "model"]:
        del modules[:2]
    return ".".join([*modules, own])


def resolve(wanted: Iterable[str], available: Iterable[str]) -> dict[str, str]:
    """Finds each wanted name among the available ones.

    An exact match wins; else the one available name that is equal up to wrappers. A module that PEFT trains whole
    (``modules_to_save``) is there twice, and a name from before does not say which one it means.

    Args:
        wanted: Names to look for.
        available: Names to look among.

    Returns:
        For each wanted name that was found, the available name.

    Raises:
        MaskMismatchError: If several available names fit, or one fits several wanted names.

    Example:
        >>> from safekern.names import resolve
        >>> resolve(["a.weight", "b.weight"], ["module.a.weight", "c.weight"])
        {'a.weight': 'module.a.weight'}
    """
    exact = dict.fromkeys(available)
    unwrapped: dict[str, list[str]] = {}
    trained: dict[str, list[str]] = {}
    for name in exact:
        unwrapped.setdefault(canonical(name), []).append(name)
        if "modules_to_save" in name.split("."):
            trained.setdefault(canonical(_untrained(name)), []).append(name)

    found: dict[str, str] = {}
    claims: dict[str, str] = {}
    for name in dict.fromkeys(wanted):
        candidates = [name] if name in exact else unwrapped.get(canonical(name), [])
        # Whoever names the original in full means it.
        says_which = name in exact or "original_module" in name.split(".")
        copies = [] if says_which else trained.get(canonical(name), [])
        way_out = "Use the full name."
        if candidates and copies:
            candidates = [*candidates, *copies]
            way_out = (
                "PEFT trains a copy (modules_to_save) in place of the original, which stays beside it: merge the "
                "adapter, or make the mask on the model with it."
            )
        if len(candidates) > 1:
            raise MaskMismatchError(f"{name!r} is ambiguous: it may be {' or '.join(map(repr, candidates))}. {way_out}")
        for candidate in candidates:
            if candidate in claims:
                raise MaskMismatchError(
                    f"{claims[candidate]!r} and {name!r} both name the parameter {candidate!r}. Keep one of them."
                )
            claims[candidate] = name
            found[name] = candidate
    return found


def _untrained(name: str) -> str:
    """The name of the original that a parameter in PEFT's ``modules_to_save`` is the copy of, for one adapter."""
    parts = name.split(".")
    position = parts.index("modules_to_save")
    return ".".join([*parts[:position], "original_module", *parts[position + 2 :]])


def layer(name: str) -> int | None:
    """The number of the layer a parameter belongs to, or None outside the layers.

    Args:
        name: A parameter's name. Its first numeric component counts, unless it numbers an expert.

    Example:
        >>> from safekern.names import layer
        >>> layer("model.layers.12.mlp.experts.7.w1.weight"), layer("lm_head.weight")
        (12, None)
    """
    parts = canonical(name).split(".")
    position = _layer_position(parts)
    return None if position is None else int(parts[position])


def listed(items: Sequence[str], shown: int = 5) -> str:
    """The first few of names for a message, and how many more there are."""
    more = f" and {len(items) - shown:,} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more


def component(name: str) -> str:
    """What a parameter is inside its layer, under the same name in every layer.

    Usually the module that holds it, such as ``q_proj``; for experts and shared experts, prefixed with ``experts.``
    or ``shared_expert.``; for names like GPT-2's ``c_proj``, which attention and MLP share, prefixed with the parent.
    Embeddings of every spelling are ``embed``, and GPT-NeoX's ``embed_out`` is ``lm_head``.

    Args:
        name: A parameter's name.

    Example:
        >>> from safekern.names import component
        >>> component("model.layers.0.self_attn.q_proj.weight"), component("model.layers.0.mlp.experts.7.w1.weight")
        ('q_proj', 'experts.w1')
        >>> component("h.0.attn.c_proj.weight"), component("wte.weight")
        ('attn.c_proj', 'embed')
    """
    parts = canonical(name).split(".")
    position = _layer_position(parts)
    if position is not None:
        del parts[position]
    if len(parts) > 1 and parts[-1] in ("weight", "bias"):
        parts.pop()
    for group in ("experts", "shared_expert", "shared_experts"):
        if group in parts:
            inner = [part for part in parts[parts.index(group) + 1 :] if not _is_number(part)]
            return ".".join([group, *inner[-1:]])
    last = parts[-1]
    if last == "embed_out":
        return "lm_head"
    # The convolution over patches of an image is no lookup, and is scored.
    if last.startswith("patch"):
        return last
    if last.startswith("embed") or last.endswith(("embedding", "embeddings")) or last in ("wte", "wpe"):
        return "embed"
    if last in _VAGUE or _is_number(last):
        return ".".join(parts[-2:])
    return last


def expert(name: str) -> int | None:
    """The number of the expert whose module holds a parameter, or None for anything else, fused experts too.

    Args:
        name: A parameter's name.

    Example:
        >>> from safekern.names import expert
        >>> expert("model.layers.12.mlp.experts.7.w1.weight"), expert("model.layers.12.mlp.experts.down_proj")
        (7, None)
    """
    parts = canonical(name).split(".")
    if "experts" not in parts:
        return None
    number = parts[parts.index("experts") + 1 :][:1]
    return int(number[0]) if number and _is_number(number[0]) else None


def fused_experts(name: str, shape: Sequence[int]) -> int | None:
    """How many experts a parameter holds as slices along its first dimension, or None for anything else.

    Mixtures of experts in transformers that fuse their experts stack them there: ``(experts, out, in)``, or
    ``(experts, in, out)`` in GPT-OSS and Llama 4. Of DBRX, which puts the rows of all experts into one matrix, and
    JetMoE, whose modules have other names, the tensors count as any other.

    Args:
        name: A parameter's name.
        shape: Its shape.

    Example:
        >>> from safekern.names import fused_experts
        >>> fused_experts("model.layers.12.mlp.experts.down_proj", (8, 64, 32))
        8
        >>> fused_experts("model.layers.12.mlp.experts.7.w1.weight", (64, 32))
    """
    is_fused = len(shape) == 3 and "experts" in canonical(name).split(".") and expert(name) is None
    return shape[0] if is_fused else None


def component_order(component: str) -> tuple[int, str]:
    """Sorts components as reports show them: those of :data:`COMPONENTS` first, then by name.

    Example:
        >>> from safekern.names import component_order
        >>> sorted(["lm_head", "mixer", "q_proj"], key=component_order)
        ['q_proj', 'lm_head', 'mixer']
    """
    known = component in COMPONENTS
    return (COMPONENTS.index(component) if known else len(COMPONENTS), component)


def layer_order(layer: int | None) -> tuple[bool, int]:
    """Sorts layers by number, what is outside of them last."""
    return (layer is None, layer or 0)


ORDERS: dict[str, Callable[[Any], Any]] = {"component": component_order, "layer": layer_order}
"""The order of the rows of a report, by what its rows stand for."""


def _layer_position(parts: list[str]) -> int | None:
    for position, part in enumerate(parts[:-1]):
        if part == "experts":
            break
        if _is_number(part):
            return position
    return None


def _is_number(part: str) -> bool:
    # Python refuses to turn thousands of digits into a number, and no model has that many layers.
    return part.isascii() and part.isdecimal() and len(part) < 10
