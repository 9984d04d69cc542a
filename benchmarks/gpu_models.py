"""Scoring, selection, SET, SPA and protection end to end on Llama-shaped models with random bf16 weights.

    python benchmarks/gpu_models.py --sizes 1b 8b --out models.csv

The models are made on the device from a configuration: nothing is downloaded, and what they say means nothing. Seconds
are per batch or step (medians); peak memory is that of the stage, and `above` what it takes beyond the weights. A bare
forward and backward, whose gradients are freed as they come, is what scoring is compared with. A stage that does not
fit the memory is reported as such, and the status is then 1.
"""

import argparse
import csv
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import safekern
from safekern import ops
from safekern.tables import Table

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    # The shapes of Llama 3.2 1B (with a head of its own) and Llama 3.1 8B.
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def main() -> int:
    """Runs the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=["1b", "8b"])
    parser.add_argument("--ratio", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=4, help="batches scored and steps trained (default: 4)")
    parser.add_argument("--tokens", type=int, nargs=2, default=[2, 256], metavar=("ROWS", "LENGTH"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="also write a CSV file")
    args = parser.parse_args()
    rows: list[dict[str, str]] = []
    for size in args.sizes:
        stages = Stages(size, torch.device(args.device))
        stages.run(args.ratio, args.steps, tuple(args.tokens))
        rows += stages.rows
        del stages
        _release(torch.device(args.device))
        if args.out:
            write(args.out, rows)
    print(Table.from_records(rows, ["model", "tokens", "backend", "stage", "seconds", "peak_GB", "above_GB", "note"]))
    return int(any(row["note"].startswith("failed") for row in rows))


@dataclass
class Stages:
    """The stages of one model, and what they took."""

    size: str
    device: torch.device
    rows: list[dict[str, str]] = field(default_factory=list)
    weights: int = 0
    tokens: str = ""

    def run(self, ratio: float, steps: int, tokens: tuple[int, int]) -> None:
        """Runs all stages; those after one that failed, unless they need what it makes."""
        self.tokens = " x ".join(map(str, tokens))
        model = self.stage("build", self.build)
        if model is None:
            return
        self.weights = sum(param.numel() * param.element_size() for param in model.parameters())
        generator = torch.Generator().manual_seed(0)
        ids = [torch.randint(model.config.vocab_size, tokens, generator=generator) for _ in range(steps)]
        batches = [{"input_ids": each.to(self.device), "labels": each.to(self.device)} for each in ids]
        self.stage("forward + backward, warm-up", lambda: bare(model, batches[:1]))
        self.stage("forward + backward", lambda: bare(model, batches), per=steps)
        # Before the scores are there: two sets of accumulators of a large model would not fit.
        self.stage("score, each further batch", lambda: further_batch(model, batches), seconds=lambda each: (each, ""))
        scores = self.stage("score", lambda: safekern.score(model, batches, progress=False), per=steps)
        if scores is None:
            return
        mask = self.stage(f"top {ratio:.1%}", partial(scores.top, ratio))
        del scores
        if mask is None:
            return

        def set_adamw() -> Callable[[], object]:
            return safekern.SETAdamW(model.named_parameters(), mask, lr=1e-4, in_backward=True).step

        def spa_adamw() -> Callable[[], object]:
            return safekern.SPAAdamW(model.named_parameters(), mask, lr=1e-5).step

        def protected() -> Callable[[], object]:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
            safekern.protect(optimizer, mask, model.named_parameters())
            return optimizer.step

        def unprotected() -> Callable[[], object]:
            return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True).step

        for name, make in (
            ("SETAdamW in_backward", set_adamw),
            ("SPAAdamW", spa_adamw),
            ("AdamW fused + protect", protected),
            ("AdamW fused", unprotected),
        ):
            self.stage(name, lambda make=make: train(model, batches, make), seconds=step_seconds)  # type: ignore[misc]
            for param in model.parameters():
                param.grad = None

    def build(self) -> Any:
        """The model, initialised on the device."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(**SIZES[self.size], max_position_embeddings=2048, tie_word_embeddings=False)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with self.device:
                torch.manual_seed(0)
                return LlamaForCausalLM(config).train(False)
        finally:
            torch.set_default_dtype(before)

    def stage(
        self,
        name: str,
        action: Callable[[], Any],
        *,
        per: int = 1,
        seconds: Callable[[Any], tuple[float, str]] | None = None,
    ) -> Any:
        """Runs a stage and notes what it took; returns what it made, or None if it failed."""
        _release(self.device)
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        begin = time.perf_counter()
        made, note = None, ""
        try:
            made = action()
        except Exception as error:
            note = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
        if cuda:
            torch.cuda.synchronize(self.device)
        elapsed = (time.perf_counter() - begin) / per
        if seconds is not None and made is not None:
            elapsed, note = seconds(made)
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else 0
        self.rows.append(
            {
                "model": self.size,
                "tokens": self.tokens,
                "backend": ops.BACKENDS[self.device.type].backend,
                "stage": name,
                "seconds": f"{elapsed:.4f}",
                "peak_GB": f"{peak / 1e9:.2f}" if cuda else "",
                "above_GB": f"{(peak - self.weights) / 1e9:.2f}" if cuda and self.weights else "",
                "note": note,
                "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
                "torch": str(torch.__version__),
                "safekern": safekern.__version__,
                "date": datetime.now(UTC).date().isoformat(),
            }
        )
        print(f"{self.size} {name}: {elapsed:.4f} s {note}", file=sys.stderr, flush=True)
        return made


def bare(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> bool:
    """Forward and backward, each gradient freed as soon as it is there."""

    def free(param: Tensor) -> None:
        param.grad = None

    hooks = [param.register_post_accumulate_grad_hook(free) for param in model.parameters()]
    try:
        for batch in batches:
            model(**batch).loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return True


def further_batch(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Seconds that scoring takes per batch, without what it takes once: sigma, and memory for the accumulators."""
    device = next(model.parameters()).device
    times = []
    for count in (1, 4):
        begin = time.perf_counter()
        safekern.score(model, batches * count, progress=False)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return (times[1] - times[0]) / (3 * len(batches))


def train(
    model: nn.Module, batches: list[dict[str, Tensor]], make: Callable[[], Callable[[], object]]
) -> list[tuple[float, float]]:
    """Seconds of every step's forward and backward, and of its optimizer."""
    step = make()
    device = next(model.parameters()).device
    times = []
    for batch in batches:
        marks = [time.perf_counter()]
        model(**batch).loss.backward()
        for action in (lambda: None, step):
            action()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            marks.append(time.perf_counter())
        for param in model.parameters():
            param.grad = None
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    return times


def step_seconds(times: list[tuple[float, float]]) -> tuple[float, str]:
    """The median optimizer step, leaving out the first, and forward and backward beside it."""
    passes, steps = zip(*(times[1:] or times), strict=True)
    return statistics.median(steps), f"beside {statistics.median(passes):.4f} s of forward and backward"


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes the rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
