"""The experiments of benchmarks/replication, on a tiny model: they run, resume, hold out, and report."""

import contextlib
import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from language_models import byte_tokenizer, tiny_llama
from multiplied import Multiplied

import safekern
from safekern.eligibility import eligible_parameters
from safekern.prompts import Pairs

# Last, so that an installed safekern is the one that is tested.
sys.path.append(str(Path(__file__).parent.parent))

from benchmarks.replication import judge, lab, masks, precision, protection, report, spa, tuning
from benchmarks.replication import set as set_experiment
from benchmarks.replication.__main__ import main
from benchmarks.replication.lab import Data, LeakError, label
from benchmarks.replication.runs import OtherSettingsError

SMALL = ["--held-out", "3", "--seeds", "0"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def replicate(tiny, tmp_path, monkeypatch):
    # Its answers go on for as long as they may, and what they are does not matter.
    for name in ("attack_success_rate", "refusal_rate"):
        monkeypatch.setattr(lab, name, partial(getattr(lab, name), max_new_tokens=8))
    # Fewer than the built-in ones, to be scored in less time.
    refusals = [{"prompt": f"Do harm number {i}", "response": f"I can't help with harm {i}."} for i in range(20)]
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps(refusals))

    def run(*arguments, steps=(1, 2), out="out"):
        folders = [
            "--pairs",
            str(pairs),
            "--out",
            str(tmp_path / out),
            "--cache",
            str(tmp_path / "cache"),
            "--model",
            str(tiny),
        ]
        main([*arguments, *SMALL, "--steps", *map(str, steps), *folders])
        return tmp_path / out / label(str(tiny))

    return run


def test_two_models_in_folders_of_one_name_are_two(tmp_path):
    folders = [tmp_path / name / "model" for name in "abc"]
    for folder, content in zip(folders, ("1", "2", "1"), strict=True):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(content)
    first, other, same = (label(str(folder)) for folder in folders)
    assert first.startswith("model-")
    assert first == same != other
    assert label("org/model") == "org--model"
    assert label(str(folders[0] / "model.safetensors")) != label(str(folders[1] / "model.safetensors"))


@pytest.mark.parametrize("training", [True, False])
def test_bf16_products_are_those_of_autocast_where_a_processor_has_none(monkeypatch, training):
    model = tiny_llama()

    def outcome(*contexts):
        multiplied = Multiplied()
        with contextlib.ExitStack() as stack:
            for context in (torch.set_grad_enabled(training), *contexts, multiplied):
                stack.enter_context(context)
            logits = model(torch.arange(60).view(3, 20), use_cache=False).logits
        if training:
            logits.float().square().mean().backward()
        grads = [param.grad for param in model.parameters() if param.grad is not None]
        assert len(grads) == training * len(list(model.parameters()))
        model.zero_grad()
        return [logits.detach().float(), *grads], multiplied.dtypes, logits.dtype

    cpu = torch.device("cpu")
    exact, *_ = outcome()
    monkeypatch.setattr(precision, "multiplies_slowly", lambda dtype: False)
    native, *of_native = outcome(precision.bf16_products(cpu), precision.bf16_products(cpu))
    monkeypatch.setattr(precision, "multiplies_slowly", lambda dtype: True)
    emulated, *of_emulated = outcome(precision.bf16_products(cpu), precision.bf16_products(cpu))
    assert of_native == [{torch.bfloat16}, torch.bfloat16]
    assert of_emulated == [{torch.float32}, torch.bfloat16]
    for one, other, true in zip(native, emulated, exact, strict=True):
        # Rounded as often, so as far off.
        assert 0.5 < (other - true).norm() / (one - true).norm() < 2


def test_one_bf16_product_without_instructions_is_rounded_once(monkeypatch):
    monkeypatch.setattr(precision, "multiplies_slowly", lambda dtype: True)
    layer = torch.nn.Linear(37, 5, bias=False)
    values = torch.randn(3, 37)
    exact = values.bfloat16().double() @ layer.weight.bfloat16().double().T
    with precision.bf16_products(torch.device("cpu")):
        found = layer(values)
        # A second pass in one context has the weights that are cast already.
        with torch.no_grad():
            assert torch.equal(layer(values), found) and torch.equal(layer(values), found)
    # fp32 sums of 37 exact products are off by less than a thousandth of what rounding to bf16 takes.
    assert ((found.double() - exact).abs() <= 2**-8 * 1.001 * exact.abs() + 1e-6).all()
    found.sum().backward()
    assert torch.equal(layer.weight.grad, layer.weight.grad.bfloat16().float())


