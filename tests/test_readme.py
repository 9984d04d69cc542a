"""The README's Python examples, on a tiny model. Those of trainers and of several processes are only parsed."""

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from language_models import byte_tokenizer, tiny_llama

import safekern

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
# A line of each example that runs here, in the README's order: later ones use what earlier ones made.
RUN = ["from_pretrained(path", "GuardJudge(", "bitsandbytes", "conflict", "memory=6e9", 'sigma_per="expert"']


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the examples take as given."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny_llama(), byte_tokenizer()
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    prompts = [f"Do harm number {i}" for i in range(128)]
    refusals = [f"I won't do harm {i}." for i in range(128)]
    rows = [{"prompt": p, "response": r} for p, r in zip(prompts[:8], refusals[:8], strict=True)]
    Path("refusals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums = [{"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}."} for n in range(8)]
    Path("math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    return {
        "path": "model",
        "prompts": prompts,
        "refusals": refusals,
        "held_out_prompts": ["Do harm"],
        "benign_prompts": ["Bake bread"],
        "guard": model,
        "guard_tokenizer": tokenizer,
        "objective": safekern.objectives.refusal,
        "bitsandbytes": SimpleNamespace(optim=SimpleNamespace(AdamW8bit=torch.optim.AdamW)),
    }


def test_examples_run(names):
    for line in RUN:
        (example,) = [example for example in EXAMPLES if line in example]
        exec(compile(example, f"README.md, the example with {line}", "exec"), names)
    assert safekern.Mask.load("mask.safetensors").numel == names["mask"].numel == names["scores"].top(0.01).numel


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_name_what_there_is(example):
    for node in ast.walk(ast.parse(example)):
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("safekern."):
            value = safekern
            for name in ast.unparse(node).split(".")[1:]:
                if not name.isidentifier():
                    break
                value = getattr(value, name)
