"""The HTML page: what it says, that no file can make it do anything, and how it does in a real browser."""

import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from small_scores import moe_mask, scores

from safekern import Mask, Scores
from safekern.report import Audit
from safekern.report_page import _SCRIPT, to_html

pytest.importorskip("matplotlib")

SCRIPT = "<script>document.title='pwned'</script>"
HOSTILE_NAMES = [
    f"layers.0.{SCRIPT}.weight",
    "layers.1.\"'><img src=x onerror=document.title='pwned'>.weight",
    "layers.2.</table></script><script src=https://evil.example/x.js></script>.weight",
    "layers.3.$\\frac{\x1b[2J\u202e\ud800&lt;.weight",
]
HOSTILE_META = {
    SCRIPT: SCRIPT,
    "model": f"</title></style>{SCRIPT}<iframe src='https://evil.example'>",
    "objective": "javascript:alert(1)",
    "nested": {"x": [SCRIPT, None, 1.5], "--><!--": "]]>"},
    "ratio": "<b>",
    "bidi": "\u202e\ud800",
}
TAGS = re.findall(
    r"\w+",
    """html head meta link title style body main header section h1 h2 p strong b code dl dt dd div ul li span figure
    picture source img figcaption table caption thead tbody tr th td button details summary script wbr""",
)


class Page(HTMLParser):
    """Tags with their attributes, the text outside of style and script, and the scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.scripts, self._open = [], [], [], []
        self.feed(text)
        self.close()
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
        elif not self._open or self._open[-1] != "style":
            self.texts.append(data)

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.tags if name in attrs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    ranked = scores()
    ranked.save(folder / "scores.safetensors")
    ranked.top(0.1).save(folder / "mask.safetensors")
    scores(1).top(0.1).save(folder / "other.safetensors")
    moe_mask(fused=True).save(folder / "moe.safetensors")
    shapes = dict.fromkeys(HOSTILE_NAMES, (4, 5))
    indices = {name: list(range(3 + i)) for i, name in enumerate(shapes)}
    gradients = {name: torch.rand(shape) + 0.1 for name, shape in shapes.items()}
    evil = folder / "\"'><img src=x onerror=document.title='pwned'>.safetensors"
    Mask.from_indices(indices, shapes, meta=HOSTILE_META).save(evil)
    Mask.from_indices(dict(list(indices.items())[1:]), shapes).save(folder / f"{SCRIPT.replace('/', '')}.safetensors")
    sigma = dict.fromkeys(gradients, torch.tensor(1.0))
    Scores(gradients, sigma, num_batches=1, model_numel=80, meta=HOSTILE_META).save(folder / "evil_scores")
    return folder


@pytest.fixture(scope="module")
def page(folder):
    """The page with every section that a dense model has."""
    return to_html(
        Audit.load(folder / "mask.safetensors", folder / "scores.safetensors", [folder / "other.safetensors"])
    )


@pytest.fixture(scope="module")
def hostile(folder):
    """The page of files whose names, parameters and descriptions try to become part of it."""
    (evil,) = folder.glob("*onerror*")
    (other,) = folder.glob("<script>*")
    return to_html(Audit.load(evil, folder / "evil_scores", [other]))


def test_says_what_an_auditor_asks(page):
    shown = Page(page)
    for text in (
        "mask.safetensors",
        "Weights selected 100 10% of the model",
        "selected from in 3 layers, ",
        "exactly the 100 weights of the largest ESI",
        "averaged over 5 batches",
        "Beside other.safetensors: Jaccard index",
        "Provenance",
        "objective refusal",
        "By layer and component (",
    ):
        assert text in shown.text
    checksums = re.findall(r"\b[0-9a-f]{64}\b", shown.text)
    assert len(set(checksums)) == 4
    assert shown.text.index("Weights selected") < shown.text.index("How sure") < shown.text.index("Where it lies")


def test_checksums_are_those_of_the_files(page, folder):
    for name in ("mask", "scores", "other"):
        assert hashlib.sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest() in page


def test_pictures_have_words_and_two_schemes(page):
    images = [attrs for tag, attrs in Page(page).tags if tag == "img"]
    assert len(images) == 3
    assert all(len(image["alt"]) > 40 for image in images)
    assert len(set(Page(page).attributes("srcset")) | {image["src"] for image in images}) == 6


def test_experts_have_a_section_of_their_own(folder):
    shown = Page(to_html(Audit.load(folder / "moe.safetensors")))
    assert "Densest is expert 2 of layer 1, where 20.00%" in shown.text
    assert "Not checked against scores" in shown.text
    assert "Experts" not in Page(to_html(Audit.load(folder / "mask.safetensors"))).text


def test_an_empty_mask(tmp_path):
    Mask.from_indices({}, {"w": (3,)}).save(tmp_path / "empty.safetensors")
    assert "The mask selects nothing." in to_html(Audit.load(tmp_path / "empty.safetensors"))


def test_the_same_files_give_the_same_page(page, folder):
    again = Audit.load(folder / "mask.safetensors", folder / "scores.safetensors", [folder / "other.safetensors"])
    assert to_html(again) == page


@pytest.mark.parametrize("which", ["page", "hostile"])
def test_nothing_from_outside_and_nothing_injected(which, request):
    text = request.getfixturevalue(which)
    text.encode()
    shown = Page(text)
    assert {tag for tag, _ in shown.tags} <= set(TAGS)
    assert shown.scripts == [_SCRIPT]
    for tag, attrs in shown.tags:
        assert not [name for name in attrs if name.startswith("on") or name == "style"], tag
        for name in ("src", "srcset", "href"):
            assert attrs.get(name, "data:").startswith("data:")
    policy = shown.tags[3][1]["content"]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.findall(
        r"url\(|@import|https?:", re.sub(r"evil\.example|https?://evil", "", text.split("</style>")[0])
    )
    for uri in [*shown.attributes("src"), *shown.attributes("srcset")]:
        ElementTree.fromstring(base64.b64decode(uri.partition(",")[2]))


def test_hostile_text_is_shown_as_text(hostile):
    shown = Page(hostile)
    assert SCRIPT in shown.text
    assert "onerror=document.title" in shown.text
    assert "\\x1b[2J\\u202e\\ud800" in shown.text
    for char in ("\x1b", "\u202e", "\ud800"):
        assert char not in hostile


def test_files_of_one_name_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        scores().top(0.1).save(tmp_path / folder / "mask.safetensors")
    audit = Audit.load(tmp_path / "a" / "mask.safetensors", compare=[tmp_path / "b" / "mask.safetensors"])
    # By no more of their folders than it takes.
    assert [file.name for file in audit.files] == [str(Path(f, "mask.safetensors")) for f in ("a", "b")]
    (tmp_path / "a" / "b").mkdir()
    shutil.copy(tmp_path / "b" / "mask.safetensors", tmp_path / "a" / "b")
    others = [tmp_path / "a" / "b" / "mask.safetensors", tmp_path / "b" / "mask.safetensors"]
    shown = [file.name for file in Audit.load(tmp_path / "a" / "mask.safetensors", compare=others).files]
    assert shown[:2] == [str(Path("a", "mask.safetensors")), str(Path("a", "b", "mask.safetensors"))]
    assert shown[2].endswith(str(Path("b", "mask.safetensors"))) and len(set(shown)) == 3


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=5000",
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on PATH")


def browse(text, folder, *flags):
    """The page after its scripts ran, and what the browser wrote on its console."""
    (folder / "page.html").write_text(text)
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, "--dump-dom"]
    page = (folder / "page.html").as_uri()
    ran = subprocess.run([*command, page], capture_output=True, text=True, timeout=120)
    return ran.stdout, [line for line in ran.stderr.splitlines() if "CONSOLE" in line]


def driven(text, script):
    """The page with a script of the test, which its policy would forbid."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    return text.replace("</body>", f"<script>{script}</script></body>")