def results(folder, experiment):
    return {path.stem: json.loads(path.read_text()) for path in (folder / experiment).glob("*.json")}


def stop_at(monkeypatch, run, step):
    """Ends the command as Ctrl-C would, in that run after that step."""
    tune, started = tuning.tune, []

    def interrupted(*args, after_step, **options):
        started.append(run)

        def after(losses):
            after_step(losses)
            if len(started) == run and len(losses) == step:
                raise KeyboardInterrupt

        return tune(*args, after_step=after, **options)

    monkeypatch.setattr(tuning, "tune", interrupted)


def test_every_experiment_runs_and_is_reported(replicate, monkeypatch, capsys):
    for method in protection.REFRESHED:
        monkeypatch.setitem(protection.REFRESHED, method, 1)
    # Of 20 pairs.
    monkeypatch.setattr(masks, "SIZES", (8, 16))
    gsm8k = [{"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}."} for i in range(40)]
    folder = None
    for experiment, only in {
        "set": "balanced",
        "ratio": "esi-0.1",
        "weight": "balanced-4-0.25",
        "prompts": "",
        "where": "base-0.001",
        "perturb": "top-but-utility-1-",
        "spa": "set-gsm8k-lr2e-05",
        "judge": "16",
    }.items():
        more = ["--precision", "fp32"]
        if experiment == "spa":
            path = folder.parent / "gsm8k.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in gsm8k))
            # GSM8K may come later.
            replicate("spa", "--only", "aligned-set", *more)
            more += ["--gsm8k", str(path)]
            replicate("spa", "--only", "aligned-set", *more)
        folder = replicate(experiment, "--only", only, *more)
        found = results(folder, experiment)
        assert found and all(run["finished"] and run["rows"] for run in found.values())
        assert (folder / f"{experiment}.md").read_text().count("|") > 10
        assert (folder / f"{experiment}.csv").read_text().count("\n") > len(found)
        assert (folder / f"{experiment}.png").stat().st_size > 1000

    capsys.readouterr()
    replicate("set", "--only", "untouched", "--precision", "fp32")
    assert re.findall(r"(\w+)\.md", capsys.readouterr().out) == ["set", "ratio", "judge"]

    readme = folder / "README.md"
    mark = "<!-- replication: set, balanced, lr 3e-05 -->"
    readme.write_text(f"before\n{mark}\nold\n<!-- end of replication -->\nafter\n")
    replicate("table", "--readme", str(readme))
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "| esi | 1 |" in text and "old" not in text

    tuned = results(folder, "set")
    last = {run["settings"]["method"]: run["rows"][-1] for run in tuned.values() if run["settings"]["lr"] == 1e-4}
    assert set(last) == {"esi", "random", "full", "bottom", "gradient", "per-tensor", "magnitude"}
    assert all(row["step"] == 2 for row in last.values())
    # All weights learn faster than 1% of them, and those of the largest ESI faster than those of the smallest. Of these
    # two bf16 could not tell: after two steps they are 0.0002 nats apart, and its roundings 0.002.
    nll = {method: row["refusal_nll"][0] for method, row in last.items()}
    assert nll["full"] < nll["esi"] < nll["bottom"]
    for row in last.values():
        for key, answers, letter in (
            ("attack_success", "harmful_answers", "a"),
            ("benign_refusals", "benign_answers", "r"),
        ):
            letters = row[answers]
            assert set(letters) <= set("arb")
            assert row[key][0] == pytest.approx(letters.count(letter) / len(letters), abs=1e-4)
        assert row["broken_harmful"] == row["harmful_answers"].count("b")
    protections = {run["settings"].get("method") for run in results(folder, "spa").values()}
    assert protections >= {"nothing", "esi", "random", "project", "conflict", "replay", "signed", "not-task"}
    assert protections >= {*protection.REFRESHED, *spa.REHEARSED}
    # Tensors in which nothing is selected count, too.
    (where,) = results(folder, "where").values()
    numel = sum(param.numel() for param in eligible_parameters(tiny_llama(), None).values())
    assert any(row["selected"] == 0 for row in where["rows"])
    assert sum(row["numel"] for row in where["rows"] if row["by"] == "component") == numel
    (prompts,) = results(folder, "prompts").values()
    assert [row["prompts"] for row in prompts["rows"]] == [8, 16] and prompts["rows"][-1]["with_all"] == 1


