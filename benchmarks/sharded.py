"""What each process takes to score, rank and tune a model that several hold: FSDP2 on Llama-shaped random bf16 weights.

    torchrun --nproc-per-node 2 benchmarks/sharded.py --model-params 3e8            # on the CPU
    torchrun --nproc-per-node 8 benchmarks/sharded.py --model-params 7e10 --device cuda

The model is made layer by layer where it lies in the end; what it says means nothing. Per stage: seconds, and how far
the memory of the process (on a GPU that of its device) rises above where the stage began, in bytes per weight of its
share. The first process prints a table, the mean over processes, and writes it as JSON with --out.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import safekern
from safekern import files
from safekern.bench.measure import environment, peak_memory
from safekern.bench.models import llama, token_batches
from safekern.cli import options
from safekern.sharding import local


def main() -> None:
    """Runs every stage in every process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-params", type=float, default=3e8, help="of the whole model (default: 3e8)")
    parser.add_argument("--ratio", type=float, default=0.01)
    parser.add_argument("--batches", type=int, default=2, help="for scoring (default: 2)")
    parser.add_argument("--tokens", type=int, default=64, help="in each of 2 examples of a batch (default: 64)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args()

    if args.out:
        files.check_writable(args.out)
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    torch.manual_seed(0)
    device = torch.device(args.device, torch.cuda.current_device()) if args.device == "cuda" else torch.device("cpu")
    stages: list[dict[str, Any]] = []
    made: dict[str, Any] = {}

    def stage(name: str, run: Callable[[], Any]) -> None:
        began = time.perf_counter()
        taken = peak_memory(lambda: made.__setitem__(name, run()), args.device)
        seconds = time.perf_counter() - began
        numbers = torch.tensor([seconds, float(taken or 0)], device=device)
        dist.all_reduce(numbers)
        seconds, taken = (numbers / dist.get_world_size()).tolist()
        stages.append({"stage": name, "seconds": round(seconds, 3), "bytes": int(taken)})

    stage("model", lambda: _sharded(args.model_params, device))
    model = made["model"]
    numel = sum(param.numel() for param in model.parameters())
    batches = token_batches(model, args.batches, examples=2, tokens=args.tokens)
    stage("bare", lambda: _bare(model, batches))
    stage("score", lambda: safekern.score(model, batches))
    stage("top", lambda: made["score"].top(args.ratio))
    mask = made["top"]
    made.clear()
    named = list(model.named_parameters())
    stage("SETAdamW", lambda: safekern.SETAdamW(named, mask, lr=1e-4, in_backward=True))
    optimizer = made["SETAdamW"]

    def step() -> None:
        model(**batches[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    stage("SET step", step)
    if dist.get_rank() == 0:
        share = numel / dist.get_world_size()
        print(f"{numel:,} bf16 weights, {dist.get_world_size()} processes on {args.device}, {mask.numel:,} selected")
        for row in stages:
            print(f"  {row['stage']:9} {row['seconds']:8.2f} s {row['bytes'] / share:8.2f} B/weight of the share")
        if args.out:
            settings = {"numel": numel, "processes": dist.get_world_size(), "selected": mask.numel, "ratio": args.ratio}
            settings |= {"batches": args.batches, "tokens": args.tokens}
            options.write_json(args.out, {**environment(args.device), **settings, "stages": stages})
    dist.destroy_process_group()


def _bare(model: Any, batches: Any) -> None:
    """Forward and backward as for scoring, with the sharded gradients freed after each batch."""
    for batch in batches:
        model(**batch).loss.backward()
        model.zero_grad()


def _sharded(params: float, device: torch.device) -> Any:
    model = llama(params, torch.bfloat16, "meta")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    # It has buffers, which are computed where they are made and not on "meta".
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    with torch.no_grad():
        for param in model.parameters():
            held = local(param)
            if param.ndim > 1:
                held.normal_(0, 0.02)
            else:
                held.fill_(1)
    return model


if __name__ == "__main__":
    main()
