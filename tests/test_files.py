import json
import os
import stat
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch
from exact import same_bits

from safekern import files
from safekern.errors import FileAccessError, FileFormatError, InvalidArgumentError

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
]
SHAPES = [(), (0,), (3, 0, 2), (1,), (7,), (2, 3), (2, 1, 5)]


def random_tensors():
    torch.manual_seed(0)
    tensors = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            raw = torch.randint(0, 256, (torch.Size(shape).numel() * dtype.itemsize,), dtype=torch.uint8)
            raw = raw % 2 if dtype == torch.bool else raw
            tensors[f"{dtype}{shape}"] = raw.view(dtype).reshape(shape)
    return tensors


@pytest.fixture
def path(tmp_path):
    return tmp_path / "example.safetensors"


@pytest.fixture
def small(path):
    """A small file of two tensors, and its bytes."""
    tensors = {"a": torch.tensor([1, 2], dtype=torch.int16), "b": torch.tensor(0.5)}
    files.write(path, "example", 1, tensors, {"note": [1, 2.5, None, True, "x"]})
    return path, path.read_bytes()


def craft(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def assert_refused(path, match=None, kind="example", max_version=1):
    with pytest.raises(FileFormatError, match=match) as caught:
        files.read(path, kind, max_version)
    assert path.name in str(caught.value)


class TestRoundTrip:
    def test_every_dtype_and_shape(self, path):
        tensors = random_tensors()
        meta = {"text": "ü\n\"'\\", "number": 1e-7, "nested": {"list": [1, None, False]}}
        files.write(path, "example", 3, tensors, meta)
        read, read_meta = files.read(path, "example", 3)
        assert read.keys() == tensors.keys()
        assert all(same_bits(read[name], tensors[name]) for name in tensors)
        assert read_meta == meta

    def test_no_tensors_and_no_meta(self, path):
        files.write(path, "example", 1, {}, {})
        assert files.read(path, "example", 1) == ({}, {})

    def test_non_contiguous_and_requires_grad(self, path):
        weight = torch.nn.Parameter(torch.randn(4, 6))
        files.write(path, "example", 1, {"transposed": weight.t(), "strided": weight[:, ::2]}, {})
        read, _ = files.read(path, "example", 1)
        assert torch.equal(read["transposed"], weight.detach().t())
        assert torch.equal(read["strided"], weight.detach()[:, ::2])

    def test_the_safetensors_package_reads_it(self, path):
        tensors = random_tensors()
        files.write(path, "example", 1, tensors, {})
        read = safetensors.torch.load_file(path)
        assert read.keys() == tensors.keys()
        assert all(same_bits(read[name], tensors[name]) for name in tensors)

    def test_same_content_gives_the_same_bytes(self, small, tmp_path):
        path, content = small
        tensors, meta = files.read(path, "example", 1)
        other = tmp_path / "other.safetensors"
        files.write(other, "example", 1, dict(reversed(tensors.items())), meta)
        assert other.read_bytes() == content

    def test_odd_names(self, path):
        tensors = {"": torch.zeros(1), "ü.ñ": torch.ones(1), 'a"b\\': torch.ones(2), "x\n": torch.ones(3)}
        files.write(path, "example", 1, tensors, {})
        assert files.read(path, "example", 1)[0].keys() == tensors.keys()

    def test_tensors_read_outlive_the_file(self, small):
        path, _ = small
        tensors, _ = files.read(path, "example", 1)
        path.write_bytes(b"")
        tensors["a"].add_(1)
        assert tensors["a"].tolist() == [2, 3]

    def test_every_tensor_is_aligned(self, path):
        tensors = {"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(1), "c": torch.zeros(1).double()}
        files.write(path, "example", 1, tensors, {})
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        assert length % 8 == 0
        header = json.loads(content[8 : 8 + length])
        assert all(header[name]["data_offsets"][0] % tensor.itemsize == 0 for name, tensor in tensors.items())

    def test_neither_way_holds_a_second_copy(self, path):
        # torch's own memory is not traced; bytes objects and numpy arrays would be.
        tensors = {"x": torch.zeros(1 << 22), "y": torch.zeros(1 << 20, dtype=torch.bfloat16)}
        tracemalloc.start()
        try:
            files.write(path, "example", 1, tensors, {})
            files.read(path, "example", 1)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


class TestDamage:
    def test_every_truncation(self, small):
        path, content = small
        for length in range(len(content)):
            path.write_bytes(content[:length])
            assert_refused(path)

    def test_every_bit_flip(self, small):
        path, content = small
        with path.open("r+b", buffering=0) as file:
            for position, byte in enumerate(content):
                for bit in range(8):
                    file.seek(position)
                    file.write(bytes([byte ^ 1 << bit]))
                    assert_refused(path)
                file.seek(position)
                file.write(bytes([byte]))
        files.read(path, "example", 1)

    @pytest.mark.parametrize("extra", [b"\0", b" ", b"more"])
    def test_something_appended(self, small, extra):
        path, content = small
        path.write_bytes(content + extra)
        assert_refused(path)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{}",
            b"hello, this is a text file\n" * 20,
            b"\x80\x05}q\x00." * 10,
            b"\xff" * 64,
            (2**63).to_bytes(8, "little") + b"{}",
            (100).to_bytes(8, "little") + b"[" * 100,
            (200_000).to_bytes(8, "little") + b"[" * 200_000,
            (4).to_bytes(8, "little") + b"\xff\xfe{}",
            (2).to_bytes(8, "little") + b"[]",
            (4).to_bytes(8, "little") + b"null",
            (5000).to_bytes(8, "little") + b"9" * 5000,
        ],
    )
    def test_not_a_safetensors_file(self, path, content):
        path.write_bytes(content)
        assert_refused(path)

    def test_foreign_safetensors(self, path):
        safetensors.torch.save_file({"x": torch.ones(2)}, path, metadata={"format": "pt"})
        assert_refused(path, "not one that safekern wrote")
        safetensors.torch.save_file({"x": torch.ones(2)}, path)
        assert_refused(path, "not one that safekern wrote")

    def test_wrong_kind(self, small):
        assert_refused(small[0], "holds 'example', not 'mask'", kind="mask")

    def test_newer_version(self, path):
        files.write(path, "example", 2, {}, {})
        assert_refused(path, "upgrade safekern")
        assert files.read(path, "example", 2) == ({}, {})

    @pytest.mark.parametrize("version", ["0", "-1", "", "one", "1.0", "²", "9" * 5000])
    def test_impossible_version(self, path, version):
        keys = {"kind": "example", "version": version, "meta": "{}", "checksum": ""}
        craft(path, {"__metadata__": {f"safekern.{key}": value for key, value in keys.items()}})
        assert_refused(path, "version")

    def test_checksum_covers_kind_version_meta_names_dtypes_and_shapes(self, path):
        def stored_checksum(kind="k", version=1, name="x", meta=1, tensor=None):
            tensor = torch.zeros(2, 2) if tensor is None else tensor
            files.write(path, kind, version, {name: tensor}, {"a": meta})
            content = path.read_bytes()
            length = int.from_bytes(content[:8], "little")
            return json.loads(content[8 : 8 + length])["__metadata__"]["safekern.checksum"]

        checksums = [
            stored_checksum(),
            stored_checksum(kind="l"),
            stored_checksum(version=2),
            stored_checksum(name="y"),
            stored_checksum(meta=2),
            stored_checksum(tensor=torch.zeros(4)),
            stored_checksum(tensor=torch.zeros(2, 2, dtype=torch.int32)),
            stored_checksum(tensor=torch.ones(2, 2)),
        ]
        assert len(set(checksums)) == len(checksums)

    @pytest.mark.parametrize(
        "entry",
        [
            None,
            [],
            {},
            {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
            {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [2**70, 0], "data_offsets": [0, 0]},
            {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]},
            {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
            {"dtype": "F32", "shape": [1], "data_offsets": [0]},
            {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]},
            {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
            {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
            {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        ],
    )
    def test_impossible_entries(self, path, entry):
        files.write(path, "example", 1, {"x": torch.zeros(1)}, {})
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header["x"] = entry
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        craft(path, header, b"" if offsets == [0, 0] else bytes(4))
        assert_refused(path)

    def test_overlapping_tensors(self, path):
        entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        keys = {"kind": "example", "version": "1", "meta": "{}", "checksum": ""}
        metadata = {f"safekern.{key}": value for key, value in keys.items()}
        craft(path, {"__metadata__": metadata, "x": entry, "y": entry}, bytes(4))
        assert_refused(path, "position")

    @pytest.mark.parametrize("meta", ["", "[]", "{", "nul", "3", '{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}'])
    def test_description_that_is_not_a_json_object(self, path, meta, monkeypatch):
        monkeypatch.setattr(files, "dump_json", lambda _: meta)
        files.write(path, "example", 1, {}, {})
        assert_refused(path, "description")

    def test_absurd_sizes_cost_no_memory(self, path):
        path.write_bytes((2**40).to_bytes(8, "little") + bytes(100))
        tracemalloc.start()
        try:
            assert_refused(path)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


class TestWriting:
    @pytest.mark.parametrize("name", ["replace", "fsync"])
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError(28, "No space left on device")])
    @pytest.mark.parametrize("existing", [True, False])
    def test_interrupted(self, path, monkeypatch, name, error, existing):
        if existing:
            files.write(path, "example", 1, {"x": torch.zeros(3)}, {})
        before = {entry: entry.read_bytes() for entry in path.parent.iterdir()}

        def fail(*args, **kwargs):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            expected = FileAccessError if isinstance(error, OSError) else type(error)
            with pytest.raises(expected):
                files.write(path, "example", 1, {"x": torch.ones(3)}, {})
        assert {entry: entry.read_bytes() for entry in path.parent.iterdir()} == before

    def test_disk_full_names_the_path_and_the_reason(self, path, monkeypatch):
        def fail(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(FileAccessError, match=r"example\.safetensors.*No space left"):
            files.write(path, "example", 1, {}, {})

    def test_an_exception_in_the_block_keeps_the_old_content(self, path):
        path.write_bytes(b"old")
        with pytest.raises(ZeroDivisionError), files.replacing(path) as file:
            file.write(b"new")
            raise ZeroDivisionError
        assert path.read_bytes() == b"old"
        assert list(path.parent.iterdir()) == [path]

    def test_nothing_else_is_left_behind(self, small):
        path, _ = small
        assert list(path.parent.iterdir()) == [path]

    @pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
    @pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
    def test_a_new_file_gets_the_permissions_of_the_umask(self, path, umask, expected):
        old = os.umask(umask)
        try:
            files.write(path, "example", 1, {}, {})
        finally:
            os.umask(old)
        assert stat.S_IMODE(path.stat().st_mode) == expected

    @pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
    def test_a_replaced_file_keeps_its_permissions(self, small):
        path, _ = small
        path.chmod(0o640)
        files.write(path, "example", 1, {}, {})
        assert stat.S_IMODE(path.stat().st_mode) == 0o640

    @pytest.mark.skipif(os.name != "posix", reason="symbolic links")
    def test_symlinks_are_followed(self, tmp_path):
        folder = tmp_path / "elsewhere"
        folder.mkdir()
        target, link, chain = folder / "target", tmp_path / "link", tmp_path / "chain"
        link.symlink_to(target)
        chain.symlink_to("link")
        for value in (1, 2):
            files.check_writable(chain)
            files.write(chain, "example", 1, {"x": torch.tensor(value)}, {})
            assert link.is_symlink()
            assert chain.is_symlink()
            assert files.read(target, "example", 1)[0]["x"] == value
        assert list(folder.iterdir()) == [target]

    def test_relative_paths(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        files.check_writable("x")
        files.write("x", "example", 1, {}, {})
        assert files.read("x", "example", 1) == ({}, {})

    def test_long_file_names(self, tmp_path):
        path = tmp_path / ("x" * 250)
        files.write(path, "example", 1, {}, {})
        assert files.read(path, "example", 1) == ({}, {})

    @pytest.mark.parametrize("meta", [{"x": torch.zeros(1)}, {"x": float("nan")}, {"x": {1, 2}}, {("a", "b"): 1}])
    def test_meta_that_json_cannot_hold(self, path, meta):
        with pytest.raises(InvalidArgumentError, match="JSON"):
            files.write(path, "example", 1, {}, meta)
        assert not path.exists()

    def test_what_a_safetensors_file_cannot_hold(self, path):
        with pytest.raises(InvalidArgumentError, match=r"'x'.*complex128"):
            files.write(path, "example", 1, {"x": torch.zeros(1, dtype=torch.complex128)}, {})
        with pytest.raises(InvalidArgumentError, match="reserved"):
            files.write(path, "example", 1, {"__metadata__": torch.zeros(1)}, {})
        assert not path.exists()

    def test_a_header_that_could_not_be_read_again_is_not_written(self, path, monkeypatch):
        monkeypatch.setattr(files, "_MAX_HEADER", 1000)
        with pytest.raises(InvalidArgumentError, match="1,000"):
            files.write(path, "example", 1, {}, {"x": "y" * 1000})
        assert not path.exists()


def unusable_paths(folder: Path):
    (folder / "folder").mkdir()
    (folder / "file").write_bytes(b"")
    unusable = [folder / "folder", folder / "file" / "below", folder / "nul\0byte", folder / ("x" * 300), Path()]
    if os.name == "posix":
        os.mkfifo(folder / "pipe")
        (folder / "loop").symlink_to("loop")
        unusable += [folder / "pipe", folder / "loop", Path("/dev/null")]
    return unusable


class TestAccess:
    def test_unusable_paths_name_themselves(self, tmp_path):
        for path in unusable_paths(tmp_path):
            for use in (
                files.check_writable,
                lambda path: files.write(path, "example", 1, {}, {}),
                lambda path: files.read(path, "example", 1),
            ):
                with pytest.raises(FileAccessError) as caught:
                    use(path)
                assert str(path) in str(caught.value)
        if os.name == "posix":
            assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)

    def test_missing_file_and_missing_folder(self, tmp_path):
        with pytest.raises(FileAccessError, match="no such file"):
            files.read(tmp_path / "absent", "example", 1)
        for use in (files.check_writable, lambda path: files.write(path, "example", 1, {}, {})):
            with pytest.raises(FileAccessError, match=r"folder .*absent does not exist"):
                use(tmp_path / "absent" / "file")
        assert list(tmp_path.iterdir()) == []

    def test_is_an_oserror(self, tmp_path):
        with pytest.raises(OSError, match="absent"):
            files.read(tmp_path / "absent", "example", 1)

    def test_check_writable_leaves_everything_as_it_was(self, small):
        path, content = small
        before = path.stat()
        files.check_writable(path)
        files.check_writable(path.with_name("new"))
        assert list(path.parent.iterdir()) == [path]
        assert path.read_bytes() == content
        assert path.stat().st_mtime_ns == before.st_mtime_ns

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
    def test_no_permission(self, tmp_path):
        folder = tmp_path / "folder"
        folder.mkdir(mode=0o500)
        path = tmp_path / "file"
        path.touch(mode=0o400)
        for unusable in (folder / "file", path):
            with pytest.raises(FileAccessError):
                files.check_writable(unusable)
            with pytest.raises(FileAccessError):
                files.write(unusable, "example", 1, {}, {})

    def test_read_only_file(self, small, monkeypatch):
        path, content = small
        monkeypatch.setattr(os, "access", lambda *_: False)
        with pytest.raises(FileAccessError, match="read-only"):
            files.check_writable(path)
        with pytest.raises(FileAccessError, match="read-only"):
            files.write(path, "example", 1, {}, {})
        assert path.read_bytes() == content

    def test_a_file_that_cannot_be_opened(self, small, monkeypatch):
        def fail(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", fail)
        with pytest.raises(FileAccessError, match="Permission denied"):
            files.read(small[0], "example", 1)
        with pytest.raises(FileAccessError, match="Permission denied"):
            files.write(small[0], "example", 1, {}, {})