def test_finished_runs_are_not_repeated(replicate, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, run=2, step=1)
        replicate("set", "--only", "lr0.0001")
    folder = replicate("table")
    before = {path: path.read_bytes() for path in (folder / "set").glob("*.json")}
    assert sorted(run["finished"] for run in results(folder, "set").values()) == [False, True]

    replicate("set", "--only", "lr0.0001")
    after = results(folder, "set")
    assert len(after) == 7 and all(run["finished"] for run in after.values())
    # The one that was interrupted began anew.
    assert not any("attempts" in run for run in after.values())
    kept = [path for path, content in before.items() if path.read_bytes() == content]
    assert len(kept) == 1 and after[kept[0].stem]["finished"]
    with pytest.raises(OtherSettingsError, match="steps was"):
        replicate("set", "--only", "lr0.0001", steps=(1, 3))


def test_a_long_run_goes_on_with_the_same_bits(replicate, monkeypatch):
    monkeypatch.setattr(tuning, "_SAVED_EVERY_SECONDS", 0.0)
    one = ["set", "--only", "full-1-lr0.0001"]
    whole = results(replicate(*one, steps=(1, 2, 4), out="whole"), "set")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, run=1, step=3)
        replicate(*one, steps=(1, 2, 4))
    steps = []
    with monkeypatch.context() as patch:
        tune = tuning.tune
        patch.setattr(
            tuning, "tune", lambda *args, done, **more: steps.append(len(done)) or tune(*args, done=done, **more)
        )
        parts = results(replicate(*one, steps=(1, 2, 4)), "set")
    assert steps == [3]
    assert [run["rows"] for run in parts.values()] == [run["rows"] for run in whole.values()]
    assert [len(run["attempts"]) for run in parts.values()] == [1]


def test_a_training_belongs_to_its_results(replicate, monkeypatch):
    monkeypatch.setattr(tuning, "_SAVED_EVERY_SECONDS", 0.0)
    one = ["set", "--only", "full-1-lr0.0001"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, run=1, step=3)
        replicate(*one, steps=(1, 2, 4))
    (elsewhere,) = results(replicate(*one, steps=(1, 2, 4), out="elsewhere"), "set").values()
    assert [row["step"] for row in elsewhere["rows"]] == [1, 2, 4]
    (interrupted,) = (replicate("table") / "set").glob("*.json")
    interrupted.unlink()
    (anew,) = results(replicate(*one, steps=(1, 2, 4)), "set").values()
    assert anew["rows"] == elsewhere["rows"]


def test_a_mask_that_is_ranked_anew_is_the_same_after_an_interruption(replicate, monkeypatch):
    monkeypatch.setattr(tuning, "_SAVED_EVERY_SECONDS", 0.0)
    monkeypatch.setitem(protection.REFRESHED, "refresh-10", 2)
    one = ["spa", "--only", "^set-chat-lr2e-05-refresh-10-0.05"]
    whole = results(replicate(*one, steps=(2, 3, 4), out="whole"), "spa")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, run=1, step=3)
        replicate(*one, steps=(2, 3, 4))
    parts = results(replicate(*one, steps=(2, 3, 4)), "spa")
    assert [run["rows"] for run in parts.values()] == [run["rows"] for run in whole.values()]


