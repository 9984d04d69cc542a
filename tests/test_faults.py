"""What the machine does to a run: full disks, odd paths, dying loader workers, no memory."""

import contextlib
import errno
import importlib.util
import json
import os
import stat
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from file_kinds import KINDS, at_most, mask_of_base, use, write
from language_models import byte_tokenizer, tiny_llama
from scored_models import assert_untouched, model_loss, snapshot, token_batches, used_model
from stops import at_backward, raising
from torch import nn
from tuned_models import contents, llama_mask, tuned

from safekern import (
    FileAccessError,
    InvalidArgumentError,
    Mask,
    OutOfMemoryError,
    SafekernError,
    SETAdamW,
    apply_delta,
    files,
    models,
    save_delta,
    score,
)
from safekern.cli import options
from safekern.prompts import Pairs
from safekern.training import balanced, tune

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits, links and permissions as Linux has them")

WRITERS = (*KINDS[:-1], "report", *(["heat map"] if importlib.util.find_spec("matplotlib") else []))


def write_anything(kind, path):
    if kind == "report":
        options.write_json(path, {"losses": [0.5] * 100})
    elif kind == "heat map":
        mask_of_base().plot(path)
    else:
        write(kind, path)


@contextlib.contextmanager
def full_disk(room):
    """No file may grow beyond so many bytes."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestFullDisk:
    @pytest.mark.parametrize("existing", [True, False])
    @pytest.mark.parametrize("kind", WRITERS)
    def test_old_content_stays_and_nothing_else(self, kind, existing, tmp_path):
        path = tmp_path / "file.png"
        write_anything(kind, path)
        size = path.stat().st_size
        path.unlink()
        if existing:
            path.write_bytes(b"old content")
        before = everything(tmp_path)
        for room in {0, 1, size // 2, size - 1}:
            with full_disk(room), pytest.raises(FileAccessError, match=r"file\.png.*cannot be written"):
                write_anything(kind, path)
            assert everything(tmp_path) == before
        with full_disk(size):
            write_anything(kind, path)

    def test_a_delta_over_shards_of_which_the_largest_does_not_fit(self, tmp_path):
        base = tiny_llama().bfloat16()
        mask = llama_mask(base)
        model = tuned(base, mask)
        base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
        model.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
        folder, delta = tmp_path / "base", tmp_path / "delta"
        save_delta(model, mask, delta, base=folder)
        before, sizes = contents(folder), sorted(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert sizes[0] < sizes[-1]
        for room in (0, sizes[0], sizes[-1] - 1):
            with full_disk(room), pytest.raises(FileAccessError, match="cannot be written"):
                apply_delta(folder, delta)
            assert contents(folder) == before
        with full_disk(sizes[-1]):
            apply_delta(folder, delta)
        assert contents(folder) == contents(tmp_path / "tuned")

    def test_a_model(self, tmp_path):
        model, tokenizer = tiny_llama(), byte_tokenizer()
        folder = tmp_path / "model"
        models.save(model, tokenizer, folder)
        before = everything(tmp_path)
        largest = max(len(content) for content in before.values())
        for room in (0, 100, largest - 1):
            with full_disk(room), pytest.raises(FileAccessError, match="model: cannot be written"):
                models.save(model, tokenizer, folder)
            assert everything(tmp_path) == before
        with full_disk(largest):
            models.save(model, tokenizer, folder)
        assert everything(tmp_path) == before


class TestPaths:
    @pytest.mark.parametrize("kind", WRITERS)
    @pytest.mark.parametrize(
        "name", ["ü ñ.png", "two\nlines.png", "-rf.png", "%s{x}.png", "'\".png", "x" * 240 + ".png"]
    )
    def test_odd_names(self, kind, name, tmp_path):
        write_anything(kind, tmp_path / name)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        if kind in KINDS:
            use(kind, tmp_path / name)

    @pytest.mark.parametrize("kind", WRITERS)
    def test_links_are_followed_and_permissions_kept(self, kind, tmp_path):
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        target, link, chain = elsewhere / "target.png", tmp_path / "link.png", tmp_path / "chain.png"
        link.symlink_to(Path("elsewhere") / "target.png")
        chain.symlink_to("link.png")
        # Dangling at first.
        write_anything(kind, chain)
        first = target.read_bytes()
        target.write_bytes(b"old")
        target.chmod(0o640)
        write_anything(kind, chain)
        assert target.read_bytes() == first or kind == "heat map"
        assert stat.S_IMODE(target.stat().st_mode) == 0o640
        assert chain.is_symlink() and link.is_symlink()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["chain.png", "elsewhere", "link.png"]
        assert list(elsewhere.iterdir()) == [target]

    @pytest.mark.parametrize("kind", WRITERS)
    def test_links_to_what_cannot_be_written(self, kind, tmp_path):
        for name, target in {"loop": "loop", "nowhere": "absent/file", "folder": ".", "device": "/dev/null"}.items():
            link = tmp_path / name
            link.symlink_to(target)
            with pytest.raises(FileAccessError, match=name):
                write_anything(kind, link)
            assert link.is_symlink()
        assert len(list(tmp_path.iterdir())) == 4

    @pytest.mark.parametrize("kind", WRITERS)
    def test_a_folder_that_may_not_be_written(self, kind, tmp_path, monkeypatch):
        # As root, whom no permission stops: the system's refusal, where a file is created.
        def refuse(path, *args, **kwargs):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        path = tmp_path / "file.png"
        path.write_bytes(b"old")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", refuse)
            patch.setattr(Path, "touch", refuse)
            with pytest.raises(FileAccessError, match="Permission denied"):
                write_anything(kind, path)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_several_writers_at_once(self, tmp_path):
        path = tmp_path / "mask"
        masks = [Mask.from_indices({"w": list(range(n))}, {"w": (5000,)}) for n in (10, 1000, 5000)]
        masks[0].save(path)
        stop = time.monotonic() + 1.0
        failures = []

        def keep_writing(mask):
            try:
                while time.monotonic() < stop:
                    mask.save(path)
            except BaseException as error:
                failures.append(error)

        writers = [threading.Thread(target=keep_writing, args=(mask,)) for mask in masks]
        for writer in writers:
            writer.start()
        reads = 0
        while any(writer.is_alive() for writer in writers):
            assert Mask.load(path).numel in (10, 1000, 5000)
            reads += 1
        assert not failures and reads > 3
        assert list(tmp_path.iterdir()) == [path]


class TestLeftovers:
    def leave(self, folder, age=100.0):
        path = folder / ".safekern-0123456789abcdef.tmp"
        path.write_bytes(b"half of a shard")
        os.utime(path, (time.time() - age,) * 2)
        return path

    def test_the_next_write_removes_them(self, tmp_path):
        left = self.leave(tmp_path)
        mask_of_base().save(tmp_path / "mask")
        assert not left.exists()

    def test_what_may_be_in_use_stays(self, tmp_path):
        others = [tmp_path / name for name in (".safekern-x.tmp", "safekern-0123456789abcdef.tmp", ".other.tmp")]
        for other in others:
            other.touch()
            os.utime(other, (0, 0))
        link = tmp_path / ".safekern-aaaaaaaaaaaaaaaa.tmp"
        link.symlink_to(others[0])
        fresh = self.leave(tmp_path, age=0.0)
        with files.replacing(tmp_path / "slow") as file:
            # In the middle of a long write, seen by another.
            os.utime(file.name, (0, 0))
            mask_of_base().save(tmp_path / "mask")
            assert Path(file.name).exists()
        assert (tmp_path / "slow").exists() and fresh.exists() and link.is_symlink()
        assert all(other.exists() for other in others)


class Broken(torch.utils.data.Dataset):
    """Its worker dies while it makes the third batch."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 2:
            os._exit(3)
        return token_batches()[0]["input_ids"][0]


