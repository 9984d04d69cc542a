"""save_delta and apply_delta: a tuned model from its base and the masked weights, bit for bit."""

import copy
import json
import re
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_net import Net, assert_same, random_mask, weights
from torch import nn
from tuned_models import contents, llama_mask, save_folder, tuned

from safekern import (
    DeltaAppliedError,
    DeltaMismatchError,
    FileAccessError,
    FileFormatError,
    InvalidArgumentError,
    Mask,
    MaskMismatchError,
    apply_delta,
    checkpoint,
    files,
    save_delta,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "delta.safetensors"


@pytest.fixture
def case(path):
    """A base model, its mask, the tuned model, and a delta file made with the base."""
    base = Net(torch.bfloat16)
    mask = random_mask(base)
    model = tuned(base, mask)
    save_delta(model, mask, path, base=base)
    return base, mask, model


class TestModels:
    @pytest.mark.parametrize("nested", [False, True])
    def test_a_module_that_an_adapter_trains_whole(self, path, case, nested):
        peft = pytest.importorskip("peft")
        base, _, _ = case
        config = peft.LoraConfig(target_modules=["first"], modules_to_save=["second"])
        adapted = peft.get_peft_model(nn.ModuleDict({"net": base}) if nested else base, config)
        before = weights(adapted)
        with pytest.raises(DeltaMismatchError, match=r"second\.weight' is ambiguous"):
            apply_delta(adapted, path)
        assert_same(weights(adapted), before)

    @pytest.mark.parametrize("with_base", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_round_trip_is_exact(self, path, dtype, with_base):
        base = Net(dtype)
        mask = random_mask(base)
        model = tuned(base, mask)
        before, want = weights(base), weights(model)
        save_delta(model, mask, path, base=base if with_base else None)
        assert_same((weights(base), weights(model)), (before, want))
        apply_delta(base, path)
        assert_same(weights(base), want)

    def test_chunks_of_any_size(self, path, monkeypatch):
        for size in (8, 24, 1 << 10):
            monkeypatch.setattr(checkpoint, "_CHUNK", size)
            base = Net(torch.float64)
            mask = random_mask(base)
            model = tuned(base, mask)
            save_delta(model, mask, path, base=base)
            monkeypatch.undo()
            apply_delta(base, path)
            assert_same(weights(base), weights(model))

    def test_fingerprints_do_not_depend_on_threads_or_layout(self, path, threads):
        base = Net()
        mask = random_mask(base)
        model = tuned(base, mask)
        contents = []
        for count in (1, 3):
            torch.set_num_threads(count)
            save_delta(model, mask, path, base=base)
            contents.append(path.read_bytes())
            model.first.weight.data = model.first.weight.data.t().contiguous().t()
        assert contents[0] == contents[1]

    def test_into_parameters_that_are_not_contiguous(self, case, path):
        base, _, model = case
        base.first.weight.data = base.first.weight.data.t().contiguous().t()
        apply_delta(base, path)
        assert_same(weights(base), weights(model))
        assert not base.first.weight.is_contiguous()

    def test_through_wrappers(self, case, path):
        base, mask, model = case
        plain = copy.deepcopy(base)
        apply_delta(nn.DataParallel(base), path)
        assert_same(weights(base), weights(model))
        save_delta(nn.DataParallel(model), mask, path, base=plain)
        apply_delta(plain, path)
        assert_same(weights(plain), weights(model))

    def test_wrappers_that_make_a_name_ambiguous(self, path):
        base = nn.ParameterDict({"w": torch.randn(3)})
        mask = Mask.from_indices({"w": [1]}, {"w": (3,)})
        save_delta(tuned(base, mask), mask, path)
        both = nn.ModuleDict({"module": copy.deepcopy(base), "base_layer": copy.deepcopy(base)})
        with pytest.raises(DeltaMismatchError, match="ambiguous"):
            apply_delta(both, path)

    def test_what_the_delta_does_not_know_is_left_alone(self, case, path):
        base, _, model = case
        base.adapter = nn.Linear(3, 3)
        base.register_buffer("statistics", torch.ones(3))
        kept = base.adapter.weight.detach().clone()
        apply_delta(base, path)
        got = weights(base)
        assert torch.equal(base.adapter.weight, kept)
        assert_same({name: got[name] for name in weights(model)}, weights(model))

    def test_graphs_from_before_do_not_go_on(self, case, path):
        base = case[0]
        loss = base(torch.randn(4, 13)).float().nansum()
        apply_delta(base, path)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @pytest.mark.parametrize("names", [("a.weight",), ("b.weight",), ("a.weight", "b.weight")])
    def test_tied_weights(self, path, names):
        base = nn.ModuleDict({"a": nn.Embedding(50, 40), "b": nn.Linear(40, 50, bias=False)})
        base["b"].weight = base["a"].weight
        mask = random_mask(base, names=["a.weight"])
        mask = Mask.from_indices(dict.fromkeys(names, mask["a.weight"]), dict.fromkeys(names, (50, 40)))
        model = tuned(base, mask)
        save_delta(model, mask, path, base=base)
        apart = nn.ModuleDict({"a": nn.Embedding(50, 40), "b": nn.Linear(40, 50, bias=False)})
        apart.load_state_dict(base.state_dict())
        head = nn.ModuleDict({"b": copy.deepcopy(apart["b"])})
        for target in (base, apart, head):
            apply_delta(target, path)
            for param in target.parameters():
                assert_same(weights(nn.ParameterDict({"x": param}))["x"], weights(model)["a.weight"])

    def test_bytes_per_changed_weight_at_one_percent(self, path):
        generator = torch.Generator().manual_seed(0)
        model = nn.ParameterDict(
            {f"layers_{n}": torch.randn(2500, 4100, generator=generator).bfloat16() for n in range(10)}
        )
        mask = Mask.from_bool(
            {name: torch.rand(param.shape, generator=generator) < 0.01 for name, param in model.items()}
        )
        assert mask.numel > 1_000_000
        base = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            for name, (param, index) in mask.parameters(model).items():
                assert name in base
                param.view(-1)[index] *= 1.01
        save_delta(model, mask, path, base=base)
        assert path.stat().st_size / mask.numel <= 3.2


class TestRefusals:
    def refuses(self, target, path, error, message):
        before = weights(target)
        with pytest.raises(error, match=message):
            apply_delta(target, path)
        assert_same(weights(target), before)

    @pytest.mark.parametrize("with_base", [False, True])
    def test_a_second_time(self, path, with_base):
        base = Net()
        mask = random_mask(base)
        save_delta(tuned(base, mask), mask, path, base=base if with_base else None)
        apply_delta(base, path)
        self.refuses(base, path, DeltaAppliedError, "applied already")

    @pytest.mark.parametrize("name", ["norm.bias", "first.weight"])
    def test_a_base_that_differs_in_one_bit_outside_the_mask(self, case, path, name):
        base, mask, _ = case
        flat = base.get_parameter(name).data.view(-1)
        outside = next(i for i in range(flat.numel()) if name not in mask or i not in mask[name].tolist())
        flat.view(torch.int16)[outside] ^= 1
        self.refuses(base, path, DeltaMismatchError, rf"outside the mask differ in 1 of 5 parameters: {name}\.")

    def test_a_base_that_differs_in_one_bit_inside_the_mask(self, case, path):
        base, mask, model = case
        base.second.weight.data.view(-1).view(torch.int16)[mask["second.weight"][-1]] ^= 1
        self.refuses(base, path, DeltaMismatchError, r"neither those of the base nor .* 1 parameters: second\.weight")
        # Without the base's values there is nothing to compare with.
        save_delta(model, mask, path)
        apply_delta(base, path)
        assert_same(weights(base), weights(model))

    def test_a_parameter_applied_and_another_not_is_finished(self, case, path):
        base, _, model = case
        base.second.weight.data.copy_(model.second.weight.data)
        apply_delta(base, path)
        assert_same(weights(base), weights(model))

    def test_other_dtypes_and_shapes(self, case, path):
        self.refuses(
            Net(torch.float16), path, DeltaMismatchError, r"first\.weight \(F16 \(37, 13\) instead of BF16 \(37, 13\)"
        )
        wide = case[0]
        wide.norm = nn.LayerNorm(38).bfloat16()
        self.refuses(wide, path, DeltaMismatchError, r"2 of 5 .*: norm\.weight \(BF16 \(38,\) instead of BF16 \(37,\)")

    def test_missing_parameters(self, case, path):
        base = case[0]
        del base.norm
        self.refuses(base, path, DeltaMismatchError, r"2 of 5 parameters are missing \(norm\.weight, norm\.bias\)")

    def test_parameters_that_cannot_be_written(self, case, path):
        base = case[0]
        base.second.weight.data = base.second.weight.data[:1].expand(5, 37)
        self.refuses(base, path, InvalidArgumentError, r"second\.weight has overlapping memory")
        base.second.to("meta")
        with pytest.raises(InvalidArgumentError, match=r"second\.weight is on the meta device"):
            apply_delta(base, path)

    @pytest.mark.parametrize("target", [None, 3, {"w": torch.zeros(2)}])
    def test_what_is_neither_a_model_nor_a_path(self, case, path, target):
        with pytest.raises(InvalidArgumentError, match="a model or the path of a checkpoint is needed"):
            apply_delta(target, path)


class TestSaving:
    def test_a_weight_that_changed_outside_the_mask(self, case, path):
        base, mask, model = case
        content = path.read_bytes()
        model.norm.weight.data[3] = 7
        with pytest.raises(DeltaMismatchError, match=r"outside the mask differ in 1 of 5 parameters: norm\.weight"):
            save_delta(model, mask, path, base=base)
        assert path.read_bytes() == content

    def test_a_base_that_is_the_model_itself(self, case, path):
        _, mask, model = case
        with pytest.raises(InvalidArgumentError, match="nothing to save"):
            save_delta(model, mask, path, base=model)

    def test_a_base_of_another_dtype_or_without_a_parameter(self, case, path):
        base, mask, model = case
        with pytest.raises(DeltaMismatchError, match="another dtype"):
            save_delta(model, mask, path, base=copy.deepcopy(base).float())
        state = base.state_dict()
        del state["first.bias"]
        with pytest.raises(DeltaMismatchError, match=r"missing \(first\.bias\)"):
            save_delta(model, mask, path, base=state)

    def test_a_base_with_different_tied_weights(self, path):
        model = nn.ModuleDict({"a": nn.Embedding(5, 4), "b": nn.Linear(4, 5, bias=False)})
        model["b"].weight = model["a"].weight
        mask = random_mask(model, names=["a.weight"])
        state = {name: value.clone() for name, value in model.state_dict().items()}
        state["a.weight"].view(-1)[mask["a.weight"][0]] += 1
        with pytest.raises(DeltaMismatchError, match=r"different values under the tied names of a\.weight"):
            save_delta(model, mask, path, base=state)

    def test_masks_that_do_not_fit(self, case, path):
        _, _, model = case
        with pytest.raises(MaskMismatchError, match="missing"):
            save_delta(model, Mask.from_indices({"x": [0]}, {"x": (1,)}), path)

    def test_what_is_no_base(self, case, path):
        _, mask, model = case
        with pytest.raises(InvalidArgumentError, match="a model, a state dict or the path"):
            save_delta(model, mask, path, base=3)
        with pytest.raises(FileAccessError, match="no such file"):
            save_delta(model, mask, path, base=path.with_name("nothing"))

    def test_a_path_that_cannot_be_written(self, case, tmp_path):
        _, mask, model = case
        with pytest.raises(FileAccessError, match="does not exist"):
            save_delta(model, mask, tmp_path / "no" / "delta")

    def test_models_on_meta(self, case, path):
        _, mask, model = case
        model.norm.to("meta")
        with pytest.raises(InvalidArgumentError, match=r"norm\.weight is on the meta device"):
            save_delta(model, mask, path)


class TestFile:
    def test_every_truncation_and_a_bit_flip_in_every_byte(self, path):
        base = nn.ParameterDict({"w": torch.ones(3)})
        mask = Mask.from_indices({"w": [1]}, {"w": (3,)})
        save_delta(tuned(base, mask), mask, path, base=base)
        content = path.read_bytes()
        damaged = [content[:length] for length in range(len(content))]
        for position in range(len(content)):
            flipped = bytearray(content)
            flipped[position] ^= 1 << position % 8
            damaged.append(bytes(flipped))
        for wrong in damaged:
            path.write_bytes(wrong)
            with pytest.raises(FileFormatError, match=re.escape(path.name)):
                apply_delta(base, path)
        assert (base["w"] == 1).all()

    def test_other_files(self, path):
        base = Net()
        with pytest.raises(FileAccessError, match="no such file"):
            apply_delta(base, path)
        random_mask(base).save(path)
        with pytest.raises(FileFormatError, match="holds 'mask', not 'delta'"):
            apply_delta(base, path)
        files.write(path, "delta", 2, {}, {})
        with pytest.raises(FileFormatError, match="upgrade"):
            apply_delta(base, path)

    @pytest.mark.parametrize(
        ("edit", "value"),
        [
            ("values:w", None),
            ("values:w", torch.ones(2)),
            ("values:w", torch.ones(1).half()),
            ("values:w", torch.ones(1, dtype=torch.uint8)),
            ("indices:w", None),
            ("indices:w", torch.tensor([9], dtype=torch.uint8)),
            ("values:v", torch.ones(1)),
            ("mask", None),
            ("parameters", None),
            ("parameters", {}),
            ("parameters", []),
            ("rest", 3),
            ("aliases", [3]),
            ("aliases", 3),
            ("shape", [4]),
            ("shape", 3),
            ("code", "F16"),
            ("more", 1),
        ],
    )
    def test_impossible_content_with_a_right_checksum(self, path, edit, value):
        base = nn.ParameterDict({"w": torch.ones(3)})
        mask = Mask.from_indices({"w": [1]}, {"w": (3,)})
        save_delta(tuned(base, mask), mask, path)
        tensors, meta = files.read(path, "delta", 1)
        part = next((d for d in (tensors, meta) if edit in d), tensors if ":" in edit else meta["parameters"]["w"])
        part[edit] = value
        if value is None:
            del part[edit]
        files.write(path, "delta", 1, tensors, meta)
        with pytest.raises(FileFormatError, match="not a valid delta"):
            apply_delta(base, path)


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(tied=True, seed=0):
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=90,
            tie_word_embeddings=tied,
        )
        return LlamaForCausalLM(config).bfloat16()

    return make


class TestFolders:
    @pytest.fixture(params=["shards", "single"])
    def options(self, request):
        return {"max_shard_size": "20KB"} if request.param == "shards" else {}

    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("with_base", [False, True])
    def test_round_trip_is_exact(self, llama, tmp_path, path, options, tied, with_base):
        base = llama(tied)
        mask = llama_mask(base)
        model = tuned(base, mask)
        folder, want = (
            save_folder(base, tmp_path / "base", **options),
            save_folder(model, tmp_path / "tuned", **options),
        )
        assert len(list(folder.glob("*.safetensors"))) > (1 if options else 0)
        save_delta(model, mask, path, base=folder if with_base else None)
        apply_delta(folder, str(path))
        # Every byte, header and metadata included, is what saving the tuned model gives.
        assert contents(folder) == contents(want)
        loaded = type(base).from_pretrained(folder)
        assert_same(weights(loaded), weights(model))

    def test_one_file(self, llama, tmp_path, path):
        base = llama()
        mask = llama_mask(base)
        model = tuned(base, mask)
        file = save_folder(base, tmp_path / "base") / "model.safetensors"
        file.chmod(0o640)
        save_delta(model, mask, path, base=file)
        apply_delta(file, path)
        assert file.read_bytes() == (save_folder(model, tmp_path / "tuned") / "model.safetensors").read_bytes()
        assert stat.S_IMODE(file.stat().st_mode) == 0o640

    def test_names_without_and_with_a_prefix(self, llama, tmp_path, path, options):
        whole = llama()
        mask = llama_mask(whole)
        model = tuned(whole, mask)
        save_delta(model, mask, path, base=whole)
        inner = save_folder(whole.model, tmp_path / "inner", **options)
        apply_delta(inner, path)
        assert contents(inner) == contents(save_folder(model.model, tmp_path / "inner_tuned", **options))

        short = Mask.from_indices(
            {name.removeprefix("model."): mask[name] for name in mask},
            {name.removeprefix("model."): shape for name, shape in mask.shapes.items()},
        )
        outer = save_folder(whole, tmp_path / "outer", **options)
        save_delta(model.model, short, path, base=outer)
        apply_delta(outer, path)
        assert contents(outer) == contents(save_folder(model, tmp_path / "outer_tuned", **options))

    def test_a_tied_weight_that_is_stored_twice_changes_twice(self, tmp_path, path):
        from safetensors.torch import load_file, save_file

        model = nn.ModuleDict({"a": nn.Embedding(5, 4), "b": nn.Linear(4, 5, bias=False)})
        model["b"].weight = model["a"].weight
        mask = random_mask(model, names=["a.weight"])
        changed = tuned(model, mask)
        file = tmp_path / "model.safetensors"
        save_file({name: value.clone() for name, value in model.state_dict().items()}, file)
        save_delta(changed, mask, path, base=tmp_path)
        apply_delta(tmp_path, path)
        for value in load_file(file).values():
            assert torch.equal(value.view(torch.int32), changed["a"].weight.detach().view(torch.int32))

    @pytest.fixture
    def saved(self, llama, tmp_path, path):
        """A sharded folder of a base model, a delta made with it, and what the folder is to become."""
        base = llama(tied=False)
        mask = llama_mask(base)
        model = tuned(base, mask)
        folder = save_folder(base, tmp_path / "base", max_shard_size="10KB")
        save_delta(model, mask, path, base=folder)
        return folder, contents(save_folder(model, tmp_path / "tuned", max_shard_size="10KB"))

    def refuses(self, folder, path, error, message):
        before = contents(folder)
        with pytest.raises(error, match=message):
            apply_delta(folder, path)
        assert contents(folder) == before

    def test_a_second_time(self, saved, path):
        apply_delta(saved[0], path)
        self.refuses(saved[0], path, DeltaAppliedError, "applied already")

    def test_another_model(self, llama, tmp_path, saved, path):
        self.refuses(
            save_folder(llama(False, seed=1), tmp_path / "other"), path, DeltaMismatchError, "outside the mask differ"
        )
        self.refuses(save_folder(llama(False).half(), tmp_path / "half"), path, DeltaMismatchError, "another dtype")
        self.refuses(
            save_folder(llama(True), tmp_path / "tied"), path, DeltaMismatchError, r"missing \(lm_head\.weight\)"
        )

    def test_names_that_could_be_several(self, tmp_path, path):
        from safetensors.torch import load_file, save_file

        base = nn.ParameterDict({"w": torch.randn(3)})
        mask = Mask.from_indices({"w": [1]}, {"w": (3,)})
        save_delta(tuned(base, mask), mask, path)
        stored = {prefix + "w": base["w"].detach().clone() for prefix in ("x.", "y.")}
        save_file(stored, tmp_path / "model.safetensors")
        with pytest.raises(DeltaMismatchError, match=r"missing \(w\), or could be several"):
            apply_delta(tmp_path, path)
        # An exact name goes before others.
        save_file(stored | {"w": base["w"].detach().clone()}, tmp_path / "model.safetensors")
        apply_delta(tmp_path, path)
        assert torch.equal(load_file(tmp_path / "model.safetensors")["x.w"], base["w"])

    @pytest.mark.parametrize("failing", [0, 1, 3])
    def test_a_failure_while_writing_changes_nothing(self, saved, path, monkeypatch, failing):
        calls = []

        def failing_sync(_):
            calls.append(1)
            if len(calls) > failing:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", failing_sync)
        self.refuses(saved[0], path, FileAccessError, "cannot be written: No space left")

    @pytest.mark.parametrize("done", [1, 2, 5])
    def test_after_an_interruption_between_renames_a_second_run_finishes(self, saved, path, monkeypatch, done):
        folder, want = saved
        before, calls = contents(folder), []
        replace = type(folder).replace

        def interrupted(self, target):
            calls.append(1)
            if len(calls) > done:
                raise KeyboardInterrupt
            return replace(self, target)

        monkeypatch.setattr(type(folder), "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            apply_delta(folder, path)
        monkeypatch.undo()
        mixed = contents(folder)
        assert mixed.keys() == before.keys()
        assert sum(mixed[name] != before[name] for name in mixed) == done
        # A killed process leaves such files.
        (folder / ".safekern-0123456789abcdef.tmp").write_bytes(b"half of a shard")
        apply_delta(folder, path)
        (folder / ".safekern-0123456789abcdef.tmp").unlink()
        assert contents(folder) == want

    def test_a_mix_with_foreign_weights_is_reported(self, saved, path):
        folder = saved[0]
        shard = sorted(folder.glob("*.safetensors"))[1]
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        self.refuses(folder, path, DeltaMismatchError, "differ in 1 of|in 1 parameters")

    def test_links_into_a_cache_are_refused(self, saved, tmp_path, path):
        folder, want = saved
        linked = tmp_path / "snapshot"
        linked.mkdir()
        for file in folder.iterdir():
            (linked / file.name).symlink_to(file)
        self.refuses(linked, path, FileAccessError, "symbolic link")
        (tmp_path / "link").symlink_to(folder)
        apply_delta(tmp_path / "link", path)
        assert contents(folder) == want

    @pytest.mark.parametrize(
        ("damage", "error", "message"),
        [
            (lambda content: content[:-1], FileFormatError, "bytes of data where its header says"),
            (lambda content: content + b"x", FileFormatError, "bytes of data where its header says"),
            (lambda content: b"", FileFormatError, "truncated or not a safetensors file"),
            (lambda content: b"PK\3\4 not a tensor in here", FileFormatError, "truncated or not a safetensors file"),
            (lambda content: content.replace(b'"BF16"', b'"BF61"', 1), DeltaMismatchError, "BF61 .* instead of BF16"),
            (lambda content: content.replace(b'"BF16"', b'"F32"  ', 1), FileFormatError, "does not fit its shape"),
            (None, FileAccessError, "no such file"),
        ],
    )
    def test_damaged_shards(self, saved, path, damage, error, message):
        folder = saved[0]
        shard = sorted(folder.glob("*.safetensors"))[2]
        content = shard.read_bytes()
        shard.unlink()
        if damage:
            shard.write_bytes(damage(content))
        self.refuses(folder, path, error, message)

    @pytest.mark.parametrize(
        "index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"w": 3}}', '{"weight_map": {"w": "../x"}}']
    )
    def test_damaged_indices(self, saved, path, index):
        (saved[0] / "model.safetensors.index.json").write_text(index)
        self.refuses(saved[0], path, FileFormatError, "does not say which file")

    def test_folders_that_hold_no_checkpoint_or_two(self, saved, tmp_path, path):
        folder = saved[0]
        shutil.copy(sorted(folder.glob("*.safetensors"))[0], folder / "model.safetensors")
        self.refuses(folder, path, FileFormatError, "holds both")
        (folder / "model.safetensors").unlink()
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        shutil.copy(sorted(folder.glob("*.safetensors"))[0], folder / "again.safetensors")
        index["weight_map"]["more"] = "again.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        self.refuses(folder, path, FileFormatError, "is in both")
        (tmp_path / "nothing").mkdir()
        self.refuses(tmp_path / "nothing", path, FileAccessError, "save_pretrained")

    def test_a_read_only_shard_is_found_before_the_work(self, saved, path, monkeypatch):
        def unwritable(shard):
            raise FileAccessError(f"{shard}: the file is read-only")

        monkeypatch.setattr(files, "check_writable", unwritable)
        monkeypatch.setattr(checkpoint.OnDisk, "chunks", lambda self: pytest.fail("read before it was checked"))
        self.refuses(saved[0], path, FileAccessError, "read-only")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.complex64, torch.int8, torch.bool])
def test_a_checkpoint_may_hold_other_dtypes_outside_the_mask(tmp_path, path, dtype):
    base, model = (nn.ParameterDict({"w": torch.zeros(3, 3)}) for _ in range(2))
    for each in (base, model):
        each["other"] = nn.Parameter(torch.ones(4).to(dtype), requires_grad=False)
    with torch.no_grad():
        model["w"][0, 0] = 1
    save_delta(model, Mask.from_indices({"w": [0]}, {"w": (3, 3)}), path, base=base)
    save_file({name: param.detach() for name, param in base.items()}, tmp_path / "base.safetensors")
    apply_delta(tmp_path / "base.safetensors", path)
    assert torch.equal(load_file(tmp_path / "base.safetensors")["w"], model["w"])