@needs_browser
@pytest.mark.parametrize("which", ["page", "hostile"])
def test_opens_without_complaints(which, request, tmp_path):
    text = request.getfixturevalue(which)
    dom, console = browse(text, tmp_path)
    assert console == []
    assert Page(dom).scripts == [_SCRIPT]
    assert "<title>pwned" not in dom
    # The policy would refuse a request, and the console would say so.
    assert Page(dom).attributes("src") == Page(text).attributes("src")


@needs_browser
def test_the_policy_stops_what_was_injected(page, tmp_path):
    spoiled = page.replace(
        "</h1>", "</h1><script>document.title='pwned'</script><img src='https://evil.example/x.png'>"
    )
    dom, console = browse(spoiled, tmp_path)
    assert "<title>pwned" not in dom
    assert len(console) >= 2
    assert all("Content Security Policy" in line for line in console)


@needs_browser
@pytest.mark.parametrize("which", ["page", "hostile"])
@pytest.mark.parametrize("scheme", ["0", "1"])
def test_every_picture_can_be_shown(which, scheme, request, tmp_path):
    script = """
      addEventListener("load", () => {
        const broken = [...document.images].filter(image => !image.complete || image.naturalWidth < 100);
        document.title = "images " + document.images.length + " broken " + broken.length
          + " dark " + matchMedia("(prefers-color-scheme: dark)").matches
          + " second " + [...document.images].filter(image => image.currentSrc !== image.src).length;
      });
    """
    dom, _ = browse(
        driven(request.getfixturevalue(which), script), tmp_path, f"--blink-settings=preferredColorScheme={scheme}"
    )
    dark = scheme == "0"
    assert f"<title>images 3 broken 0 dark {str(dark).lower()} second {3 if dark else 0}</title>" in dom


@needs_browser
def test_a_heading_sorts_its_table(page, tmp_path):
    script = """
      const table = [...document.querySelectorAll("table")].find(one => one.caption?.textContent === "By component");
      const seen = [];
      const look = () => seen.push([...table.tBodies[0].rows].map(row => row.cells[0].textContent).join());
      for (const column of [1, 1, 0]) { table.querySelectorAll("th button")[column].click(); look(); }
      document.title = seen.join(" ");
    """
    dom, console = browse(driven(page, script), tmp_path)
    assert console == []
    counts = {line["component"]: line["selected"] for line in scores().top(0.1).summary().table("component").records()}
    down = sorted(counts, key=lambda name: -counts[name])
    assert len(set(counts.values())) == 3
    assert f"<title>{','.join(down)} {','.join(down[::-1])} up_proj,q_proj,lm_head</title>" in dom


@needs_browser
def test_fits_a_phone(page, tmp_path):
    # Headless windows are no narrower than 500 pixels, frames are.
    script = """
      const page = document.documentElement;
      addEventListener("load", () => parent.postMessage(page.scrollWidth - page.clientWidth, "*"));
    """
    (tmp_path / "inner.html").write_text(driven(page, script))
    outer = """<!doctype html><title>none</title><script>
      addEventListener("message", event => { document.title = "overflow " + event.data; });
    </script><iframe src="inner.html" style="width:360px;height:800px;border:0"></iframe>"""
    dom, _ = browse(outer, tmp_path)
    assert "<title>overflow 0</title>" in dom
