"""Optimizers that update, or spare, the weights of a mask."""

from safekern.optim.set_adamw import SETAdamW

__all__ = ["SETAdamW"]
