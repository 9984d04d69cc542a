"""Every error safekern raises, so that one ``except safekern.SafekernError`` catches them all.

Each message says what was wrong, names the parameter or file, and says what to do. Where Python has a habitual
class for the mistake (``ValueError`` for a bad argument, ``KeyError`` for an unknown name), the error is one of
those too.
"""

import torch


class SafekernError(Exception):
    """Base class of every error raised by safekern."""


class InvalidArgumentError(SafekernError, ValueError):
    """An argument that can never work: a ratio outside (0, 1], an empty loader, a parameter without a name."""


class UnknownNameError(SafekernError, KeyError):
    """A parameter name that the scores or the mask do not hold."""

    # KeyError prints the repr of its argument, which would show the message in quotes with escapes.
    __str__ = Exception.__str__


class MaskMismatchError(SafekernError, ValueError):
    """A mask that does not fit the model or the parameters it is used with."""


class DeltaMismatchError(SafekernError, ValueError):
    """A delta that does not fit the model or checkpoint; nothing was changed."""


class DeltaAppliedError(DeltaMismatchError):
    """A delta that was applied before; nothing was changed."""


class DeltaDtypeError(DeltaMismatchError):
    """A delta of parameters in other dtypes than the model's or checkpoint's; nothing was changed."""


class DeltaNamesError(DeltaMismatchError):
    """A delta with parameters that the model holds under no names like theirs; nothing was changed."""


class ScoringError(SafekernError, RuntimeError):
    """The objective or the model did something that cannot be scored, here or in another process."""


class OutOfMemoryError(SafekernError, torch.OutOfMemoryError):
    """Memory ran out; the message says what takes how much of it and what to lower."""


class ModelInUseError(SafekernError, RuntimeError):
    """A model that another thread is scoring or perturbing; nothing was changed."""


class NonFiniteError(ScoringError):
    """A NaN or an infinity in a weight, a gradient or a score."""


class StepError(SafekernError, RuntimeError):
    """An optimizer step that cannot be taken; no weight and no state was changed."""


class ProtectionError(SafekernError, RuntimeError):
    """Protected weights are not what they were, or can no longer be watched."""


class JudgeError(SafekernError, RuntimeError):
    """A judge raised or did not answer True or False: its response counts neither as safe nor as unsafe."""


class FileFormatError(SafekernError, ValueError):
    """A file that is damaged, truncated, of another kind or of a newer version."""


class FileAccessError(SafekernError, OSError):
    """A path that cannot be read or written."""


class MissingDependencyError(SafekernError, ImportError):
    """An optional package that the requested feature needs is not installed."""


class BackendError(SafekernError, RuntimeError):
    """A kernel backend that was asked for is not available here."""


class BenchmarkError(SafekernError, RuntimeError):
    """A result that is wrong where its speed was to be measured, or a benchmark that could not run."""
