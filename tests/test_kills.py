"""kill -9 at any moment: every file is the old one or the new one, and a run goes on to the same bits.

One process, this file run as a program, imports torch and makes what is needed; it forks a child for each kill. The
child kills itself after so many calls that safekern's code makes to code of others, or is killed from outside.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fork and SIGKILL as Linux has them")

SEED = 0


@pytest.fixture(scope="module")
def report(tmp_path_factory, request):
    """What each scenario found: how many kills there were, how many of them hit, and what was wrong."""
    root = Path(__file__).parent.parent
    folder = tmp_path_factory.mktemp("kills")
    kills = "60" if request.config.getoption("--full") else "8"
    paths = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder), kills]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert ran.returncode == 0, ran.stderr[-5000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("scenario", ["mask", "scores", "delta", "while writing", "apply", "set"])
def test_killed(report, scenario):
    found = report[scenario]
    assert found["problems"] == []
    assert found["tries"] >= 4
    # Whether a time hits is the machine's affair; a call is met.
    if scenario != "while writing":
        assert found["killed"] == found["tries"]
    if scenario in ("mask", "scores", "delta", "apply"):
        assert found["old"] and found["new"]


class Scenario:
    def __init__(self) -> None:
        self.tries = self.killed = self.old = self.new = 0
        self.problems: list[str] = []


def forked(run: Callable[[], object]) -> int:
    """Runs a function in a child and returns its wait status."""
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1]


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def died(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def leftovers_are_removed(folder: Path, scenario: Scenario, write: Callable[[], object]) -> None:
    """The next write removes what the killed one left, once it is not new."""
    for left in folder.glob(".safekern-*.tmp"):
        os.utime(left, (0, 0))
    write()
    scenario.problems += [f"left {left.name}" for left in folder.glob(".safekern-*.tmp")]


def saving(folder: Path, save: Callable[[bool, Path], None], load: Callable[[Path], object], kills: int) -> Scenario:
    """``save(new, path)`` over an old file, killed at calls that are spread over it."""
    from stops import calls, spread

    from safekern import SafekernError

    path, found = folder / "file", Scenario()
    save(True, path)
    new = path.read_bytes()
    save(False, path)
    old = path.read_bytes()
    total = calls(lambda: save(True, path))
    for place in sorted({*spread(total, kills), total - 1, total - 2, total - 3}):
        save(False, path)
        found.tries += 1
        found.killed += died(forked(lambda place=place: calls(lambda: save(True, path), place, kill_self)))
        content = path.read_bytes()
        found.old += content == old
        found.new += content == new
        if content not in (old, new):
            found.problems.append(f"a part of a file after call {place}")
        try:
            load(path)
        except SafekernError as error:
            found.problems.append(f"after call {place}: {error}")
        leftovers_are_removed(folder, found, lambda: save(False, path))
    return found


def while_writing(folder: Path, kills: int) -> Scenario:
    """A large file, killed from outside after a random time."""
    import torch

    from safekern import files

    path, found = folder / "file", Scenario()
    tensors = {name: torch.full((1 << 22,), value) for name, value in (("old", 1.0), ("new", 2.0))}

    def save(name: str) -> None:
        files.write(path, "example", 1, {"x": tensors[name]}, {"name": name})

    save("old")
    start = time.monotonic()
    save("new")
    takes = time.monotonic() - start
    chance = random.Random(SEED)
    for _ in range(kills):
        save("old")
        child = os.fork()
        if child == 0:
            save("new")
            os._exit(0)
        time.sleep(chance.uniform(0, 1.3 * takes))
        os.kill(child, signal.SIGKILL)
        found.tries += 1
        found.killed += died(os.waitpid(child, 0)[1])
        read, meta = files.read(path, "example", 1)
        found.old += meta["name"] == "old"
        found.new += meta["name"] == "new"
        if not torch.equal(read["x"], tensors[meta["name"]]):
            found.problems.append("another content than its name says")
        leftovers_are_removed(folder, found, lambda: save("old"))
    return found


def applying(folder: Path, kills: int) -> Scenario:
    from language_models import tiny_llama
    from stops import calls, spread
    from tuned_models import contents, llama_mask, tuned

    from safekern import apply_delta, save_delta

    base = tiny_llama().bfloat16()
    mask = llama_mask(base)
    model = tuned(base, mask)
    original, target, delta = folder / "original", folder / "target", folder / "delta"
    base.save_pretrained(original, max_shard_size="20KB")
    model.save_pretrained(folder / "tuned", max_shard_size="20KB")
    old, new = contents(original), contents(folder / "tuned")
    save_delta(model, mask, delta, base=original)
    found = Scenario()

    def run() -> None:
        apply_delta(target, delta)

    shutil.copytree(original, target)
    total = calls(run)
    for place in sorted({*spread(total, kills // 2), *(total - 1 - late for late in spread(120, kills))}):
        shutil.rmtree(target)
        shutil.copytree(original, target)
        found.tries += 1
        found.killed += died(forked(lambda place=place: calls(run, place, kill_self)))
        now = {name: content for name, content in contents(target).items() if not name.startswith(".safekern-")}
        found.old += now == old
        found.new += now == new
        if now.keys() != old.keys() or not all(content in (old[name], new[name]) for name, content in now.items()):
            found.problems.append(f"a part of a file after call {place}")
        for left in target.glob(".safekern-*.tmp"):
            os.utime(left, (0, 0))
        if now != new:
            run()
            if contents(target) != new:
                found.problems.append(f"a second run after call {place} did not finish it")
    return found


def training(folder: Path, kills: int) -> Scenario:
    from cli_folder import BENIGN, PAIRS, write_rows
    from language_models import byte_tokenizer, tiny_llama
    from stops import calls
    from tuned_models import llama_mask

    from safekern.cli import main

    os.chdir(folder)
    model = tiny_llama().bfloat16()
    model.save_pretrained("base")
    byte_tokenizer().save_pretrained("base")
    llama_mask(model).save("mask")
    write_rows(folder / "harmful.jsonl", PAIRS)
    write_rows(folder / "benign.jsonl", BENIGN)
    found = Scenario()

    def tune(out: str) -> None:
        data = ["--harmful", "harmful.jsonl", "--benign", "benign.jsonl", "--model", "base", "--mask", "mask"]
        size = ["--iterations", "5", "--checkpoint-every", "1", "--lr", "1e-2", "--batch-size", "2"]
        resume = ["--resume"] if Path(out, "training.safetensors").exists() else []
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            status = main(["set", *data, *size, "--out", out, *resume])
        if status:
            raise AssertionError(said.getvalue())

    def result(out: str) -> tuple[bytes, list[float]]:
        report = json.loads(Path(out, "set.json").read_text())
        return Path(out, "delta.safetensors").read_bytes(), report["losses"]

    counted = folder / "counted"
    # In a child, because a process that ran backward is not forked from.
    assert forked(lambda: counted.write_text(str(calls(lambda: tune("whole"))))) == 0
    total, want = int(counted.read_text()), result("whole")
    chance = random.Random(SEED)
    places = sorted(chance.sample(range(total // 3, total), kills))
    resumed = 0
    for place in places:
        shutil.rmtree("parts", ignore_errors=True)
        found.tries += 1
        found.killed += died(forked(lambda place=place: calls(lambda: tune("parts"), place, kill_self)))
        resumed += Path("parts", "training.safetensors").exists()
        if forked(lambda: tune("parts")) or result("parts") != want:
            found.problems.append(f"another result after call {place} of {total}")
    if not resumed:
        found.problems.append("no kill left a checkpoint to resume from")
    return found


def program(folder: Path, kills: int) -> None:
    import torch
    from file_kinds import base_model, mask_of_base, scores, tuned_model

    from safekern import Mask, Scores, save_delta

    torch.set_num_threads(1)

    def save_mask(new: bool, path: Path) -> None:
        (mask_of_base() if new else Mask.from_indices({"w": [1]}, {"w": (3, 4)})).save(path)

    def save_scores(new: bool, path: Path) -> None:
        made = scores()
        made.num_batches += new
        made.save(path)

    def save_a_delta(new: bool, path: Path) -> None:
        save_delta(tuned_model(), mask_of_base(), path, base=base_model() if new else None)

    report = {}
    for name, run in {
        "mask": lambda place: saving(place, save_mask, Mask.load, kills),
        "scores": lambda place: saving(place, save_scores, Scores.load, kills),
        "delta": lambda place: saving(place, save_a_delta, lambda path: None, kills),
        "while writing": lambda place: while_writing(place, kills),
        "apply": lambda place: applying(place, kills),
        "set": lambda place: training(place, kills),
    }.items():
        place = folder / name.replace(" ", "_")
        place.mkdir()
        start = time.monotonic()
        report[name] = {**vars(run(place)), "seconds": round(time.monotonic() - start, 1)}
    print(json.dumps(report))


if __name__ == "__main__":
    program(Path(sys.argv[1]), int(sys.argv[2]))
