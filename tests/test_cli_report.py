"""``safekern report`` and ``safekern diff`` as commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_scores import moe_mask, scores

from safekern import Mask
from safekern.cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ranked = scores()
    ranked.save("scores.safetensors")
    ranked.top(0.1).save("mask.safetensors")
    ranked.random(0.1).save("random.safetensors")
    moe_mask(fused=True).save("moe.safetensors")
    head = "lm_head.weight"
    Mask.from_indices({head: [0]}, {head: (17, 7)}, model_numel=500).save("head.safetensors")
    return tmp_path


class TestReport:
    def test_prints_tables(self, folder, capsys):
        everything = ["--scores", "scores.safetensors", "--compare", "random.safetensors"]
        assert main(["report", "mask.safetensors", *everything]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith("mask.safetensors: Mask(100 of 1,000 weights, 10%")
        for text in ("yes   It is exactly the 100 weights", "layer 0 to 2", "enrichment", "share of ESI", "if random"):
            assert text in printed
        assert sorted(path.name for path in folder.iterdir() if path.suffix != ".safetensors") == []

    def test_only_a_mask(self, folder, capsys):
        assert main(["report", "moe.safetensors"]) == 0
        printed = capsys.readouterr().out
        assert "Not checked against scores" in printed
        assert "expert" in printed
        Mask.from_indices({}, {}).save("empty.safetensors")
        assert main(["report", "empty.safetensors"]) == 0

    def test_html(self, folder, capsys):
        pytest.importorskip("matplotlib")
        assert main(["report", "mask.safetensors", "--html", "page.html"]) == 0
        assert capsys.readouterr().out == "Written to page.html\n"
        assert (folder / "page.html").read_text().startswith("<!doctype html>")

    def test_html_replaces_pages_only(self, folder, capsys):
        pytest.importorskip("matplotlib")
        (folder / "page.html").write_text("<!doctype html>\n<title>mine</title>\n")
        assert main(["report", "mask.safetensors", "--html", "page.html"]) == 1
        assert "page.html: exists already and is nothing that this command wrote" in capsys.readouterr().err
        assert "mine" in (folder / "page.html").read_text()
        (folder / "page.html").write_bytes(b"")
        for mask in ("mask", "random"):
            assert main(["report", f"{mask}.safetensors", "--html", "page.html"]) == 0
            assert f"{mask}.safetensors" in (folder / "page.html").read_text()

    def test_json(self, folder, capsys):
        compare = ["--compare", "random.safetensors", "mask.safetensors"]
        assert main(["report", "mask.safetensors", "--scores", "scores.safetensors", *compare, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["mask"]["numel"] == 100
        assert found["scores"]["is_exact_top"] is True
        assert found["compared"][1]["jaccard"] == 1.0
        assert sum(cell["selected"] for cell in found["cells"]) == 100

    def test_json_beside_html(self, folder, capsys):
        pytest.importorskip("matplotlib")
        assert main(["report", "mask.safetensors", "--html", "page.html", "--json"]) == 0
        json.loads(capsys.readouterr().out)
        assert (folder / "page.html").exists()

    def test_control_characters_do_not_reach_the_terminal(self, folder, capsys):
        name = "layers.0.\x1b[2J\u202e.weight"
        Mask.from_indices({name: [0]}, {name: (2, 2)}).save("evil\x1b.safetensors")
        assert main(["report", "evil\x1b.safetensors"]) == 0
        printed = capsys.readouterr().out
        assert "\\x1b[2J\\u202e" in printed
        assert not {"\x1b", "\u202e"} & set(printed)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["absent.safetensors"], "no such file"),
            (["scores.safetensors"], "not 'mask'"),
            (["mask.safetensors", "--scores", "mask.safetensors"], "not 'scores'"),
            (["moe.safetensors", "--scores", "scores.safetensors"], "does not fit"),
            (
                ["head.safetensors", "--scores", "scores.safetensors"],
                "the mask is of a model of 500 weights and the scores are of another one, of 1,000: give the scores",
            ),
            (
                ["mask.safetensors", "--compare", "moe.safetensors"],
                "moe.safetensors: the masks are of different models",
            ),
            (["mask.safetensors", "--html", "absent/page.html"], "does not exist"),
            (["mask.safetensors", "--html", "mask.safetensors"], "would overwrite"),
            (
                ["mask.safetensors", "--compare", "random.safetensors", "--html", "./random.safetensors"],
                "would overwrite",
            ),
        ],
    )
    def test_refusals(self, folder, arguments, message, capsys):
        before = {path: path.read_bytes() for path in folder.iterdir()}
        assert main(["report", *arguments]) == 1
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.out == ""
        assert {path: path.read_bytes() for path in folder.iterdir()} == before

    def test_without_matplotlib(self, folder, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        assert main(["report", "mask.safetensors"]) == 0
        assert main(["report", "mask.safetensors", "--html", "page.html"]) == 1
        assert 'pip install "safekern[plot]"' in capsys.readouterr().err
        assert not (folder / "page.html").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="pipes are others there")
def test_a_reader_that_goes_away_is_no_error(folder):
    """As in ``safekern report MASK | head -1``, where a traceback would be the last thing to be seen."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "safekern", "report", "mask.safetensors"]
    ran = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["report", "mask.safetensors"], 1),
        # More than is buffered.
        (["report", "mask.safetensors", "--scores", "scores.safetensors", "--json"], 1),
        (["diff", "mask.safetensors", "mask.safetensors", "--json"], 2),
        (["--help"], 1),
    ],
)
def test_output_that_cannot_be_written(folder, arguments, status):
    with Path("/dev/full").open("w") as full:
        # Unbuffered, argparse keeps to itself that it could not print the help.
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        ran = subprocess.run(
            [sys.executable, "-m", "safekern", *arguments], env=buffered, stdout=full, stderr=subprocess.PIPE, text=True
        )
    command = " ".join(["safekern", *arguments[:1]]).removesuffix(" --help")
    expected = f"{command}: the output cannot be written: No space left on device; send it elsewhere\n"
    assert (ran.returncode, ran.stderr) == (status, expected)


