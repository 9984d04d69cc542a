"""Optimizers that update, or spare, the weights of a mask, and protection around any other."""

from safekern.optim.protect import Protection, protect
from safekern.optim.set_adamw import SETAdamW
from safekern.optim.spa_adamw import SPAAdamW

__all__ = ["Protection", "SETAdamW", "SPAAdamW", "protect"]
