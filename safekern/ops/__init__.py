"""The compiled operations, one module each: schema, plain-torch reference, fake.

All of them take lists of tensors, so that one call serves a whole model, and none of them syncs with the host.
"""

from safekern.ops.accumulate import accumulate_
from safekern.ops.gather import gather_
from safekern.ops.registry import load_kernels
from safekern.ops.select import select
from safekern.ops.set_adamw import set_adamw_
from safekern.ops.sigma import sigma

__all__ = ["BACKEND", "accumulate_", "gather_", "select", "set_adamw_", "sigma"]

BACKEND = load_kernels()
