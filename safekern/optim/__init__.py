"""Optimizers that update, or spare, the weights of a mask."""

from safekern.optim.set_adamw import SETAdamW
from safekern.optim.spa_adamw import SPAAdamW

__all__ = ["SETAdamW", "SPAAdamW"]