def test_an_encoding_without_the_shades_of_a_heat_map(folder):
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-m", "safekern", "report", "mask.safetensors"]
    ran = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert b"\\u2588" in ran.stdout and not ran.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="closes streams through a shell")
def test_closed_streams(folder):
    for arguments, status in (("mask.safetensors mask.safetensors", 0), ("mask.safetensors absent", 2)):
        command = f"exec '{sys.executable}' -m safekern diff {arguments}"
        assert subprocess.run(["sh", "-c", f"{command} >&-"], stderr=subprocess.DEVNULL).returncode == status
        ran = subprocess.run(["sh", "-c", f"{command} --json 2>&-"], stdout=subprocess.PIPE)
        assert ran.returncode == status
        assert not ran.stdout or json.loads(ran.stdout)["equal"]


class TestDiff:
    def test_equal(self, folder, capsys):
        scores().top(0.1).save("copy.safetensors")
        assert main(["diff", "mask.safetensors", "copy.safetensors"]) == 0
        assert "The masks are equal." in capsys.readouterr().out

    def test_different(self, folder, capsys):
        assert main(["diff", "mask.safetensors", "random.safetensors"]) == 1
        printed = capsys.readouterr().out
        a, b = (Mask.load(folder / f"{name}.safetensors") for name in ("mask", "random"))
        assert "The masks differ." in printed
        (whole,) = [line.split() for line in printed.splitlines() if line.startswith("whole model")]
        assert whole[2:6] == ["100", "100", str((a & b).numel), f"{a.jaccard(b):.4f}"]
        for text in ("a  mask.safetensors", "component", "up_proj", "layer", "if random"):
            assert text in printed

    def test_one_weight_is_enough(self, folder):
        mask = Mask.load("mask.safetensors")
        indices = dict(mask.items())
        name = next(iter(indices))
        indices[name] = indices[name][1:]
        Mask.from_indices(indices, mask.shapes, model_numel=mask.model_numel).save("less.safetensors")
        assert main(["diff", "mask.safetensors", "less.safetensors"]) == 1

    def test_json(self, folder, capsys):
        assert main(["diff", "mask.safetensors", "random.safetensors", "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        a, b = (Mask.load(folder / f"{name}.safetensors") for name in ("mask", "random"))
        assert found["equal"] is False
        assert found["jaccard"] == a.jaccard(b)
        assert found["shared"] == (a & b).numel == sum(part["shared"] for part in found["components"])
        assert found["a"]["fingerprint"] == a.fingerprint
        assert found["layers"][0].keys() == {"layer", "a", "b", "shared", "jaccard", "expected_jaccard"}

    def test_errors_are_two(self, folder, capsys):
        assert main(["diff", "mask.safetensors", "absent.safetensors"]) == 2
        assert "no such file" in capsys.readouterr().err
        name = next(iter(Mask.load("mask.safetensors")))
        Mask.from_indices({name: [0]}, {name: (5, 5)}).save("other_model.safetensors")
        assert main(["diff", "mask.safetensors", "other_model.safetensors"]) == 2
        assert "shape" in capsys.readouterr().err
        assert main(["diff", "mask.safetensors", "moe.safetensors"]) == 2
        assert "are of different models, of 1,000 and " in capsys.readouterr().err
        with pytest.raises(SystemExit, match="2"):
            main(["diff", "mask.safetensors"])


@pytest.mark.parametrize("command", ["report", "diff"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"safekern {command} mask" in capsys.readouterr().out


def test_scores_and_mask_of_one_model_from_end_to_end(tmp_path, capsys):
    """From a model with experts to a page, through files."""
    import safekern

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = torch.nn.Parameter(torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(0)))

        def forward(self, x):
            return torch.einsum("bi,eio->bo", x, self.down_proj)

    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"experts": Experts()})])})
    loader = [torch.randn(3, 6, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    ranked = safekern.score(
        model, loader, lambda model, x: model["layers"][0]["experts"](x).square().mean(), progress=False
    )
    ranked.save(tmp_path / "scores.safetensors")
    ranked.top(0.1).save(tmp_path / "mask.safetensors")
    scored = ["--scores", str(tmp_path / "scores.safetensors"), "--json"]
    assert main(["report", str(tmp_path / "mask.safetensors"), *scored]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scores"]["is_exact_top"] is True
    assert found["scores"]["num_batches"] == 2
    assert sum(line["selected"] for line in found["experts"]) == found["mask"]["numel"] == 14
