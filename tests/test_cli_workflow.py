"""``score``, ``set``, ``spa``, ``verify`` and ``apply`` as commands, one after the other, on a tiny model on disk."""

import functools
import json
import shutil
import socket
import weakref

import pytest
import torch
from cli_folder import BENIGN, SMALL, write_rows
from language_models import CHATML, byte_tokenizer, tiny_llama
from multiplied import Multiplied
from safetensors.torch import load_file, save_file
from small_scores import scores as small_scores
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from safekern import Mask, Scores, models, products, progress, resume, training
from safekern.checkpoint import Patched, fingerprint
from safekern.cli import main, options, tuning
from safekern.errors import FileAccessError, FileFormatError, InvalidArgumentError
from safekern.prompts import Pairs


@pytest.fixture
def folder(scored, tmp_path, monkeypatch):
    shutil.copytree(scored, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def set_command(*more, out="run", iterations=4):
    given = ["--model", "base", "--mask", "run/mask.safetensors", "--lr", "1e-2", "--iterations", str(iterations)]
    return main(["set", *given, *SMALL, "--out", out, *more])


def tensors(folder):
    return load_file(folder / "model.safetensors")


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


def stop_after(monkeypatch, steps):
    """Ends training as Ctrl-C would, after some steps of the process."""
    tune = training.tune

    def interrupted(*args, after_step, **options):
        def step(losses):
            after_step(losses)
            if len(losses) == steps:
                raise KeyboardInterrupt

        return tune(*args, after_step=step, **options)

    monkeypatch.setattr("safekern.cli.tuning.tune", interrupted)


def no_model(args):
    pytest.fail("the model was loaded")


MASK = ["--mask", "run/mask.safetensors"]
RESCORE = ["score", "--model", "base", "--pairs", "harmful.jsonl", "--ratio", "0.05", "--save-scores", "--out", "run"]


class TestScore:
    def test_the_mask_says_where_it_comes_from(self, folder):
        mask = Mask.load("run/mask.safetensors")
        assert mask == Scores.load("run/scores.safetensors").top(0.05)
        model, _ = models.load("base")
        assert mask.numel == int(0.05 * sum(param.numel() for param in model.parameters()))
        expected = {"model": "base", "model_fingerprint": fingerprint(model), "dtype": "bfloat16", "pairs": 6}
        assert mask.meta.items() >= {**expected, "data": "harmful.jsonl", "ratio": 0.05, "objective": "refusal"}.items()

    def test_prints_tables_or_json(self, folder, capsys):
        arguments = ["score", "--model", "base", "--pairs", "harmful.jsonl", "--limit", "2", "--batch-size", "1"]
        assert main([*arguments, "--out", "small.safetensors"]) == 0
        printed = capsys.readouterr().out
        for text in ("layer 0 to 1", "enrichment", "Written to small.safetensors"):
            assert text in printed
        assert main([*arguments, "--out", "small.safetensors", "--json", "--save-scores"]) == 0
        found = json.loads(capsys.readouterr().out)
        mask = Mask.load("small.safetensors")
        assert found["mask"] == {
            "numel": mask.numel,
            "model_numel": mask.model_numel,
            "fingerprint": mask.fingerprint,
        }
        assert found["meta"] == mask.meta
        assert found["written"] == ["small.safetensors", "small_scores.safetensors"]
        assert mask.meta["batches"] == mask.meta["pairs"] == 2

    def test_memory_gives_the_same_mask_and_no_other_scores(self, folder, capsys):
        size = sum(value.numel() for value in Scores.load("run/scores.safetensors").values()) * 4
        arguments = ["--pairs", "harmful.jsonl", "--ratio", "0.05", "--memory", str(size * 3 // 4), "--out", "less"]
        assert main(["score", "--model", "base", *arguments]) == 0
        assert Mask.load("less/mask.safetensors") == Mask.load("run/mask.safetensors")
        assert main(["score", "--model", "base", *arguments, "--save-scores"]) == 0
        said = "less/scores.safetensors: holds only the top 0.05"
        assert f"note: {said}" in capsys.readouterr().err
        for command in (
            ["report", "less/mask.safetensors"],
            ["verify", "--model", "", "--mask", "less/mask.safetensors"],
        ):
            assert main([*command, "--scores", "less/scores.safetensors"]) == 1
            assert f"safekern {command[0]}: {said}" in capsys.readouterr().err

    @pytest.mark.parametrize("slow", [True, False])
    def test_slow_products_are_those_of_float32(self, folder, monkeypatch, capsys, slow):
        for module in (products, options):
            monkeypatch.setattr(module, "multiplies_slowly", lambda dtype: slow and dtype == torch.bfloat16)
        with Multiplied() as multiplied:
            assert main(["score", "--model", "base", "--pairs", "harmful.jsonl", "--out", "small.safetensors"]) == 0
        assert multiplied.dtypes == {torch.float32 if slow else torch.bfloat16}
        assert "no instructions" not in capsys.readouterr().err

    @pytest.mark.parametrize("dtype", ["auto", "float32"])
    def test_products_that_stay_slow_are_noted(self, folder, monkeypatch, capsys, dtype):
        monkeypatch.setattr(options, "multiplies_slowly", lambda dtype: dtype == torch.bfloat16)
        config = GPT2Config(vocab_size=259, n_positions=256, n_embd=32, n_layer=1, n_head=2)
        GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained("conv")
        byte_tokenizer().save_pretrained("conv")
        arguments = ["--pairs", "harmful.jsonl", "--limit", "1", "--out", "small.safetensors", "--dtype", dtype]
        assert main(["score", "--model", "conv", *arguments]) == 0
        noted = "no instructions for products of bfloat16 numbers" in capsys.readouterr().err
        assert noted == (dtype == "auto")

    def test_scores_of_an_earlier_run_do_not_stay_beside_another_mask(self, folder, capsys):
        before = (folder / "run" / "mask.safetensors").read_bytes()
        again = [*RESCORE, "--limit", "2"]
        again.remove("--save-scores")
        assert main(again) == 1
        assert "scores.safetensors: exists already, and would stay beside" in capsys.readouterr().err
        assert (folder / "run" / "mask.safetensors").read_bytes() == before
        assert main([*again, "--save-scores"]) == 0
        assert Mask.load("run/mask.safetensors") == Scores.load("run/scores.safetensors").top(0.05)

    def test_answers_that_are_no_refusals_are_noted(self, folder, capsys):
        # As in the original circuit-breakers data, where `output` does what is asked for.
        rows = [
            {"prompt": f"Do harm {i}", "output": "I can't." if i else "Sure!", "llama3_output": "No."} for i in (0, 1)
        ]
        for count, said in ((2, False), (1, True)):
            (folder / "answers.json").write_text(json.dumps(rows[:count]))
            assert main(["score", "--model", "base", "--pairs", "answers.json", "--out", f"answers{count}"]) == 0
            assert set_command("--harmful", "answers.json", out=f"tuned{count}") == 0
            noted = capsys.readouterr().err
            for option in ("--pairs", "--harmful"):
                assert (f"note: {option} answers.json: 0 of 1 responses have a usual phrase" in noted) == said

    def test_prompts_without_refusals(self, folder):
        (folder / "goals.json").write_text(json.dumps([{"goal": f"Do harm {i}", "target": "Sure"} for i in range(3)]))
        assert main(["score", "--model", "base", "--prompts", "goals.json", "--out", "goals"]) == 0
        assert Mask.load("goals/mask.safetensors").meta["pairs"] == 3


class TestSet:
    def test_apply_on_a_fresh_copy_gives_the_same_bits(self, folder, capsys):
        before = tensors(folder / "base")
        assert set_command("--save-model") == 0
        printed = capsys.readouterr().out
        assert "checked to be bit-identical" in printed and "loss" in printed
        assert main(["apply", "--model", "base", "run/delta.safetensors", "--out", "copy"]) == 0
        tuned, copy = tensors(folder / "run" / "model"), tensors(folder / "copy")
        assert same_bits(tuned, copy)
        assert same_bits(before, tensors(folder / "base"))
        mask = Mask.load("run/mask.safetensors")
        changed = {name: (before[name] != copy[name]).flatten().nonzero().flatten().tolist() for name in copy}
        assert sum(map(len, changed.values())) > mask.numel // 2
        assert all(set(where) <= set(mask[name].tolist() if name in mask else []) for name, where in changed.items())

        report = json.loads((folder / "run" / "set.json").read_text())
        assert len(report["losses"]) == report["iterations"] == 4
        settings = {"dtype": "bfloat16", "harmful": "harmful.jsonl", "benign": "benign.jsonl", "refusal_weight": 0.16}
        assert report.items() >= settings.items()
        assert report["model_fingerprint"] == mask.meta["model_fingerprint"] == fingerprint(models.load("base")[0])
        assert report["tuned_fingerprint"] == fingerprint(models.load("copy")[0])
        assert not (folder / "run" / "training.safetensors").exists()

    def test_gradients_are_of_masked_parameters_only(self, folder, monkeypatch):
        tune, trained = training.tune, []

        def recorded(model, *args, **options):
            for name, param in model.named_parameters():
                if param.requires_grad:
                    param.register_post_accumulate_grad_hook(lambda _, name=name: trained.append(name))
            return tune(model, *args, **options)

        monkeypatch.setattr("safekern.cli.tuning.tune", recorded)
        assert set_command() == 0
        assert set(trained) == set(Mask.load("run/mask.safetensors"))
        assert not any("embed" in name for name in trained)

    def test_other_ways_to_apply(self, folder, capsys):
        assert set_command() == 0
        shutil.copytree("base", "other")
        assert main(["apply", "--model", "other", "run/delta.safetensors", "--in-place", "--json"]) == 0
        # Loaded, changed in memory and saved.
        loaded = ["--dtype", "bfloat16", "--out", "loaded"]
        assert main(["apply", "--model", "base", "run/delta.safetensors", *loaded]) == 0
        assert same_bits(tensors(folder / "other"), tensors(folder / "loaded"))
        assert models.load("loaded")[1].chat_template
        assert main(["apply", "--model", "other", "run/delta.safetensors", "--in-place"]) == 1
        assert "applied already" in capsys.readouterr().err
        assert main(["apply", "--model", "base", "run/delta.safetensors", "--dtype", "float32", "--out", "wide"]) == 1
        assert "another dtype" in capsys.readouterr().err
        assert not (folder / "wide").exists()

    def test_apply_where_a_checkpoint_is_loaded_in_another_dtype_than_its_files_have(self, folder, capsys):
        config = json.loads((folder / "base" / "config.json").read_text())
        (folder / "base" / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
        assert main(RESCORE) == 0
        assert set_command() == 0
        capsys.readouterr()
        assert main(["apply", "--model", "base", "run/delta.safetensors", "--in-place"]) == 1
        assert "(--dtype of the command, with --out)" in capsys.readouterr().err
        assert main(["apply", "--model", "base", "run/delta.safetensors", "--out", "tuned"]) == 0
        report = json.loads((folder / "run" / "set.json").read_text())
        assert report["tuned_fingerprint"] == fingerprint(models.load("tuned")[0])

    def test_apply_to_a_read_only_base(self, folder):
        assert set_command() == 0
        for path in [*(folder / "base").iterdir(), folder / "base"]:
            path.chmod(path.stat().st_mode & ~0o222)
        assert main(["apply", "--model", "base", "run/delta.safetensors", "--out", "tuned"]) == 0
        assert all(path.stat().st_mode & 0o200 for path in [*(folder / "tuned").iterdir(), folder / "tuned"])
        assert not list(folder.glob(".*"))

    def test_a_copy_of_a_read_only_base_that_fails_is_removed(self, folder, monkeypatch, capsys):
        assert set_command() == 0
        (folder / "base" / "original" / "more").mkdir(parents=True)
        copytree, rmtree, writable = shutil.copytree, shutil.rmtree, []

        def copy(source, target, *more, **options):
            copytree(source, target, *more, **options)
            if more or options:
                return
            for path in sorted([*target.rglob("*"), target], reverse=True):
                path.chmod(path.stat().st_mode & ~0o222)
            raise OSError("No space left on device")

        def remove(target, **options):
            # Whoever runs these tests may be allowed to take files out of any folder.
            writable.extend(bool(path.stat().st_mode & 0o200) for path in [target, *target.rglob("*")] if path.is_dir())
            rmtree(target, **options)

        monkeypatch.setattr(shutil, "copytree", copy)
        monkeypatch.setattr(shutil, "rmtree", remove)
        assert main(["apply", "--model", "base", "run/delta.safetensors", "--out", "tuned"]) == 1
        assert "cannot be copied to tuned: No space left" in capsys.readouterr().err
        assert writable == [True, True, True]
        assert not list(folder.glob(".*")) and not (folder / "tuned").exists()

    def test_apply_leaves_links_that_lead_nowhere(self, folder, capsys):
        assert set_command() == 0
        (folder / "tuned").symlink_to("nowhere")
        assert main(["apply", "--model", "base", "run/delta.safetensors", "--out", "tuned"]) == 1
        assert "tuned: exists already" in capsys.readouterr().err

    def test_a_model_of_an_earlier_run_does_not_stay_beside_another_report(self, folder, capsys):
        assert set_command("--save-model") == 0
        before = tensors(folder / "run" / "model")
        assert set_command() == 1
        assert "holds the model of an earlier run" in capsys.readouterr().err
        assert same_bits(before, tensors(folder / "run" / "model"))
        assert set_command("--save-model", "--seed", "1") == 0
        assert not same_bits(before, tensors(folder / "run" / "model"))
        shutil.rmtree("run/model")
        assert set_command() == 0

    @pytest.mark.parametrize("command", ["set", "spa"])
    def test_a_report_of_others_stays(self, folder, capsys, command):
        report = folder / "mine" / f"{command}.json"
        report.parent.mkdir()
        report.write_text("mine")
        data = ["--data", "benign.jsonl", "--rehearsal", "0"] if command == "spa" else SMALL
        arguments = ["--model", "base", "--mask", "run/mask.safetensors", "--iterations", "1", *data, "--out", "mine"]
        assert main([command, *arguments]) == 1
        assert f"{command}.json: exists already, and it does not say that" in capsys.readouterr().err
        assert report.read_text() == "mine" and list(report.parent.iterdir()) == [report]

    @pytest.mark.parametrize("command", ["set", "spa"])
    def test_what_the_chat_template_refuses_is_found_before_training(self, folder, capsys, command):
        refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        byte_tokenizer(refuses + CHATML).save_pretrained("base")
        turns = [(("user", row["prompt"]), ("assistant", row["response"])) for row in BENIGN]
        turns.append((("system", "Be nice."), *turns[0]))
        rows = [{"messages": [{"role": role, "content": text} for role, text in each]} for each in turns]
        write_rows(folder / "odd.jsonl", rows)
        given = ["--benign"] if command == "set" else ["--rehearsal", "0", "--data"]
        arguments = ["--model", "base", "--mask", "run/mask.safetensors", "--iterations", "1", *given, "odd.jsonl"]
        assert main([command, *arguments, "--out", "odd"]) == 1
        assert f"{given[-1]}, pair 7: the tokenizer's chat template refuses" in capsys.readouterr().err
        assert not (folder / "odd" / "training.safetensors").exists()

    def test_what_is_longer_than_the_model_takes_is_found_before_training(self):
        pairs = Pairs(["a", "a" * 200], ["b", "b"], ["", ""])
        longer = r"--data, pair 2: .* has up to \d+ tokens, but the model takes 128 at most"
        model = GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=8, n_layer=1, n_head=1, n_positions=128))
        check = functools.partial(tuning.check_pairs, model, byte_tokenizer())
        with pytest.raises(InvalidArgumentError, match=longer):
            check({"--harmful": pairs[:1], "--data": pairs})
        check({"--harmful": pairs[:1]})
        # Without a table of positions nothing is too long.
        llama = tiny_llama()
        llama.config.max_position_embeddings = 16
        tuning.check_pairs(llama, byte_tokenizer(), {"--data": pairs})

    def test_apply_to_experts_that_are_stored_one_by_one(self, folder, capsys):
        config = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1}
        config |= {
            "vocab_size": 259,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        MixtralForCausalLM(MixtralConfig(**config)).to(torch.bfloat16).save_pretrained("base")
        before = tensors(folder / "base")
        assert any(".experts.3." in name for name in before)
        assert main(RESCORE) == 0
        assert any("gate_up_proj" in name for name in Mask.load("run/mask.safetensors"))
        assert set_command("--save-model") == 0
        assert main(["apply", "--model", "base", "run/delta.safetensors", "--out", "copy"]) == 0
        assert same_bits(tensors(folder / "copy"), tensors(folder / "run" / "model"))
        capsys.readouterr()
        assert main(["apply", "--model", "base", "run/delta.safetensors", "--in-place"]) == 1
        assert "safekern apply does with --out" in capsys.readouterr().err
        assert same_bits(tensors(folder / "base"), before)

    def test_weights_in_other_forms_and_masks_are_noted(self, folder, capsys):
        assert set_command() == 0
        torch.save({}, "base/pytorch_model.bin")
        shutil.copy("run/mask.safetensors", "base")
        capsys.readouterr()
        assert main(["apply", "--model", "base", "run/delta.safetensors", "--out", "copy", "--json"]) == 0
        printed = capsys.readouterr()
        assert "note: mask.safetensors, pytorch_model.bin in copy: " in printed.err
        assert json.loads(printed.out)["written"] == "copy"

    def test_a_learning_rate_that_changes_nothing(self, folder, capsys):
        assert set_command("--lr", "1e-30") == 1
        assert "no weight has changed: --lr 1e-30 is too small for 4 steps on weights in bf" in capsys.readouterr().err
        assert not (folder / "run" / "delta.safetensors").exists()

    def test_a_wrong_base_is_not_copied(self, folder, monkeypatch, capsys):
        assert set_command("--save-model") == 0
        monkeypatch.setattr(shutil, "copytree", lambda *args: pytest.fail("it was copied"))
        assert main(["apply", "--model", "run/model", "run/delta.safetensors", "--out", "copy"]) == 1
        assert "applied already" in capsys.readouterr().err

    def test_resumed_run_ends_with_the_same_bits(self, folder, monkeypatch, capsys):
        assert set_command("--save-model", out="whole", iterations=7) == 0
        with monkeypatch.context() as patch:
            stop_after(patch, 5)
            assert set_command("--checkpoint-every", "2", out="parts", iterations=7) == 130
            assert "note: the same command with --resume goes on from parts/" in capsys.readouterr().err
            assert set_command(out="none", iterations=7) == 130
            assert "--resume" not in capsys.readouterr().err
        assert (folder / "parts" / "training.safetensors").exists()
        assert not (folder / "parts" / "delta.safetensors").exists()
        with monkeypatch.context() as patch:
            patch.setattr(options, "load_model", no_model)
            assert set_command("--save-model", out="parts", iterations=7) == 1
            assert "add --resume" in capsys.readouterr().err
            assert set_command("--save-model", "--resume", "--refusal-weight", "0.5", out="parts", iterations=7) == 1
            assert "refusal_weight was 0.16 and is 0.5. Use the same" in capsys.readouterr().err
            assert set_command("--save-model", "--resume", out="parts", iterations=3) == 1
            assert "has taken 4 of" in capsys.readouterr().err
        assert set_command("--save-model", "--resume", out="parts", iterations=7) == 0
        assert same_bits(tensors(folder / "whole" / "model"), tensors(folder / "parts" / "model"))
        for name in ("losses", "tuned_fingerprint"):
            whole, parts = (json.loads((folder / out / "set.json").read_text())[name] for out in ("whole", "parts"))
            assert whole == parts
        assert (folder / "whole/delta.safetensors").read_bytes() == (folder / "parts/delta.safetensors").read_bytes()

    def test_a_run_is_not_resumed_in_another_chat_template(self, folder, monkeypatch, capsys):
        with monkeypatch.context() as patch:
            stop_after(patch, 3)
            assert set_command("--checkpoint-every", "2", out="parts") == 130
        byte_tokenizer(CHATML.replace("<|im_end|>", "<|im_end|>!")).save_pretrained("base")
        assert set_command("--resume", out="parts") == 1
        assert "--harmful was" in capsys.readouterr().err

    def test_damaged_checkpoint(self, folder, monkeypatch, capsys):
        with monkeypatch.context() as patch:
            stop_after(patch, 3)
            assert set_command("--checkpoint-every", "2") == 130
        path = folder / "run" / "training.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        assert set_command("--resume") == 1
        assert "checksum" in capsys.readouterr().err

    def test_notices_a_weight_that_moved_outside_the_mask(self, folder, monkeypatch, capsys):
        tune = training.tune

        def tune_and_spoil(model, *args, **options):
            losses = tune(model, *args, **options)
            with torch.no_grad():
                model.model.embed_tokens.weight[0, 0] += 1
            return losses

        monkeypatch.setattr("safekern.cli.tuning.tune", tune_and_spoil)
        assert set_command() == 1
        assert "outside the mask have changed" in capsys.readouterr().err
        assert not (folder / "run" / "delta.safetensors").exists()

    def test_progress_without_a_terminal_is_a_line_now_and_then(self, folder, monkeypatch, capsys):
        assert set_command() == 0
        assert "tuning: step" not in capsys.readouterr().err
        monkeypatch.setattr(progress, "_SECONDS_PER_LINE", 0)
        assert set_command() == 0
        losses = json.loads((folder / "run" / "set.json").read_text())["losses"]
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tuning")]
        assert said == [f"tuning: step {step} of 4, loss {loss:.2f}" for step, loss in enumerate(losses, 1)]
        assert main(RESCORE) == 0
        assert "score: batch 2 of 2\n" in capsys.readouterr().err

    def test_a_mask_of_a_model_of_another_size_is_refused(self, folder, capsys):
        mask = Mask.load("run/mask.safetensors")
        numel = mask.model_numel
        bigger = Mask.from_indices(dict(mask), mask.shapes, model_numel=numel + 64, meta=mask.meta)
        bigger.save("bigger.safetensors")
        assert set_command("--mask", "bigger.safetensors", out="other") == 1
        said = f"ranked on another model, of {numel + 64:,} weights where this one has {numel:,}: score this one"
        assert said in capsys.readouterr().err
        assert not (folder / "other" / "delta.safetensors").exists()

    def test_a_mask_of_other_weights_is_noted(self, folder, capsys):
        assert set_command("--dtype", "float32") == 0
        assert "ranked on other weights" in capsys.readouterr().err


class TestSpa:
    def spa(self, *more, out="spa"):
        given = ["--model", "base", "--mask", "run/mask.safetensors", "--data", "benign.jsonl", "--iterations", "5"]
        return main(["spa", *given, "--lr", "1e-2", "--out", out, *more])

    def test_what_the_model_leaves_out_is_noted(self, folder, capsys):
        more = tensors(folder / "base") | {"visual.patch.weight": torch.ones(2)}
        save_file(more, folder / "base" / "model.safetensors", {"format": "pt"})
        assert self.spa() == 0
        assert "also holds visual.patch.weight, which" in capsys.readouterr().err
        assert set_command(out="tuned") == 0
        assert "visual" not in capsys.readouterr().err
        # On disk, nothing is left out.
        assert main(["apply", "--model", "base", "tuned/delta.safetensors", "--out", "applied"]) == 0
        assert "visual" not in capsys.readouterr().err and "visual.patch.weight" in tensors(folder / "applied")
        assert set_command("--save-model", out="tuned2") == 0
        assert "also holds visual.patch.weight, which" in capsys.readouterr().err

    def test_settings_that_cannot_be_saved_are_found_before_training(self, folder, monkeypatch, capsys):
        def refuse(*args, **options):
            raise ValueError("The generation config instance is invalid")

        # As transformers 5.0 does for a temperature without do_sample.
        monkeypatch.setattr(GenerationConfig, "save_pretrained", refuse)
        monkeypatch.setattr(tuning, "train", lambda *args: pytest.fail("the model was trained"))
        for found in (self.spa(), set_command("--save-model", out="tuned")):
            assert found == 1
        with pytest.raises(pytest.fail.Exception, match="was trained"):
            set_command(out="delta")
        said = capsys.readouterr().err
        assert said.count("refuse to save the tuned model, for its generation_config.json") == 2
        assert "instance is invalid" in said

    def test_the_mask_stays_and_the_rest_learns(self, folder, capsys):
        assert self.spa("--json") == 0
        report = json.loads(capsys.readouterr().out)
        assert report == json.loads((folder / "spa" / "spa.json").read_text())
        assert report["losses"][-1] < report["losses"][0]
        mask = Mask.load("run/mask.safetensors")
        before, after = tensors(folder / "base"), tensors(folder / "spa" / "model")
        for name, tensor in before.items():
            moved = tensor.view(torch.int16) != after[name].view(torch.int16)
            assert moved.any()
            assert name not in mask or not (moved & mask.bool(name)).any()

    def test_what_16_bit_weights_do_is_said(self, folder, capsys):
        assert self.spa("--iterations", "1") == 0
        assert "16-bit weights round most steps of --lr 0.01 away" in capsys.readouterr().err
        assert self.spa("--iterations", "1", "--dtype", "float32", out="wide") == 0
        assert "16-bit" not in capsys.readouterr().err

    def test_few_rehearsed_pairs_are_noted(self, folder, capsys):
        pairs = [{"prompt": f"Say {i}", "response": f"{i}."} for i in range(4)]
        (folder / "few.json").write_text(json.dumps(pairs))
        small = ["--batch-size", "4"]
        # Two pairs of each kind a step: twice over four answers, five times over four refusals.
        for kind, enough, times in (("benign", 4, 2), ("harmful", 10, 6)):
            given = [f"--{kind}", "few.json", *small]
            assert self.spa(*given, "--iterations", f"{enough}") == 0
            assert "by heart" not in capsys.readouterr().err
            assert self.spa(*given, "--iterations", f"{enough + 1}", "--rehearsal", "0.2") == 0
            noted = capsys.readouterr().err
            assert f"{enough + 1} steps go {times} times over 4 rehearsed pairs, which are learned by heart" in noted
            assert f"give more with --{kind}, or fewer --iterations" in noted
        assert self.spa(*small, "--iterations", "11", "--rehearsal", "0") == 0
        assert "by heart" not in capsys.readouterr().err

    def test_alignment_is_rehearsed_beside_the_data(self, folder):
        found = {}
        for share in ("0.1", "0.9", "0"):
            assert self.spa("--rehearsal", share, out=share) == 0
            report = json.loads((folder / share / "spa.json").read_text())
            assert report["rehearsal"] == float(share)
            rehearsed = {"harmful": "built-in", "benign": "built-in", "refusal_weight": 0.16} if float(share) else {}
            settings = {"dtype": "bfloat16", "data": "benign.jsonl", **rehearsed}
            assert report.items() >= settings.items() and ("harmful" in report) == bool(rehearsed)
            found[share] = report["losses"][0]
        # Linear in the share, before the first step.
        assert found["0.1"] - found["0"] == pytest.approx((found["0.9"] - found["0"]) / 9, rel=1e-3, abs=1e-5)
        assert found["0.1"] != found["0"]
        for option in ("--harmful", "--benign"):
            assert self.spa("--rehearsal", "0.1", option, f"{option[2:]}.jsonl", out="own") == 0
            assert json.loads((folder / "own" / "spa.json").read_text())["losses"][0] not in found.values()

    def test_resumed_run_ends_with_the_same_bits(self, folder, monkeypatch):
        assert self.spa(out="whole") == 0
        with monkeypatch.context() as patch:
            stop_after(patch, 4)
            assert self.spa("--checkpoint-every", "3", out="parts") == 130
        assert self.spa("--resume", out="parts") == 0
        assert same_bits(tensors(folder / "whole" / "model"), tensors(folder / "parts" / "model"))
        assert not (folder / "parts" / "training.safetensors").exists()

    def test_a_resumed_run_keeps_no_second_copy_of_weights_and_moments(self, folder, monkeypatch):
        with monkeypatch.context() as patch:
            stop_after(patch, 4)
            assert self.spa("--checkpoint-every", "3") == 130
        kept, load, tune = [], resume.load, tuning.tune

        def noted(*args):
            run = load(*args)
            states = [tensor for state in run.optimizer["state"].values() for tensor in state.values()]
            kept.extend(weakref.ref(tensor) for tensor in [*run.weights.values(), *states])
            return run

        def checked(*args, **options):
            assert kept and not any(ref() is not None for ref in kept)
            return tune(*args, **options)

        monkeypatch.setattr(resume, "load", noted)
        monkeypatch.setattr(tuning, "tune", checked)
        assert self.spa("--resume") == 0


class TestModelFolder:
    def test_only_what_the_command_wrote_itself_is_replaced(self, folder, capsys):
        (folder / "run" / "model").mkdir()
        assert set_command("--save-model") == 0
        first = tensors(folder / "run" / "model")
        assert set_command("--save-model", "--seed", "1") == 0
        second = tensors(folder / "run" / "model")
        assert not same_bits(first, second)
        capsys.readouterr()
        # It is of another command, though in a folder of safekern.
        assert main([*SPA[:-1], "run"]) == 1
        assert "spa.json does not say that this command wrote it" in capsys.readouterr().err
        assert same_bits(tensors(folder / "run" / "model"), second)

    def test_data_in_a_model_that_would_be_replaced(self, folder, capsys):
        assert set_command("--save-model") == 0
        shutil.copy("harmful.jsonl", "run/model/harmful.jsonl")
        given = ["--model", "base", "--mask", "run/mask.safetensors", "--harmful", "run/model/harmful.jsonl"]
        assert main(["set", *given, "--out", "run", "--save-model"]) == 1
        assert "would take the place of --harmful run/model/harmful.jsonl" in capsys.readouterr().err
        assert (folder / "run" / "model" / "harmful.jsonl").exists()

    @pytest.mark.parametrize("report", ["", "[]", '{"written": "model/"}', '{"written": ["mask.png"]}'])
    def test_a_folder_of_others_stays(self, folder, capsys, report):
        code = folder / "model" / "net.py"
        code.parent.mkdir()
        code.touch()
        (folder / "spa.json").write_text(report)
        assert main([*SPA[:-1], "."]) == 1
        assert "model: exists already" in capsys.readouterr().err
        assert code.exists()
        assert not (folder / "training.safetensors").exists()

    def test_where_no_model_is_saved_none_is_in_the_way(self, folder):
        shutil.copytree("base", "out/model")
        before = tensors(folder / "out" / "model")
        given = ["--mask", "run/mask.safetensors", "--iterations", "1", *SMALL, "--out", "out", "--lr", "1e-2"]
        assert main(["set", "--model", "out/model", *given]) == 0
        assert same_bits(tensors(folder / "out" / "model"), before)
        assert main(["set", "--model", "out/model", *given, "--save-model"]) == 1


def test_verify(folder, capsys):
    arguments = ["verify", "--model", "base", "--mask", "run/mask.safetensors", *SMALL, "--noise", "0.1", "0.5"]
    before = tensors(folder / "base")
    assert main([*arguments, "--scores", "run/scores.safetensors", "--out", "verify.json", "--limit", "3"]) == 0
    printed = capsys.readouterr()
    assert "Broken text is\nnot success" in printed.out and "bit for bit" in printed.out
    assert "noise 0.5 on bottom" in printed.err
    found = json.loads((folder / "verify.json").read_text())
    assert [(row["weights"], row["noise"]) for row in found["rows"]] == [
        ("none", 0.0),
        *((weights, noise) for noise in (0.1, 0.5) for weights in ("top", "random", "bottom")),
    ]
    assert found["harmful_prompts"] == found["benign_prompts"] == 3
    assert found["mask_is_top_of_scores"] is True and "note: the mask" not in printed.err
    assert same_bits(before, tensors(folder / "base"))
    for name in ("run/set.json", "harmful2.jsonl", "run/delta.safetensors"):
        content = b'{"command": "set", "written": ["set.json"]}'
        (folder / name).write_bytes(content)
        assert main([*arguments, "--out", name]) == 1
        assert f"{name}: exists already and is nothing that this command wrote" in capsys.readouterr().err
        assert (folder / name).read_bytes() == content
    assert main([*arguments, "--quick", "--json", "--out", "verify.json"]) == 0
    assert json.loads((folder / "verify.json").read_text())["rows"] != found["rows"]
    found = json.loads(capsys.readouterr().out)
    assert [row["weights"] for row in found["rows"]] == ["none", "top", "random", "top", "random"]
    assert found["mask_is_top_of_scores"] is None


def test_verify_notes_scores_that_are_not_those_of_the_mask(folder, capsys):
    Scores.load("run/scores.safetensors").random(0.05).save("random.safetensors")
    arguments = ["--mask", "random.safetensors", *SMALL, "--noise", "0", "--limit", "1", "--json"]
    assert main(["verify", "--model", "base", *arguments, "--scores", "run/scores.safetensors"]) == 0
    printed = capsys.readouterr()
    assert "note: the mask is not the weights of the largest ESI in --scores" in printed.err
    assert json.loads(printed.out)["mask_is_top_of_scores"] is False


def test_verify_refuses_scores_of_another_model(folder, monkeypatch, capsys):
    monkeypatch.setattr(options, "load_model", no_model)
    small_scores().save("other.safetensors")
    assert main(["verify", "--model", "base", *MASK, *SMALL, "--scores", "other.safetensors"]) == 1
    assert "weights and the scores are of another one, of 1,000: give the scores" in capsys.readouterr().err


SPA = ["spa", "--model", "base", *MASK, "--data", "benign.jsonl", "--out", "new"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "--model", "base", "--out", "absent/mask.safetensors"], "does not exist"),
        (["score", "--model", "base", "--pairs", "absent.jsonl", "--out", "new"], "cannot be read"),
        (["score", "--model", "base", "--save-scores", "--out", "old"], "scores.safetensors: is a directory"),
        (["score", "--model", "absent/", "--out", "new"], "no such folder"),
        (["score", "--model", "run", "--out", "new"], "holds no config.json"),
        (["score", "--model", "absent.gguf", "--out", "new"], "no such file"),
        (["score", "--model", "harmful.jsonl", "--out", "new"], "no .gguf file"),
        (["score", "--model", "base", "--device", "abacus", "--out", "new"], "--device abacus: not available here"),
        (["score", "--model", "base", "--memory", "100", "--out", "new"], "is too little"),
        (
            ["score", "--model", "base", "--out", "base/model.safetensors"],
            "is no file of kind 'mask'",
        ),
        (
            ["score", "--model", "base", "--out", "run/scores.safetensors"],
            "is no file of kind 'mask'",
        ),
        (["score", "--model", "base", "--save-scores", "--out", "mixed"], "is no file of kind 'scores'"),
        (
            ["set", "--model", "base", "--mask", "mixed/delta.safetensors", "--out", "mixed"],
            "of kind 'delta'",
        ),
        (["set", "--model", "base", *MASK, "--benign", "run/set.json", "--out", "run"], "would overwrite"),
        (["verify", "--model", "base", "--mask", "run/mask.safetensors", "--out", "mask.link"], "would overwrite run"),
        (
            ["verify", "--model", "base", "--mask", "run/mask.safetensors", "--out", "base/config.json"],
            "would overwrite",
        ),
        (["set", "--model", "base", "--mask", "run/scores.safetensors", "--out", "new"], "not 'mask'"),
        (["set", "--model", "base", "--mask", "run/mask.safetensors", "--out", "new", "--resume"], "no run to resume"),
        (["set", "--model", "base", "--mask", "other.safetensors", "--out", "new"], "does not fit"),
        (["spa", "--model", "base", "--mask", "run/mask.safetensors", "--data", "no.csv", "--out", "new"], "no.csv"),
        (
            ["spa", "--model", "old/model", "--mask", "run/mask.safetensors", "--data", "benign.jsonl", "--out", "old"],
            "would take the place of --model",
        ),
        ([*SPA, "--rehearsal", "0", "--harmful", "harmful.jsonl"], "leave them out"),
        ([*SPA, "--harmful", "absent.jsonl"], "cannot be read"),
        (["apply", "--model", "base", "absent.safetensors", "--in-place"], "no such file"),
        (["apply", "--model", "base", "run/mask.safetensors", "--out", "run"], "exists already"),
        (["apply", "--model", "base", "run/mask.safetensors", "--out", "new", "--device", "cuda:99"], "--device cuda"),
        (["apply", "--model", "base", "run/mask.safetensors", "--out", "new"], "not 'delta'"),
        (["apply", "--model", "base", "run/mask.safetensors", "--out", "base/sub/new"], "lies inside of --model"),
        (["apply", "--model", "smollm2", "run/mask.safetensors", "--in-place"], "needs a checkpoint folder"),
    ],
)
def test_refusals(folder, arguments, message, capsys):
    Mask.from_indices({"w": [0]}, {"w": (2, 2)}).save("other.safetensors")
    shutil.copytree("base", "old/model")
    (folder / "old" / "scores.safetensors").mkdir()
    (folder / "mixed").mkdir()
    for name in ("scores", "delta"):
        shutil.copy("run/mask.safetensors", f"mixed/{name}.safetensors")
    (folder / "run" / "set.json").write_text(json.dumps(BENIGN))
    (folder / "mask.link").symlink_to("run/mask.safetensors")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "command",
    [["set", *SMALL, "--out", "new"], SPA, ["verify", *SMALL, "--out", "new.json"]],
    ids=lambda given: given[0],
)
def test_a_mask_that_cannot_be_read_is_found_before_long_work(folder, monkeypatch, capsys, command):
    monkeypatch.setattr(options, "load_model", no_model)
    for mask, message in (("absent.safetensors", "no such file"), ("run/scores.safetensors", "not 'mask'")):
        assert main([*command, "--model", "base", "--mask", mask]) == 1
        assert message in capsys.readouterr().err
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("set", "--seed", "-1"),
        ("set", "--batch-size", "5"),
        ("set", "--refusal-weight", "2"),
        ("spa", "--rehearsal", "1"),
        ("spa", "--rehearsal", "nan"),
        ("set", "--seed", "9" * 30),
        ("set", "--lr", "nan"),
        ("spa", "--lr", "0"),
        ("verify", "--seed", "-1"),
        ("verify", "--noise", "-1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(command, option, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([command, "--model", "base", "--mask", "run/mask.safetensors", "--out", "new", option, value])
    assert f"argument {option}: a " in capsys.readouterr().err


def test_what_files_hold_is_seen_and_not_obeyed(folder, capsys):
    write_rows(folder / "odd.jsonl", [{"\x1b[31mtext\u202e": "a"}])
    assert main(["score", "--model", "base", "--pairs", "odd.jsonl", "--out", "new"]) == 1
    printed = capsys.readouterr().err
    assert "\\x1b[31mtext\\u202e" in printed and not {"\x1b", "\u202e"} & set(printed)


@pytest.mark.parametrize("command", ["score", "set", "spa", "verify", "apply"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert "example: " in printed and f"  safekern {command} --model " in printed


class TestModels:
    def test_code_of_its_own_is_not_run(self, folder):
        path = folder / "base" / "config.json"
        config = json.loads(path.read_text())
        config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
        path.write_text(json.dumps(config))
        (folder / "base" / "own.py").write_text("raise SystemExit('this ran')\n")
        with pytest.raises(InvalidArgumentError, match="--trust-remote-code"):
            models.load("base")

    def test_gguf_and_the_demo_model(self, folder, monkeypatch):
        asked = []
        monkeypatch.setattr(models, "_load_gguf", lambda path, dtype: asked.append((path.name, dtype)) or (0, None))
        monkeypatch.setattr(models, "load_smollm2", lambda dtype: asked.append(("smollm2", dtype)) or (0, None))
        (folder / "tiny.GGUF").touch()
        models.load("tiny.GGUF")
        models.load("smollm2", dtype=torch.bfloat16)
        assert asked == [("tiny.GGUF", torch.float32), ("smollm2", torch.bfloat16)]
        shutil.move("tiny.GGUF", "run/tiny.gguf")
        with pytest.raises(FileAccessError, match=r"give one of its GGUF files, such as run.tiny\.gguf"):
            models.load("run")

    def test_no_pickles(self, folder):
        torch.save(tensors(folder / "base"), folder / "base" / "pytorch_model.bin")
        (folder / "base" / "model.safetensors").unlink()
        with pytest.raises(FileAccessError, match="safetensors"):
            models.load("base")

    def test_scales_that_nobody_takes_are_refused(self, folder, capsys):
        weights = tensors(folder / "base")
        weights["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(1)
        save_file(weights, folder / "base" / "model.safetensors", {"format": "pt"})
        assert main(["score", "--model", "base", "--pairs", "harmful.jsonl", "--out", "scaled"]) == 1
        assert "lacks the quantization_config" in capsys.readouterr().err

    def test_names_that_no_file_can_have(self, folder, capsys):
        assert main(["score", "--model", "m" * 5000, "--pairs", "harmful.jsonl", "--out", "long"]) == 1
        assert "check the path" in capsys.readouterr().err

    def test_weights_that_are_missing(self, folder):
        from safetensors.torch import save_file

        rest = tensors(folder / "base")
        del rest["model.layers.0.mlp.up_proj.weight"]
        save_file(rest, folder / "base" / "model.safetensors", {"format": "pt"})
        with pytest.raises(FileFormatError, match=r"lacks model\.layers\.0\.mlp\.up_proj\.weight"):
            models.load("base")

    def test_nothing_touches_the_network_unasked(self, folder, monkeypatch):
        attempts = []

        def refuse(*args, **options):
            attempts.append(args)
            raise OSError("no network in this test")

        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        models.load("base")
        # What the hub's client would have left after a download.
        cached = folder / "cache" / "models--somebody--something"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        shutil.copytree("base", cached / "snapshots" / ("0" * 40))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
        models.load("somebody/something")
        with pytest.raises(FileAccessError, match=r"nobody/nothing.*--download"):
            models.load("nobody/nothing")
        assert not attempts


def test_patched_weights_are_those_of_before():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weight = torch.randn(5_000_000 if dtype == torch.float64 else 1000).to(dtype)
        before, indices = weight.clone(), torch.tensor([0, 7, weight.numel() - 1], dtype=torch.int32)
        weight[indices.long()] = torch.tensor([-0.0, float("nan"), 3.0]).to(dtype)
        patched = Patched("w", weight, indices, before[indices.long()])
        assert fingerprint({"w": patched}) == fingerprint({"w": before}) != fingerprint({"w": weight})