def test_a_run_that_fails_does_not_stop_the_others(replicate, monkeypatch, capsys):
    def fails(lab, ratio, seed):
        raise safekern.NonFiniteError("broken on purpose")

    monkeypatch.setitem(set_experiment.METHODS, "random", fails)
    with pytest.raises(safekern.SafekernError, match="1 of 3 runs failed, as was said: set/random"):
        replicate("set", "--only", "untouched|(random|full).*lr0.0001", steps=(1,))
    assert "failed: set/random-0.01-lr0.0001-balanced-seed0: broken on purpose" in capsys.readouterr().err
    folder = replicate("table", steps=(1,))
    assert sorted(results(folder, "set")) == ["full-1-lr0.0001-balanced-seed0", "untouched"]


def test_other_data_are_not_put_beside_those_that_are_there(replicate, tmp_path):
    replicate("set", "--only", "untouched")
    with pytest.raises(OtherSettingsError, match="precision was 'bf16' and is 'fp32'"):
        replicate("where", "--precision", "fp32")
    pairs = json.loads((tmp_path / "pairs.json").read_text())
    (tmp_path / "pairs.json").write_text(json.dumps(pairs[1:]))
    with pytest.raises(OtherSettingsError, match=r"untouched.json: .*: data was"):
        replicate("set", "--only", "full-1-lr0.0001")


def test_held_out_prompts_are_never_trained_on(tmp_path):
    goals = [f"Do harm number {i}" for i in range(130)]
    (tmp_path / "goals.json").write_text(json.dumps([{"goal": goal} for goal in goals]))
    rows = [{"instruction": f"{goal}.", "output": "I'm sorry, but I can't help with that."} for goal in goals]
    rows.append({"instruction": "Bake bread", "output": "Mix flour and water."})
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    # All that may be evaluated on are left out, however many are.
    for held_out in (100, 20):
        data = Data.read(tmp_path / "pairs.json", tmp_path / "goals.json", held_out=held_out)
        assert data.goals == goals[-100:][:held_out]
        assert data.refusals.prompts == [f"{goal}." for goal in goals[:30]]

    problems = Pairs([f"What is {i} + {i}?" for i in range(40)], [f"{2 * i}" for i in range(40)], [""] * 40)
    twice = Pairs(["what is 39 + 39?", *problems.prompts], ["78", *problems.responses], [""] * 41)
    replace(data, gsm8k=problems).check()
    for leaking, what in (
        (replace(data, goals=[" do harm  NUMBER 3 "]), "NUMBER 3"),
        (replace(data, gsm8k=twice), "What is 39"),
        (replace(data, gsm8k=Pairs([*problems.prompts, goals[-100]], ["1"] * 41, [""] * 41)[::-1]), "harm number 30"),
    ):
        with pytest.raises(LeakError, match=what):
            leaking.check()


def test_data_are_told_apart_by_what_they_hold():
    data = Data.read(held_out=3)
    problems = Pairs(["1 + 1?"], ["2"], [""])
    assert data.gsm8k_digest is None
    assert replace(data, gsm8k=problems).gsm8k_digest != replace(data, gsm8k=problems[:0]).gsm8k_digest
    # What needs no problems is not run anew for others.
    assert replace(data, gsm8k=problems).digest == data.digest != replace(data, goals=["another"]).digest


def test_protection_is_compared_at_one_loss_whatever_the_rate_and_length():
    def run(method, lr, steps, *nlls):
        settings = {"aligned": "set", "task": "chat", "lr": lr, "method": method, "ratio": 0.0, "steps": steps}
        rows = [
            {"step": step, "task_nll": [nll], "refusal_nll": [1.0], "attack_success": [0.5]}
            for step, nll in zip((1, 2, 4), nlls, strict=False)
        ]
        return {"settings": settings, "rows": rows, "facts": {}, "finished": True}

    start = {"step": 0, "benign_nll": [3.0], "refusal_nll": [1.0], "attack_success": [0.5], "benign_refusals": [0.1]}
    found = [
        {"settings": {"aligned": "set", "recipe": {}}, "rows": [start]},
        run("nothing", 1e-5, [1, 2], 2.5, 2.4),
        run("nothing", 1e-4, [1, 2], 2.6, 2.2),
        run("nothing", 1e-4, [1, 2, 4], 2.6, 2.3, 1.0),
        run("replay", 1e-4, [1, 2], 2.0, 1.9),
        run("replay", 1e-4, [1], 2.0),
    ]
    groups = spa.comparisons(found)
    assert sorted((group.lr, group.steps[-1]) for group in groups) == [(1e-5, 2), (1e-4, 1), (1e-4, 2), (1e-4, 4)]
    # Not 1.0, which takes more steps than the others have, and not 1.9, where something is protected.
    assert [spa.least_task_nll(group, groups) for group in groups] == [2.2] * 4
    only = groups[0]._replace(runs=found[-2:-1])
    assert spa.least_task_nll(only, [only]) is None


