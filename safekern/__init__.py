"""safekern: find and edit the safety-critical 1% of a language model's weights.

>>> scores = safekern.score(model, loader, safekern.objectives.refusal)     # doctest: +SKIP
>>> mask = scores.top(0.01)                                                 # doctest: +SKIP
>>> opt = safekern.SETAdamW(model.named_parameters(), mask, lr=1e-4)        # doctest: +SKIP
"""

from safekern import integrations, models, objectives, prompts, training
from safekern._version import __version__
from safekern.delta import apply_delta, save_delta
from safekern.diagnosis import selftest
from safekern.errors import (
    BackendError,
    BenchmarkError,
    DeltaAppliedError,
    DeltaDtypeError,
    DeltaMismatchError,
    DeltaNamesError,
    FileAccessError,
    FileFormatError,
    InvalidArgumentError,
    JudgeError,
    MaskMismatchError,
    MissingDependencyError,
    ModelInUseError,
    NonFiniteError,
    OutOfMemoryError,
    ProtectionError,
    SafekernError,
    ScoringError,
    StepError,
    UnknownNameError,
)
from safekern.evaluation import attack_success_rate, refusal_rate
from safekern.integrations import merge_lora
from safekern.mask import Mask
from safekern.optim import SETAdamW, SPAAdamW, protect
from safekern.perturbation import perturb
from safekern.scores import Scores
from safekern.scoring import score
from safekern.verification import verify

__all__ = [
    "BackendError",
    "BenchmarkError",
    "DeltaAppliedError",
    "DeltaDtypeError",
    "DeltaMismatchError",
    "DeltaNamesError",
    "FileAccessError",
    "FileFormatError",
    "InvalidArgumentError",
    "JudgeError",
    "Mask",
    "MaskMismatchError",
    "MissingDependencyError",
    "ModelInUseError",
    "NonFiniteError",
    "OutOfMemoryError",
    "ProtectionError",
    "SETAdamW",
    "SPAAdamW",
    "SafekernError",
    "Scores",
    "ScoringError",
    "StepError",
    "UnknownNameError",
    "__version__",
    "apply_delta",
    "attack_success_rate",
    "integrations",
    "merge_lora",
    "models",
    "objectives",
    "perturb",
    "prompts",
    "protect",
    "refusal_rate",
    "save_delta",
    "score",
    "selftest",
    "training",
    "verify",
]