class TestLoaderWorkers:
    @pytest.mark.parametrize("memory", [None, 3000])
    def test_one_that_dies(self, memory):
        model = used_model()
        before = snapshot(model)
        loader = torch.utils.data.DataLoader(
            Broken(), batch_size=1, num_workers=1, multiprocessing_context="fork", prefetch_factor=1
        )
        objective = lambda model, ids: model_loss(model, {"input_ids": ids, "labels": ids})  # noqa: E731
        with pytest.raises(RuntimeError, match="exited unexpectedly"), at_most(30):
            score(model, loader, objective, memory=memory)
        assert_untouched(model, before)


def hungry():
    """Wants more memory than any machine has."""
    torch.empty(2**55, dtype=torch.uint8)


ERRORS = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "pinned": RuntimeError("CUDA error: out of memory"),
    "kernel": RuntimeError("std::bad_alloc"),
    "python": MemoryError(),
}
FAULTS = {"allocator": hungry, **{kind: raising(error) for kind, error in ERRORS.items()}}


class TestOutOfMemory:
    @pytest.mark.parametrize("kind", FAULTS)
    def test_in_backward_of_score(self, kind):
        model = used_model()
        before = snapshot(model)

        def objective(model, batch):
            return at_backward(model_loss(model, batch), FAULTS[kind])

        with pytest.raises(OutOfMemoryError) as caught:
            score(model, token_batches(), objective)
        message = str(caught.value)
        for text in ("out of memory", "for the model", "for the accumulators of", "for the largest gradient"):
            assert text in message
        for remedy in ("smaller batches", "memory=", "offload=True", "checkpointing"):
            assert remedy in message
        # Whoever waits for torch's error to try smaller batches gets it.
        assert isinstance(caught.value, torch.OutOfMemoryError) and isinstance(caught.value, SafekernError)
        assert type(caught.value.__cause__) in (RuntimeError, torch.OutOfMemoryError, MemoryError)
        assert_untouched(model, before)

    def test_the_sizes_are_those_of_the_model(self):
        model = nn.Sequential(nn.Linear(1000, 500, bias=False), nn.Linear(500, 10, bias=False)).bfloat16()

        def objective(model, batch):
            return at_backward(model(batch.bfloat16()).sum(), hungry)

        message = (
            "1.01 MB for the model, 2.02 MB for the accumulators of 2 parameters, 1.00 MB for the largest gradient"
        )
        with pytest.raises(OutOfMemoryError, match=message):
            score(model, [torch.randn(2, 1000)], objective)

    def test_where_the_accumulators_do_not_fit(self, monkeypatch):
        model = used_model()
        before = snapshot(model)
        zeros = torch.zeros

        def full(*args, **kwargs):
            if kwargs.get("dtype") == torch.float32:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return zeros(*args, **kwargs)

        monkeypatch.setattr(torch, "zeros", full)
        with pytest.raises(OutOfMemoryError, match="offload=True"):
            score(model, token_batches(), model_loss)
        assert_untouched(model, before)

    def test_other_errors_are_what_they_are(self):
        def objective(model, batch):
            return at_backward(model_loss(model, batch), raising(RuntimeError("shapes do not fit")))

        with pytest.raises(RuntimeError, match="shapes do not fit") as caught:
            score(used_model(), token_batches(), objective)
        assert type(caught.value) is RuntimeError

    def test_in_a_training_step(self, monkeypatch):
        model, tokenizer = tiny_llama(), byte_tokenizer()
        mask = llama_mask(model)
        optimizer = SETAdamW(model.named_parameters(), mask, in_backward=True)
        before = snapshot(model)["contents"]
        monkeypatch.setattr(
            "safekern.training.refusal", lambda model, batch: at_backward(model(**batch).loss, FAULTS["GPU"])
        )
        pairs = Pairs(["Bad?"], ["No."], [""])
        parts = balanced(tokenizer, pairs, pairs, batch_size=2)
        with pytest.raises(OutOfMemoryError, match=r"for the model, .* for the optimizer's state, .*smaller batches"):
            tune(model, optimizer, parts, 2)
        assert all(torch.equal(a, b) for a, b in zip(snapshot(model)["contents"], before, strict=True))


def test_meta_that_cannot_be_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "mask"
    mask_of_base().save(path)
    before = path.read_bytes()
    for meta in ({"x": float("inf")}, {"x": json}, {1: {2: {(3,): 4}}}):
        with pytest.raises(InvalidArgumentError):
            Mask.from_indices({"w": [0]}, {"w": (2,)}, meta=meta).save(path)
    assert path.read_bytes() == before