def test_reads_one_measurement_where_another_falls_to_a_level():
    # Past its lowest point before answers are counted again, as tasks that are overfitted are.
    rows = [
        {"step": 0, "task": [4.0, 3, 5], "asr": 0.0},
        {"step": 10, "task": [3.0, 2, 4]},
        {"step": 20, "task": [2.0, 1, 3]},
        {"step": 40, "task": [3.5, 3, 4], "asr": 0.8},
    ]
    assert report.first_step(rows, "task", 2.5) == 15
    assert report.at_step(rows, "asr", 15) == pytest.approx(0.3)
    assert report.first_step(rows, "task", 1.0) is None
    assert report.first_step(rows, "task", 4.0) == report.first_step(rows, "task", 9.0) == 0
    assert all(report.at_step(rows, *given) is None for given in (("asr", None), ("asr", 41), ("nll", 5)))


def tuned(method, seed, *nlls, finished=True, **settings):
    rows = [
        {"step": 10 * number, "refusal_nll": [nll] * 3, "benign_nll": [1.0] * 3, "auc": 0.5}
        | {"attack_success": [nll / 4, 0.0, 1.0], "benign_refusals": [0.0] * 3}
        | {"broken_harmful": 0, "broken_benign": 0}
        for number, nll in enumerate(nlls, 1)
    ]
    settings = {"method": method, "seed": seed, "ratio": 0.01, "recipe": "balanced", "lr": 1e-4, **settings}
    return {"settings": settings, "facts": {}, "rows": rows, "finished": finished}


def records(experiment, found):
    ((_, table),) = experiment.tables(found, False)
    return [dict(zip([column.key for column in table.columns], row, strict=True)) for row in table.rows]


def test_stars_what_was_measured_by_an_earlier_rule():
    rows = tuned("esi", 0, 1.0)["rows"]
    assert report.percent(rows) == "25% [0%, 100%]*"
    assert report.percent([{**rows[0], "harmful_answers": "arb"}, *rows]) == "25% [0%, 100%]*"
    assert report.percent([{**rows[0], "harmful_answers": "arb"}]) == "25% [0%, 100%]"
    assert report.percent([{"step": 5}]) is None


def test_attacks_are_compared_prompt_by_prompt():
    rows = [{"harmful_answers": "aab" * 10}, {"harmful_answers": "arr" * 10}]
    others = [{"harmful_answers": "aaa" * 10}]
    # Of the three in turn 0, a half and all of the others' attacks less.
    assert report.difference(rows, others).startswith("-50 [-")
    assert report.difference(others, rows).startswith("+50 [+")
    assert report.difference(rows, rows) == "+0 [+0, +0]"
    assert report.difference(rows, [{"attack_success": 1.0}]) is report.difference([], others) is None


def test_seeds_are_compared_with_their_own():
    start = tuned("none", 0, 4.0)
    start["rows"][0]["step"] = 0
    found = [start, tuned("esi", 0, 3.0, 1.0), tuned("esi", 1, 2.0, 1.0), tuned("random", 0, 3.5, 3.0)]
    found += [tuned("random", 1, 3.5, 2.0), tuned("esi", 2, 1.0, finished=False)]
    steps = "steps to the refusal NLL that random has at last"
    rows = {row["weights"]: row[steps] for row in records(set_experiment.SET, found[:-1])}
    # Each seed of ESI gets there at step 10: one to 3, the other to 2.
    assert rows == {"untouched": None, "esi": 10, "random": 20}
    # Nothing is known of a seed whose random run is under way.
    assert {row["weights"]: row[steps] for row in records(set_experiment.SET, found)}["esi"] is None


