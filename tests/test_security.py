"""What safekern must not do: run code from files, go to the network unasked, or write down what is private."""

import ast
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from cli_folder import SMALL

from safekern import diagnosis
from safekern.cli import main

PACKAGE = Path(__file__).parent.parent / "safekern"

# Modules that turn files into code, or reach other machines. huggingface_hub is asked for its cache only (models.py).
FORBIDDEN_MODULES = {
    *("cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"),
    *("aiohttp", "ftplib", "http", "httpx", "requests", "smtplib", "socket", "ssl", "telnetlib", "urllib", "xmlrpc"),
}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen", "torch.load", "torch.save", "torch.hub.load", "torch.package.PackageImporter"),
    *("numpy.load", "np.load", "yaml.load", "yaml.unsafe_load"),
    *("huggingface_hub.snapshot_download", "huggingface_hub.hf_hub_download"),
}


def what_is_forbidden(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (name for name in names if name.partition(".")[0] in FORBIDDEN_MODULES)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS:
                yield f"{name}()"
            yield from (
                f"{name}({ast.unparse(keyword)})"
                for keyword in node.keywords
                if keyword.arg in ("shell", "allow_pickle", "trust_remote_code", "weights_only")
                and ast.unparse(keyword.value) not in ("False", "trust_remote_code", "args.trust_remote_code")
            )


def test_no_code_comes_from_files():
    found = {path.name: list(what_is_forbidden(path.read_text())) for path in PACKAGE.rglob("*.py")}
    assert {name: uses for name, uses in found.items() if uses} == {}
    assert len(found) > 50


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from urllib.request import urlopen",
        "torch.load(path)",
        "np.load(path)",
        "subprocess.run(command, shell=True)",
        "model.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_search_finds(source):
    assert len(list(what_is_forbidden(source))) == 1


TOKEN = "hf_" + "NotARealTokenButItLooksLikeOne"


@pytest.fixture(scope="module")
def ran(scored, tmp_path_factory):
    """Every command, with a token in the environment and no network: what was printed, and who tried to connect."""
    private = tmp_path_factory.mktemp("somebodys_home")
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(scored / "base", private / "base")
    for name in ("harmful.jsonl", "benign.jsonl"):
        shutil.copy(scored / name, folder)
        shutil.copy(scored / name, private)
    model, attempts, printed = ["--model", str(private / "base")], [], []

    def refuse(*args, **options):
        attempts.append(args)
        raise OSError("no network in this test")

    def run(*arguments, status=0):
        with pytest.MonkeyPatch.context() as patch:
            lines = []
            patch.setattr("sys.stdout.write", lambda text: lines.append(text))
            patch.setattr("sys.stderr.write", lambda text: lines.append(text))
            try:
                assert main(list(arguments)) == status, lines
            except SystemExit as stop:
                assert stop.code == status, lines
        printed.append("".join(lines))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
            patch.setenv(name, TOKEN)
        for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket.socket, "sendto")):
            patch.setattr(owner, name, refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(
            "safekern.cli.doctor.selftest",
            lambda: diagnosis.SelfTest((diagnosis.Check("sigma", "cpu", "cpu", "passed", 3, ""),)),
        )
        run("score", *model, "--pairs", str(private / "harmful.jsonl"), "--save-scores", "--out", "run", "--json")
        mask = ["--mask", "run/mask.safetensors"]
        steps = ["--iterations", "2"]
        run("set", *model, *mask, *SMALL, *steps, "--out", "run", "--save-model", "--json")
        run("spa", *model, *mask, "--data", str(private / "benign.jsonl"), *steps, "--out", "spa", "--json")
        run("verify", *model, *mask, *SMALL, "--noise", "0.1", "--limit", "2", "--out", "verify.json")
        run("report", "run/mask.safetensors", "--scores", "run/scores.safetensors", "--json")
        run("report", "run/mask.safetensors", "--html", "report.html")
        run("apply", *model, "run/delta.safetensors", "--out", "aligned")
        run("diff", "run/mask.safetensors", "run/mask.safetensors", "--json")
        run("doctor")
        run("doctor", "--json")
        for command in ("demo", "bench"):
            run(command, "--help")
    return folder, private, printed, attempts


def test_no_command_touches_the_network_unasked(ran):
    _, _, printed, attempts = ran
    assert not attempts
    assert len(printed) == 12


def test_nothing_private_is_written_or_printed(ran):
    folder, private, printed, _ = ran
    written = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {"run/mask.safetensors", "run/set.json", "run/delta.safetensors", "spa/spa.json", "verify.json"} <= {
        *written
    }
    assert json.loads(written["run/set.json"])["model"] == "base"
    secrets = [TOKEN, str(private), os.path.expanduser("~") + os.sep]  # noqa: PTH111
    for name, content in written.items():
        assert not [secret for secret in secrets if secret.encode() in content], name
    # What is loaded is named on the screen as it was asked for.
    shown = "".join(printed).replace(f"load {private / 'base'}", "")
    assert TOKEN not in shown
    assert str(private) not in shown
