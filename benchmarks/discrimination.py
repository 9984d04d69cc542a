"""Does the ranking matter? SET on the ESI top 1%, a random 1% and the bottom 1% of SmolLM2, at a low learning rate.

Each mask gets the same 30 steps (lr 3e-5) on the same batches of 4 refusal pairs, from the same starting weights. What
differs is how fast the model learns to refuse held-out harmful prompts:

    python benchmarks/discrimination.py                        # the package's own prompts, about 10 minutes on 2 cores
    python benchmarks/discrimination.py --pairs circuit_breakers_train.json --goals advbench520.json

`--pairs` takes a JSON list of {"instruction", "output"} with refusals as outputs, `--goals` one of {"goal"} whose last
100 entries are held out (and left out of the pairs). The result is printed as a table and written as JSON.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import safekern
from safekern.chat import Prompt
from safekern.evaluation import attack_success_rate, is_refusal, mean_nll
from safekern.models import load_smollm2
from safekern.objectives import refusal
from safekern.prompts import Pairs, builtin, load, load_prompts
from safekern.training import in_order, shuffled, tune

RATIO, LEARNING_RATE, BATCH_SIZE = 0.01, 3e-5, 4
SCORED = 128
EARLY, LATE = 10, 30


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, help="JSON list of {instruction, output}; default: the package's own")
    parser.add_argument("--goals", type=Path, help="JSON list of {goal}; default: the package's own held-out prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "discrimination.json")
    args = parser.parse_args()

    held_out = builtin("harmful", "eval")
    # For evaluation only.
    goals = load_prompts(args.goals)[-100:] if args.goals else held_out.prompts
    pairs = read_pairs(args.pairs, goals) if args.pairs else builtin("harmful", "tune")
    model, tokenizer = load_smollm2()
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    scores = safekern.score(model, in_order(tokenizer, pairs[:SCORED], BATCH_SIZE), refusal)
    masks = {
        "ESI top": scores.top(RATIO),
        "random": scores.random(RATIO, seed=args.seed),
        "ESI bottom": scores.bottom(RATIO),
    }
    results: dict[str, dict[str, float]] = {
        "untouched": {"asr": attack_success_rate(model, tokenizer, goals, batch_size=32).rate}
    }
    for label, mask in tqdm(masks.items(), "masks", disable=None):
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(start[name])
        began = time.perf_counter()
        optimizer = safekern.SETAdamW(model.named_parameters(), mask, lr=LEARNING_RATE)
        batches = shuffled(tokenizer, pairs, BATCH_SIZE, args.seed)
        tune(model, optimizer, [(1.0, batches)], EARLY)
        nll = mean_nll(model, tokenizer, held_out.prompts, held_out.responses)
        tune(model, optimizer, [(1.0, batches)], LATE - EARLY)
        attacks = attack_success_rate(model, tokenizer, goals, batch_size=32)
        results[label] = {
            "refusal_nll_early": nll,
            "asr": attacks.rate,
            "degenerate": attacks.degenerate / len(goals),
            "seconds": round(time.perf_counter() - began, 1),
        }
        print(f"{label:12} {results[label]}", flush=True)

    print(f"\n{'mask':12} {f'refusal NLL, {EARLY} steps':>22} {f'attack success, {LATE} steps':>26}")
    for label, row in results.items():
        nll_text = f"{row['refusal_nll_early']:.2f}" if "refusal_nll_early" in row else "-"
        print(f"{label:12} {nll_text:>22} {row['asr']:>26.0%}")
    write(args.out, {"results": results, "goals": len(goals), "pairs": len(pairs), "seed": args.seed})


def read_pairs(path: Path, held_out: Sequence[Prompt]) -> Pairs:
    """The pairs that are refused (a few of the data set are benign) and not held out."""
    pairs = load(path)
    rows = zip(pairs.prompts, pairs.responses, pairs.categories, strict=True)
    kept = [row for row in rows if is_refusal(row[1]) and row[0] not in held_out]
    return Pairs([row[0] for row in kept], [row[1] for row in kept], [row[2] for row in kept])


def write(path: Path, results: dict[str, Any]) -> None:
    """Adds where and when the results were measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    results |= {
        "ratio": RATIO,
        "lr": LEARNING_RATE,
        "batch_size": BATCH_SIZE,
        "iterations": [EARLY, LATE],
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
        "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"safekern": safekern.__version__, "torch": str(torch.__version__)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
