"""Every kind of file that safekern reads, damaged in every way: a SafekernError or, where it still fits, the content.

The kinds are listed once, so that every fault below is tried on each of them.
"""

import contextlib
import copy
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from file_kinds import (
    KINDS,
    at_most,
    top_scores,
    use,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from safekern import Mask, SafekernError, Scores, apply_delta, files
from safekern.cli import main


@contextlib.contextmanager
def little_memory(extra=256 << 20):
    """The process may grow by that much: what a small file asks for beyond is refused by the system."""
    resource = pytest.importorskip("resource")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "fuzzed.safetensors"


@pytest.fixture
def full(request):
    return request.config.getoption("--full")


@dataclass
class Parts:
    """A safekern file taken apart, to be put together with a right checksum."""

    kind: str
    version: int
    tensors: dict
    meta: dict

    @classmethod
    def of(cls, path):
        with files.reading(path) as file:
            _, stored = files.read_header(file, path)
        kind, version = stored["safekern.kind"], int(stored["safekern.version"])
        return cls(kind, version, *files.read(path, kind, version))

    def write(self, path):
        files.write(path, self.kind, self.version, self.tensors, self.meta)


def assert_refused(kind, path):
    with pytest.raises(SafekernError) as caught, at_most(10):
        use(kind, path)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_intact_file_is_used(kind, path):
    write(kind, path)
    use(kind, path)


@pytest.mark.parametrize("kind", KINDS)
def test_truncation(kind, path, full):
    write(kind, path)
    content = path.read_bytes()
    # In the header, every byte is as good as its neighbour.
    for length in {*range(0, len(content), 1 if full else 7), *range(12), *range(len(content) - 60, len(content))}:
        path.write_bytes(content[:length])
        assert path.name in assert_refused(kind, path)


@pytest.mark.parametrize("kind", KINDS)
def test_bit_flips(kind, path, full):
    write(kind, path)
    content = path.read_bytes()
    # Each bit in its turn, from byte to byte; 3 is prime to 8.
    for bit in range(0, 8 * len(content), 1 if full else 8 * 3 + 1):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        if kind != "checkpoint":
            assert path.name in assert_refused(kind, path)
            continue
        # A checkpoint has no checksum, but the delta knows the weights. Other metadata is none of its business.
        with contextlib.suppress(SafekernError), at_most(10):
            use(kind, path)


ODD = (None, True, -1, 0, 2**63, 2**70, 1e300, 0.5, "", "x", "1", [], [None], [-1], [2**62, 2**62], {}, {"x": 1})


def replaced(value):
    """Copies of a description in which one value, somewhere inside, is another or gone."""
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys:
            without = copy.deepcopy(value)
            del without[key]
            yield without
            for other in (*ODD, *replaced(value[key])):
                changed = copy.deepcopy(value)
                changed[key] = other
                yield changed


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_descriptions_of_other_types_with_a_right_checksum(kind, path):
    write(kind, path)
    parts = Parts.of(path)
    refused = total = 0
    for meta in replaced(parts.meta):
        Parts(parts.kind, parts.version, parts.tensors, meta).write(path)
        total += 1
        try:
            with little_memory(), at_most(10):
                use(kind, path)
        except SafekernError:
            refused += 1
    # Another note or count is no damage; shapes, names and types are.
    assert refused > total // 3


@pytest.mark.parametrize("kind", KINDS)
def test_headers_that_lie(kind, path):
    write(kind, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    first = next(name for name in header if name != "__metadata__")
    lies = [{**header, first: entry} for entry in (None, [], {"dtype": "F32"})]
    for field in ("dtype", "shape", "data_offsets"):
        lies += [{**header, first: {**header[first], field: odd}} for odd in (*ODD, [2**60], [0, 2**60], [2**62, 4])]
    lies += [{**header, "__metadata__": odd} for odd in ODD if odd != {}]
    lies += [{name: entry for name, entry in header.items() if name != first}, {}, {"__metadata__": {}}]
    for lie in lies:
        text = json.dumps(lie).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        # What a checkpoint's metadata says is none of our business.
        if lie == header or (lie.get(first) == header[first] and kind == "checkpoint"):
            continue
        with little_memory():
            assert_refused(kind, path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2**20, 2**40, 2**60, 2**63, 2**64 - 1])
def test_sizes_beyond_the_file(kind, size, path):
    write(kind, path)
    content = path.read_bytes()
    path.write_bytes(size.to_bytes(8, "little") + content[8:])
    with little_memory():
        assert_refused(kind, path)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_bounded_by_the_file(kind, path):
    write(kind, path)
    text = b'{"x":' + b"[" * 500_000 + b"1" + b"]" * 500_000 + b"}"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with little_memory(64 << 20):
        assert_refused(kind, path)
    text = json.dumps({f"{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with little_memory(64 << 20):
        assert_refused(kind, path)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_such_file(kind, path, tmp_path):
    others = {"empty": b"", "text": b"hello\n" * 50, "zeros": bytes(1000), "pickle": b"\x80\x05}q\x00." * 20}
    for content in others.values():
        path.write_bytes(content)
        assert_refused(kind, path)
    for other in KINDS:
        # All kinds of scores are read alike, and to a checkpoint any tensors will do.
        if other.split()[-1] != kind.split()[-1] and kind != "checkpoint":
            write(other, path)
            assert_refused(kind, path)
    torch.save({"w": torch.zeros(2)}, path)
    assert_refused(kind, path)
    safetensors.torch.save_file({"x": torch.ones(2)}, path, metadata={"format": "pt"})
    assert_refused(kind, path)
    path.unlink()
    assert_refused(kind, path)
    path.mkdir()
    assert_refused(kind, path)
    path.rmdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(path)
        assert_refused(kind, path)
        path.unlink()
        path.symlink_to(path)
        assert_refused(kind, path)
    assert_refused(kind, path.with_name("nul\0byte"))


class TestCodes:
    """Indices as numbers of any origin, with a right checksum."""

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(
        codes=st.lists(st.one_of(st.integers(0, 4), st.sampled_from([254, 255, 65534, 65535])), max_size=12),
        dtype=st.sampled_from(["uint8", "uint16", "int16", "float32"]),
        numel=st.sampled_from([0, 1, 5, 300, 70_000, 2**31 - 1, 2**31, 2**62]),
    )
    def test_masks(self, codes, dtype, numel, tmp_path_factory):
        path = tmp_path_factory.mktemp("codes") / "mask"
        codes = torch.from_numpy(np.array(codes).astype(dtype, casting="unsafe"))
        description = {"shapes": {"w": [numel]}, "model_numel": numel, "meta": {}}
        files.write(path, "mask", 2, {"w": codes}, description)
        try:
            with little_memory():
                mask = Mask.load(path)
        except SafekernError:
            return
        indices = mask["w"]
        assert indices.numel() and indices[0] >= 0 and indices[-1] < numel and (indices.diff() > 0).all()
        assert Mask.from_indices({"w": indices}, {"w": (numel,)}) == mask

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(
        index=st.lists(st.sampled_from([-(2**31), -1, 0, 1, 2, 11, 12, 2**31 - 1]), max_size=6),
        dtype=st.sampled_from([torch.int16, torch.int32, torch.int64, torch.float32]),
    )
    def test_candidates(self, index, dtype, tmp_path_factory):
        path = tmp_path_factory.mktemp("codes") / "scores"
        top_scores().save(path)
        parts = Parts.of(path)
        parts.tensors["index.w"] = torch.tensor(index, dtype=torch.int64).to(dtype)
        parts.tensors["gradient.w"] = torch.ones(len(index))
        parts.tensors["index.v"] = torch.arange(6 - len(index), dtype=torch.int32)
        parts.tensors["gradient.v"] = torch.ones(6 - len(index))
        parts.write(path)
        fits = dtype in (torch.int32, torch.int64) and len(index) >= 1 and index == sorted(set(index))
        fits = fits and all(0 <= position < 12 for position in index)
        try:
            loaded = Scores.load(path)
        except SafekernError:
            assert not fits
            return
        assert fits
        assert set(loaded.top(0.3).get("w", torch.empty(0)).tolist()) <= set(index)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers.0.mlp.experts.up_proj", [2**27, 1, 1]),
        ("layers.0.mlp.experts.99999999999.w1.weight", [2, 1]),
        ("layers.99999999999.mlp.up_proj.weight", [2, 1]),
        (f"layers.{'9' * 5000}.mlp.up_proj.weight", [2, 1]),
        ("layers.0.mlp.up_proj.weight", [2**62]),
        ("x" * 100_000, [3]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_made_up_names_and_shapes_take_no_memory_in_reports(name, shape, path, capsys):
    pytest.importorskip("matplotlib")
    files.write(
        path,
        "mask",
        2,
        {name: torch.ones(1, dtype=torch.uint8)},
        {"shapes": {name: shape}, "model_numel": 2**62, "meta": {}},
    )
    for command in (["report", str(path), "--html", f"{path}.html"], ["diff", str(path), str(path)]):
        with little_memory(), at_most(20):
            status = main(command)
        assert status == 0 or (status == 1 and "no model has more than" in capsys.readouterr().err)


def test_an_index_of_shards_that_lies(path, tmp_path):
    write("delta", path)
    folder = tmp_path / "folder"
    folder.mkdir()
    write("checkpoint", folder / "model-00001-of-00001.safetensors")
    index = folder / "model.safetensors.index.json"
    good = {"metadata": {}, "weight_map": dict.fromkeys(("w", "b"), "model-00001-of-00001.safetensors")}
    names = ["../secret", "/etc/passwd", "", ".", "..", "a/b", "model.safetensors.index.json", "nul\0", "absent"]
    lies = [*replaced(good), *({**good, "weight_map": {"w": name}} for name in names)]
    for lie in lies:
        index.write_text(json.dumps(lie))
        with contextlib.suppress(SafekernError), at_most(10):
            apply_delta(folder, path)
            # That it was applied is no error where what was left says enough.
            write("checkpoint", folder / "model-00001-of-00001.safetensors")
    index.write_text("[" * 100_000)
    with pytest.raises(SafekernError):
        apply_delta(folder, path)
    assert sorted(file.name for file in folder.iterdir()) == [
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ]


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and alarms as Linux has them")
