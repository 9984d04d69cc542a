"""Small models, batches and losses to score, faults on the way, and what has to be as it was afterwards."""

import functools
import weakref
from types import SimpleNamespace

import torch
import transformers
from exact import bits, same_bits
from stops import at_backward, raising
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safekern.errors import NonFiniteError


class Toy(nn.Module):
    """Two linear layers between an embedding and a head tied to it; ``mixer`` is used twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 8)
        self.mixer = nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.second = nn.Linear(8, 6)
        self.unused = nn.Linear(3, 2)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, labels):
        hidden = self.first(self.embed(input_ids)).tanh()
        hidden = self.norm(self.mixer(self.mixer(hidden).tanh()))
        logits = self.head(self.second(hidden))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten()))


def toy(seed=0):
    torch.manual_seed(seed)
    return Toy()


def token_batches(count=4, vocabulary=11, seed=1):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(vocabulary, (count, 2, 3, 5), generator=generator)
    return [{"input_ids": batch[0], "labels": batch[1]} for batch in drawn]


def tiny_llama(**config):
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **config)).eval()


class Weights(nn.Module):
    """Holds tensors as parameters. With the objective `linear`, the gradient of each is the batch's tensor for it."""

    def __init__(self, **params):
        super().__init__()
        for name, param in params.items():
            setattr(self, name, nn.Parameter(param))


def linear(model, batch):
    return sum((model.get_parameter(name) * values).double().sum() for name, values in batch.items())


def every(name, param):
    return True


def assert_same_scores(mine, want):
    assert list(mine) == list(want)
    for name in want:
        assert same_bits(mine.gradient(name), want.gradient(name)), name
        assert same_bits(mine.sigma[name], want.sigma[name]), name


def model_loss(model, batch):
    return model(**batch).loss


def used_model():
    """A model in the middle of a training: some weights frozen, some with gradients and hooks, mixed modes."""
    model = toy()
    model.fired = []
    model.first.weight.requires_grad_(False)
    model.norm.requires_grad_(False)
    model.second.eval()
    for param in (model.mixer.weight, model.second.weight, model.embed.weight):
        param.grad = torch.randn_like(param)
    model.first.weight.grad = torch.randn(8, 6)
    for param in (model.mixer.weight, model.embed.weight, model.second.bias):
        param.register_hook(lambda grad: model.fired.append("gradient"))
        param.register_post_accumulate_grad_hook(lambda param: model.fired.append("accumulated"))
    model.mixer.register_forward_hook(lambda *args: None)
    model.second.register_full_backward_hook(lambda *args: None)
    return model


def snapshot(model):
    """What has to be the same afterwards: contents are compared by bits, objects by identity."""
    params = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "objects": [
            *params.values(),
            *(param.grad for param in params.values()),
            *(param._backward_hooks for param in params.values()),
            *(param._post_accumulate_grad_hooks for param in params.values()),
        ],
        "contents": [bits(tensor).clone() for p in params.values() for tensor in (p, p.grad) if tensor is not None],
        "rest": [
            list(params),
            [param.requires_grad for param in params.values()],
            [module.training for module in modules.values()],
            [dict(getattr(module, kind)) for module in modules.values() for kind in hooks],
            [dict(param._backward_hooks or {}) for param in params.values()],
            [dict(param._post_accumulate_grad_hooks or {}) for param in params.values()],
            getattr(model, "fired", [])[:],
        ],
    }


def assert_untouched(model, before):
    after = snapshot(model)
    assert after["rest"] == before["rest"]
    assert all(mine is old for mine, old in zip(after["objects"], before["objects"], strict=True))
    assert all(torch.equal(mine, old) for mine, old in zip(after["contents"], before["contents"], strict=True))


def broken(model, error):
    """A loss whose backward raises."""
    return at_backward(model.first.weight, raising(error)).sum() + model.second.weight.sum()


def failing_at(index, batches, error):
    yield from batches[:index]
    raise error


