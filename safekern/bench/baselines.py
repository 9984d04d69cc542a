"""What safekern is compared with, each written as a competent user of PyTorch would, and saying what it is."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from safekern.bench.measure import Run
from safekern.mask import Mask


class DenseMaskAdamW(torch.optim.Optimizer):
    """Masked AdamW as published research code does it, written from its description.

    Dense moments for every weight and a dense float mask that is multiplied into the update. In-place operations
    throughout, which is kinder than the code it stands for.

    Args:
        params: the parameters.
        masks: for each a float tensor of its shape, 1 where it is updated.
        lr: learning rate.
    """

    def __init__(self, params: Iterable[Tensor], masks: Sequence[Tensor], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01})
        self._masks = list(masks)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step."""
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        for param, mask in zip(group["params"], self._masks, strict=True):
            state = self.state[param]
            if not state:
                state |= {"step": 0, "exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
            state["step"] += 1
            mean = state["exp_avg"].lerp_(param.grad, 1 - beta1)
            square = state["exp_avg_sq"].mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
            denom = square.div(1 - beta2 ** state["step"]).sqrt_().add_(group["eps"])
            update = mean.div(1 - beta1 ** state["step"]).div_(denom).add_(param, alpha=group["weight_decay"])
            param.sub_(update.mul_(mask), alpha=group["lr"])


def dense_masks(mask: Mask, params: Mapping[str, Tensor], *, frozen: bool = False) -> list[Tensor]:
    """What `DenseMaskAdamW` needs: 1 where a weight is selected, or where it is not if the mask freezes weights."""
    return [(selected(mask, name, param) ^ frozen).float() for name, param in params.items()]


def selected(mask: Mask, name: str, param: Tensor) -> Tensor:
    """One parameter's selection as a dense bool tensor on its device, also where nothing of it is selected."""
    dense = mask.bool(name) if name in mask else torch.zeros(param.shape, dtype=torch.bool)
    return dense.to(param.device)


class CopyBack:
    """Freezes weights around an optimizer in plain PyTorch: after its step, their saved values are copied back."""

    def __init__(self, optimizer: torch.optim.Optimizer, frozen: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._optimizer = optimizer
        self._frozen = [(param.detach().view(-1), index, param.detach().view(-1)[index]) for param, index in frozen]

    def step(self) -> None:
        """One step of the optimizer, and the values back."""
        self._optimizer.step()
        for flat, index, values in self._frozen:
            flat.index_copy_(0, index, values)


def topk(grads: Sequence[Tensor], sigma: Tensor, k: int) -> Tensor:
    """The exact global top k with ``torch.topk``, over the scores of all tensors in one vector."""
    scores = torch.cat([(grad.abs() * s).view(-1) for grad, s in zip(grads, sigma, strict=True)])
    return torch.topk(scores, k, sorted=False).indices


def sampled_threshold(grads: Sequence[Tensor], sigma: Tensor, k: int) -> list[Tensor]:
    """An approximate global top k as published research code does it: a threshold from every hundredth score.

    Then ``where`` per tensor, and ``topk`` over what passed on the host. Where the sample's threshold is too high,
    fewer than k are selected.
    """
    scores = [(grad.abs() * s).view(-1) for grad, s in zip(grads, sigma, strict=True)]
    sample = torch.cat([score[::100] for score in scores])
    rank = max(1, min(sample.numel(), k // 100))
    threshold = torch.topk(sample, rank, sorted=False).values.min()
    passed = [torch.where(score >= threshold)[0] for score in scores]
    values = torch.cat([score[index] for score, index in zip(scores, passed, strict=True)]).cpu()
    best = torch.topk(values, min(k, values.numel()), sorted=False).indices.sort().values
    ends = torch.tensor([index.numel() for index in passed]).cumsum(0)
    cuts = torch.searchsorted(best, ends).tolist()
    starts = [0, *ends.tolist()]
    parts = best.tensor_split(cuts[:-1])
    return [index.cpu()[part - start] for index, part, start in zip(passed, parts, starts, strict=False)]


def compiled(step: Run) -> Run:
    """``torch.compile`` of an optimizer's step, the way PyTorch documents it."""
    return torch.compile(lambda: step())


@cache
def why_not_compile() -> str | None:
    """Why ``torch.compile`` cannot be a baseline here; None where it works."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "no C++ compiler"
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(3))
    except Exception as error:
        return f"torch.compile failed: {type(error).__name__}"
    return None