def test_seeds_are_averaged_and_runs_under_way_are_not_shown_as_ends():
    size, weight = {"pairs_per_step": 6}, {"refusal_weight": 0.16}
    found = [tuned("esi", seed, 4.0, nll, **size, **weight) for seed, nll in enumerate((1.0, 2.0))]
    (row,) = records(set_experiment.WEIGHT, found)
    assert row["seeds"] == 2 and row["refusal NLL"] == "1.50 [1.50, 1.50]"
    judged = [tuned("esi", 0, 3.0, finished=False, guard=None, prompts=16)]
    judged.append(tuned("esi", 0, 3.0, 1.0, guard=None, prompts=64))
    few, many = records(judge.JUDGE, judged)
    assert few["refusal NLL at last"] is None and many["refusal NLL at last"] == "1.00 [1.00, 1.00]"
    assert few["attack success at 10"] == "75% [0%, 100%]*" and few["attack success at 20"] is None


@pytest.mark.parametrize("content", ["{", "[]", '{"settings": {}}', "\x80"])
def test_a_damaged_file_of_a_run_is_named(replicate, tiny, tmp_path, content):
    path = tmp_path / "out" / label(str(tiny)) / "set" / "untouched.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode("latin-1"))
    for command in (["set", "--only", "untouched"], ["table"]):
        with pytest.raises(safekern.FileFormatError, match=r"untouched.json: .*remove it"):
            replicate(*command)


def test_wrong_options_are_explained(replicate, tmp_path, capsys):
    with pytest.raises(safekern.InvalidArgumentError, match=r"out/tiny-.*: there are no results"):
        replicate("table")
    with pytest.raises(safekern.InvalidArgumentError, match=r"--only nothing-here: .* no run of set, ratio"):
        replicate("set", "ratio", "--only", "nothing-here")
    with pytest.raises(SystemExit, match="2"):
        replicate("set", "--only", "(")
    assert "argument --only: not a regular expression" in capsys.readouterr().err
    with pytest.raises(safekern.InvalidArgumentError, match="--device abacus: not available"):
        replicate("set", "--device", "abacus")
    with pytest.raises(safekern.FileAccessError, match=r"absent.md: no such file"):
        replicate("set", "--only", "untouched", "--readme", str(tmp_path / "absent.md"))


def test_data_that_are_too_few_are_refused(replicate, tmp_path):
    with pytest.raises(safekern.SafekernError, match="1 of 1 runs failed"):
        replicate("judge", "--only", "64-prompts")
    path = tmp_path / "problems.json"
    path.write_text(json.dumps([{"prompt": f"{i}?", "response": f"It is {i}."} for i in range(30)]))
    with pytest.raises(safekern.InvalidArgumentError, match=r"problems.json: has 30 problems, of which the last 32"):
        replicate("spa", "--gsm8k", str(path))
    path.rename(tmp_path / "pairs.json")
    with pytest.raises(safekern.InvalidArgumentError, match=r"pairs.json: has 0 refusals"):
        replicate("set")


def test_processes_share_the_runs_and_one_reports(replicate, tmp_path, capfd):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- replication: set, balanced, lr 3e-05 -->\n<!-- end of replication -->\n")
    only = "untouched|esi.*balanced-seed0"
    folder = replicate("set", "--only", only, "--jobs", "2", "--readme", str(readme), steps=(1,))
    found = results(folder, "set")
    assert len(found) == 3 and all(record["finished"] for record in found.values())
    assert "| untouched |" in readme.read_text()
    lines = capfd.readouterr()
    for name in found:
        assert (lines.out + lines.err).count(f"set/{name}") == 1
    assert lines.out.count("written to") == 1


def test_a_process_that_fails_is_reported(replicate, capfd):
    with pytest.raises(safekern.SafekernError, match=r"of 2 processes failed, as was said"):
        replicate("judge", "--only", "16-prompts", "--guard", "no-such-guard", "--jobs", "2")
    assert "failed: judge/16-prompts-by-no-such-guard-seed0: " in capfd.readouterr().err