def spoil(model, batch, name, value):
    """The model's loss plus a term that makes one element of the gradient of one parameter that value."""
    factor = torch.zeros_like(model.get_parameter(name))
    factor.view(-1)[-1] = value if batch["input_ids"][0, 0] == 99 else 0.0
    batch = {**batch, "input_ids": batch["input_ids"].clamp(max=10)}
    return model(**batch).loss + (model.get_parameter(name) * factor).sum()


def marked(index):
    """Batches, the one at that index marked for `spoil`."""
    batches = token_batches()
    batches[index]["input_ids"][0, 0] = 99
    return batches


def scenario(loader=None, objective=model_loss, error=None, message=None, **options):
    return loader or token_batches, objective, error, message, options


SCENARIOS = {
    "success": scenario(),
    "success of all parameters": scenario(select=every, reduction="abs"),
    "nan": scenario(
        functools.partial(marked, 2),
        functools.partial(spoil, name="second.weight", value=float("nan")),
        NonFiniteError,
        r"^batch 2: the gradient of second\.weight holds NaN or infinity",
    ),
    "inf": scenario(
        functools.partial(marked, 0),
        functools.partial(spoil, name="mixer.weight", value=float("-inf")),
        NonFiniteError,
        r"^batch 0: the gradient of mixer\.weight holds NaN or infinity",
        reduction="abs",
    ),
    "nan everywhere": scenario(
        objective=lambda model, batch: model(**batch).loss * float("nan"),
        error=NonFiniteError,
        message=r"^batch 0: the gradient of first\.weight \(and of 2 more\) holds NaN",
    ),
    "overflowing sum": scenario(
        functools.partial(marked, 3),
        lambda model, batch: (
            (model.mixer.weight[0, 0] * 1.3e38).sum() + model(**batch).loss * 0
            if batch["input_ids"][0, 0] != 99
            else model.mixer.weight[0, 0] * 1.3e38
        ),
        NonFiniteError,
        r"^batch 2: the gradient of mixer\.weight holds .* overflowed",
    ),
    "all labels masked": scenario(
        lambda: [*token_batches(1), {**token_batches(1)[0], "labels": torch.full((3, 5), -100)}],
        error=NonFiniteError,
        message=r"^batch 1: the loss is NaN or infinite; look for .* fully masked example .*labels that are all -100",
    ),
    "infinite loss": scenario(
        objective=lambda model, batch: model(**batch).loss.reshape(1, 1) + float("inf"),
        error=NonFiniteError,
        message="^batch 0: the loss is NaN or infinite",
        offload=True,
    ),
    "objective raises": scenario(objective=lambda model, batch: 1 / 0, error=ZeroDivisionError),
    "objective raises later": scenario(
        functools.partial(marked, 2), lambda model, batch: model(**batch).loss, IndexError, "index out of range"
    ),
    "backward raises": scenario(
        objective=lambda model, batch: broken(model, ArithmeticError("backward")),
        error=ArithmeticError,
        message="backward",
    ),
    "backward is interrupted": scenario(
        objective=lambda model, batch: broken(model, KeyboardInterrupt()),
        error=KeyboardInterrupt,
    ),
    "loader raises": scenario(lambda: failing_at(2, token_batches(), OSError("disk")), error=OSError, message="disk"),
    "loader raises at once": scenario(
        lambda: failing_at(0, token_batches(), OSError("disk")), error=OSError, message="disk"
    ),
    "loader is interrupted": scenario(
        lambda: failing_at(1, token_batches(), KeyboardInterrupt()), error=KeyboardInterrupt
    ),
    "loader exits": scenario(lambda: failing_at(1, token_batches(), SystemExit(3)), error=SystemExit),
}


def checkpointed(model, **options):
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
    return model


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that were made while it is active and are still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.sizes = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Storages that come in from outside are not counted when an op hands them on.
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in known and storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata)
        self.peak = max(self.peak, self.live)
        return result

    def free(self, key):
        self.live -= self.sizes.pop(key)


class Deep(nn.Module):
    def __init__(self, depth, width):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, values):
        for layer in self.layers:
            values = layer(values).tanh()
        return values.sum()
