"""The memory of ``safekern score`` on a model from disk, scaled down from the 8B of its help text."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_folder import PAIRS, write_rows
from language_models import byte_tokenizer, tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

MB = 1 << 20

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process on Linux")


def peak(command: list[str], folder: Path) -> int:
    """The most memory that a process had at any time, the weights that it mapped from a file among it."""
    reused = {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    with (
        Path(folder, "log").open("wb") as log,
        subprocess.Popen(command, cwd=folder, env={**os.environ, **reused}, stderr=log, stdout=log) as process,
    ):
        most = 0
        while process.poll() is None:
            # The kernel's own maximum: a busy machine may not look in time.
            status = Path(f"/proc/{process.pid}/status").read_text()
            most = max(
                [most, *(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))]
            )
            time.sleep(0.002)
    assert process.returncode == 0, Path(folder, "log").read_text()
    return most


def test_scoring_takes_the_model_its_accumulators_and_one_gradient(tmp_path):
    # Two batches: the second one's gradients come where accumulators are.
    write_rows(tmp_path / "harmful.jsonl", PAIRS[:2])
    byte_tokenizer().save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "large")
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "small")
    config = LlamaConfig(
        vocab_size=300, hidden_size=512, intermediate_size=2048, num_hidden_layers=24, num_attention_heads=8
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "large")
    weights = model.num_parameters() * 2
    gradient = 512 * 2048 * 2
    del model

    def run(name: str) -> int:
        arguments = ["--model", name, "--pairs", "harmful.jsonl", "--batch-size", "1", "--out", f"{name}-run"]
        return peak([sys.executable, "-m", "safekern", "score", *arguments], tmp_path)

    taken = run("large") - run("small")
    stated = weights + 2 * weights + gradient
    print(f"{taken / MB:.0f} MiB above a tiny model; model, accumulators and a gradient are {stated / MB:.0f} MiB")
    # What is left are activations and the allocator. All gradients at once would be as much as the model. Where another
    # process left 1 GB of the machine, 60 MiB less were seen, and beside several 110: a system short of memory drops
    # pages of the model, which is mapped from its file. The accumulators it cannot drop.
    assert weights * 1.9 < taken < stated + 0.4 * weights
