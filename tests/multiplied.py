"""Which types of numbers are multiplied."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Multiplied(TorchDispatchMode):
    """Notes the types of numbers that linear layers and attention multiply inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        # An addmm begins with what is added.
        factor = {aten.mm: 0, aten.addmm: 1, aten._scaled_dot_product_flash_attention_for_cpu: 0}
        if func.overloadpacket in factor:
            self.dtypes.add(args[factor[func.overloadpacket]].dtype)
        return func(*args, **(kwargs or {}))
