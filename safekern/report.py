"""What an auditor wants to know of a mask, and the HTML page that shows it.

Names, descriptions and numbers come from files of any origin. So everything is escaped, and the page forbids itself
whatever it does not bring along: no network, no script and no style but its own.
"""

import base64
import hashlib
import html
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safekern import plots
from safekern._version import __version__
from safekern.distribution import Distribution
from safekern.errors import FileAccessError
from safekern.mask import Mask, Summary
from safekern.overlap import COLUMNS, Comparison, row
from safekern.scores import ScoreReport, Scores, count_of, ratio_of
from safekern.tables import Column, Table, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SourceFile:
    """A file that a report was made from: its part in it, the name to show, bytes, and SHA-256 (hex)."""

    role: str
    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Check:
    """Something that was looked into: True for holds, False for does not, None for cannot be told from the files."""

    holds: bool | None
    text: str


@dataclass(frozen=True)
class Ranking:
    """A mask beside the scores it may come from.

    Attributes:
        report: The scores per layer and component.
        selected: The ESI of the mask's weights.
        top: The mask compared with as many weights of the largest ESI.
        num_batches: Batches the scores were averaged over.
    """

    report: ScoreReport
    selected: Distribution
    top: Comparison
    num_batches: int

    @property
    def share(self) -> float:
        """The mask's part of the sum of ESI over all scored weights."""
        total = self.report.distribution.total
        return self.selected.total / total if total else 0.0

    @classmethod
    def of(cls, mask: Mask, scores: Scores) -> "Ranking":
        """Looks a mask up in scores.

        Raises:
            MaskMismatchError: The mask is not over parameters of these scores.
            NonFiniteError: A score is NaN or infinite.
        """
        selected = scores.selected(mask)
        ratio = ratio_of(mask.numel, scores.model_numel)
        return cls(scores.report(), selected, Comparison(scores.top(ratio), mask), scores.num_batches)


@dataclass(frozen=True)
class Audit:
    """A mask and all that is said of it.

    Attributes:
        mask: The mask.
        files: What it was read from, the mask's file first.
        ranking: The mask in its scores, where they were given.
        comparisons: The mask beside others, by the name of their file.
    """

    mask: Mask
    files: Sequence[SourceFile]
    ranking: Ranking | None
    comparisons: Mapping[str, Comparison]

    @classmethod
    def load(cls, mask: Path, scores: Path | None = None, compare: Sequence[Path] = ()) -> "Audit":
        """Reads the files and works out everything.

        Args:
            mask: A mask file.
            scores: The scores it was ranked from.
            compare: Other masks of the same model.

        Raises:
            SafekernError: A file cannot be read, or they do not belong together.
        """
        loaded = Mask.load(mask)
        paths = {"mask": [mask], "scores": [scores] if scores else [], "compared with": compare}
        given = [path for several in paths.values() for path in several]
        # Names without their folders, which are the reader's business only where they tell two files apart.
        shown = {p: p.name if sum(q.name == p.name for q in given) == 1 else str(p) for p in given}
        files = [_source(role, shown[path], path) for role, several in paths.items() for path in several]
        ranking = Ranking.of(loaded, Scores.load(scores)) if scores else None
        return cls(loaded, files, ranking, {shown[path]: Comparison(loaded, Mask.load(path)) for path in compare})

    @cached_property
    def summary(self) -> Summary:
        """Selected weights per layer and component."""
        return self.mask.summary()

    @cached_property
    def experts(self) -> Summary:
        """Selected weights per layer and expert."""
        return self.mask.expert_summary()

    def core(self) -> tuple[int, int, float] | None:
        """The shortest run of layers that holds half of the mask: first, last, share; None without layers."""
        shares: dict[int, float] = {}
        for cell in self.summary:
            if cell.layer is not None:
                shares[cell.layer] = shares.get(cell.layer, 0.0) + cell.share
        layers = sorted(shares)
        best: tuple[int, int, float] | None = None
        start, held = 0, 0.0
        for layer in layers:
            held += shares[layer]
            while held - shares[layers[start]] >= 0.5:
                held -= shares[layers[start]]
                start += 1
            if held >= 0.5 and (best is None or layer - layers[start] < best[1] - best[0]):
                best = (layers[start], layer, held)
        return best

    def checks(self) -> list[Check]:
        """What can be said of how far to trust the mask."""
        found = [Check(True, "The file is whole: its content matches the checksum inside it.")]
        claim = self._check_ratio()
        found += [claim] if claim else []
        found.append(self._check_ranking())
        for name, comparison in self.comparisons.items():
            total = comparison.total
            chance = total.expected_jaccard
            times = (
                f"{total.jaccard / chance:,.1f} times that of random masks of these sizes"
                if chance
                else "no weight in common is expected"
            )
            found.append(Check(None, f"Beside {name}: Jaccard index {total.jaccard:.4f}, {times}."))
        if not self.comparisons:
            found.append(
                Check(
                    None,
                    "Not compared with another mask: --compare with one from other prompts shows how far the choice "
                    "of prompts decides the ranking.",
                )
            )
        return found

    def _check_ratio(self) -> Check | None:
        """Whether as many weights are selected as the file says, where it says so in a way that can be checked."""
        ratio: object = self.mask.meta.get("ratio")
        if not isinstance(ratio, float) or not 0 < ratio <= 1 or self.mask.meta.get("per") != "model":
            return None
        mask = self.mask
        says = f"The file says that {100 * ratio:.4g}% of the model was selected"
        wanted = count_of(ratio, mask.model_numel, mask.model_numel)
        if mask.numel == wanted:
            return Check(True, f"{says}, and it was.")
        # A ranking ends with the eligible weights, which may be fewer.
        if mask.numel < wanted and mask.numel == sum(shape.numel() for shape in mask.shapes.values()):
            return Check(
                True, f"{says}; it holds every weight of its parameters, {100 * mask.density:.4g}% of the model."
            )
        return Check(False, f"{says}, but it holds {100 * mask.density:.4g}%.")

    def _check_ranking(self) -> Check:
        if self.ranking is None:
            return Check(None, "Not checked against scores: give the scores it was ranked from with --scores.")
        largest = f"the {self.mask.numel:,} weights of the largest ESI in the scores given"
        if self.ranking.top.equal:
            return Check(
                True, f"It is exactly {largest}, averaged over {_many(self.ranking.num_batches, 'batch', 'es')}."
            )
        total = self.ranking.top.total
        return Check(
            False,
            f"It is not {largest}: it shares {total.shared:,} with them (Jaccard {total.jaccard:.4f}; random masks of "
            f"this size have {total.expected_jaccard:.4f}).",
        )

    def versions(self) -> dict[str, str]:
        """What made this report."""
        found = {"safekern": __version__, "python": platform.python_version()}
        for package in ("torch", "matplotlib"):
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                continue
        return found

    def overlap_table(self) -> Table:
        """A line for each mask it was compared with."""
        return Table(
            [Column("mask"), *COLUMNS[1:]], [(name, *row(found.total)[1:]) for name, found in self.comparisons.items()]
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything in the report as JSON can hold it."""
        found: dict[str, Any] = {
            "mask": {
                "numel": self.mask.numel,
                "model_numel": self.mask.model_numel,
                "density": self.mask.density,
                "parameters": len(self.mask),
                "fingerprint": self.mask.fingerprint,
                "meta": self.mask.meta,
            },
            "files": [vars(file) for file in self.files],
            "versions": self.versions(),
            "checks": [vars(check) for check in self.checks()],
            "components": self.summary.table("component").records(),
            "layers": self.summary.table("layer").records(),
            "cells": self.summary.table().records(),
            "experts": self.experts.table().records(),
        }
        if self.ranking:
            total = self.ranking.top.total
            found["scores"] = {
                "num_batches": self.ranking.num_batches,
                "numel": self.ranking.report.distribution.numel,
                "share_of_esi": self.ranking.share,
                "smallest_selected": self.ranking.selected.smallest,
                "is_exact_top": self.ranking.top.equal,
                "jaccard_with_top": total.jaccard,
                "components": self.ranking.report.table("component").records(),
                "cells": self.ranking.report.table().records(),
            }
        found["compared"] = [
            {
                **line,
                "components": comparison.table("component").records(),
                "layers": comparison.table("layer").records(),
            }
            for line, comparison in zip(self.overlap_table().records(), self.comparisons.values(), strict=True)
        ]
        return found


def to_html(audit: Audit) -> str:
    """Makes one page that holds everything, pictures too, and opens from disk.

    The same files and versions give the same page.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    body = "".join(
        [
            _header(audit),
            _tiles(audit),
            _checks(audit),
            _where(audit),
            _experts(audit),
            _impact(audit),
            _overlap(audit),
            _provenance(audit),
            _HELP,
        ]
    )
    policy = f"default-src 'none'; img-src data:; style-src {_hash(_STYLE)}; script-src {_hash(_SCRIPT)}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{_text(audit.files[0].name)} - safekern report</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _header(audit: Audit) -> str:
    meta = audit.mask.meta
    layers = len({cell.layer for cell in audit.summary if cell.layer is not None})
    model = meta.get("model")
    named = _text(model) if isinstance(model, str) and model else "not named in the file"
    facts = [f"{audit.mask.model_numel:,} weights"]
    if layers:
        facts.append(f"selected from in {_many(layers, 'layer')}, {_many(len(audit.mask), 'parameter')}")
    return (
        f'<header>\n<p class="kind">safekern report on a mask</p>\n<h1>{_text(audit.files[0].name)}</h1>\n'
        f"<p>Model: <strong>{named}</strong> ({', '.join(facts)})</p>\n</header>\n"
    )


def _tiles(audit: Audit) -> str:
    mask = audit.mask
    tiles = [("Weights selected", f"{mask.numel:,}", f"{100 * mask.density:.3g}% of the model")]
    components = audit.summary.table("component").records()
    if components:
        most = max(components, key=lambda line: line["share"])
        densest = max(components, key=lambda line: line["enrichment"])
        tiles.append(("Most of it", most["component"], f"{most['share']:.1%} of the mask"))
        tiles.append(("Densest", densest["component"], f"{densest['enrichment']:.1f} times the average over the model"))
    core = audit.core()
    if core:
        first, last, share = core
        title, where = ("layer", f"{first}") if first == last else ("layers", f"{first} to {last}")
        tiles.append((f"Half of it lies in {title}", where, f"{share:.1%} of the mask"))
    if audit.ranking:
        tiles.append(("Share of all impact", f"{audit.ranking.share:.1%}", "of the ESI of all scored weights"))
    shown = "".join(
        f"<div><dt>{_text(title)}</dt><dd><b>{_breakable(value)}</b> {_text(note)}</dd></div>\n"
        for title, value, note in tiles
    )
    return f'<dl class="tiles">\n{shown}</dl>\n'


def _checks(audit: Audit) -> str:
    marks = {True: ("yes", "✓", "holds"), False: ("no", "✗", "does not hold"), None: ("open", "•", "note")}
    items = "".join(
        f'<li class="{kind}"><span aria-hidden="true">{mark}</span><span class="sr">{spoken}: </span>'
        f"<span>{_text(check.text)}</span></li>\n"
        for check in audit.checks()
        for kind, mark, spoken in [marks[check.holds]]
    )
    return f'<section>\n<h2>How sure is it?</h2>\n<ul class="checks">\n{items}</ul>\n</section>\n'


def _where(audit: Audit) -> str:
    if not audit.summary:
        return "<section>\n<h2>Where it lies</h2>\n<p>The mask selects nothing.</p>\n</section>\n"
    densest = max(audit.summary, key=lambda cell: cell.density)
    place = densest.component if densest.layer is None else f"{densest.component} of layer {densest.layer}"
    described = f"Densest is {place}, where {densest.density:.2%} of the weights are selected."
    picture = _picture(
        lambda theme: plots.component_map(audit.summary, theme),
        f"Heat map of the share of weights selected, components by layers. {described}",
        f"Share of the weights selected, in each component of each layer. {described}",
    )
    return (
        f"<section>\n<h2>Where it lies</h2>\n{picture}"
        f"{_table(audit.summary.table('component'), 'By component')}"
        f"{_folded(audit.summary.table('layer'), 'By layer')}"
        f"{_folded(audit.summary.table(), 'By layer and component')}</section>\n"
    )


def _experts(audit: Audit) -> str:
    if not audit.experts:
        return ""
    densest = max(audit.experts, key=lambda cell: cell.density)
    unused = sum(not cell.selected for cell in audit.experts)
    layer = "" if densest.layer is None else f" of layer {densest.layer}"
    described = (
        f"Densest is expert {densest.expert}{layer}, where {densest.density:.2%} of the weights are selected; "
        f"in {unused:,} of {_many(len(audit.experts), 'expert')} none is."
    )
    picture = _picture(
        lambda theme: plots.expert_map(audit.experts, theme),
        f"Heat map of the share of weights selected, experts by layers. {described}",
        f"Share of the weights selected, in each expert of each layer. {described}",
    )
    return f"<section>\n<h2>Experts</h2>\n{picture}{_folded(audit.experts.table(), 'By layer and expert')}</section>\n"


def _impact(audit: Audit) -> str:
    ranking = audit.ranking
    if not ranking:
        return ""
    every, selected = ranking.report.distribution, ranking.selected
    median = every.quantile(0.5)
    times = f", {selected.smallest / median:,.0f} times the median of all scored weights" if median else ""
    described = (
        f"The selected {selected.numel / every.numel:.2%} of the scored weights hold {ranking.share:.1%} of the "
        f"summed ESI. The weakest of them has an ESI of {selected.smallest:.2e}{times}."
    )
    zeros = f", and {_many(every.zeros, 'weight')} with an ESI of zero" if every.zeros else ""
    if every.largest:
        picture = _picture(
            lambda theme: plots.esi_histogram(every, selected, selected.smallest, theme),
            f"Histogram of ESI with logarithmic axes, all scored weights and the selected ones. {described}",
            f"{described} Not shown: the lowest 0.01%{zeros}.",
            "chart",
        )
    else:
        picture = "<p>Every scored weight has an ESI of zero.</p>\n"
    return (
        f"<section>\n<h2>Impact</h2>\n{picture}"
        f"{_table(ranking.report.table('component'), 'ESI of the scored weights by component')}"
        f"{_folded(ranking.report.table(), 'ESI by layer and component')}</section>\n"
    )


def _overlap(audit: Audit) -> str:
    if not audit.comparisons:
        return ""
    rows = {
        name: [(part, counts.jaccard, counts.expected_jaccard) for part, counts in found.by("component").items()]
        for name, found in audit.comparisons.items()
    }
    described = " ".join(
        f"{name}: {found.total.jaccard:.3f} over the whole model." for name, found in audit.comparisons.items()
    )
    picture = _picture(
        lambda theme: plots.overlap(rows, theme),
        f"Jaccard index with each other mask, by component. {described}",
        "The weights that both masks select, of those that either selects, by component. "
        "The bars show what masks of the same sizes would share by chance.",
        "chart",
    )
    tables = "".join(
        _folded(found.table("component"), f"{name} by component (a: this mask, b: the other)")
        for name, found in audit.comparisons.items()
    )
    return (
        f"<section>\n<h2>Beside other masks</h2>\n{picture}"
        f"{_table(audit.overlap_table(), 'Over the whole model (b: weights of the other mask)')}{tables}</section>\n"
    )


def _provenance(audit: Audit) -> str:
    meta = Table([Column("key"), Column("value")], [(key, _plain(value)) for key, value in audit.mask.meta.items()])
    files = Table(
        [Column("file"), Column("part"), Column("bytes", "{:,}"), Column("sha256", "{}", "SHA-256")],
        [(file.name, file.role, file.size, file.sha256) for file in audit.files],
    )
    made = ", ".join(f"{name} {number}" for name, number in audit.versions().items())
    return (
        "<section>\n<h2>Provenance</h2>\n"
        + (_table(meta, "What the mask's file says of itself (not verified)") if meta.rows else "")
        + _table(files, "Files this report was made from")
        + f"<p>Fingerprint of the mask's names, shapes and indices: <code>{audit.mask.fingerprint}</code></p>\n"
        f"<p>Made with {_text(made)}.</p>\n</section>\n"
    )


def _picture(draw: Callable[[plots.Theme], "Figure"], alt: str, caption: str, kind: str = "map") -> str:
    light, dark = (plots.data_uri(draw(theme)) for theme in (plots.LIGHT, plots.DARK))
    return (
        f'<figure class="{kind}">\n<div class="scroll" tabindex="0" role="region" aria-label="picture"><picture>'
        f'<source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{_text(alt)}"></picture></div>\n'
        f"<figcaption>{_text(caption)}</figcaption>\n</figure>\n"
    )


def _folded(table: Table, caption: str) -> str:
    rows = _many(len(table.rows), "row")
    return f"<details>\n<summary>{_text(caption)} ({rows})</summary>\n{_table(table, '')}</details>\n"


def _table(table: Table, caption: str) -> str:
    kinds = ["text" if table.is_text(position) else "number" for position in range(len(table.columns))]
    heads = "".join(
        f'<th scope="col" class="{kind}"><button type="button">{_text(column.heading)}</button></th>'
        for column, kind in zip(table.columns, kinds, strict=True)
    )
    lines = "".join(
        "<tr>"
        + "".join(
            f'<td class="{kind} {column.key}"{_sort_key(value)}>{_text(cell)}</td>'
            for column, cell, value, kind in zip(table.columns, cells, values, kinds, strict=True)
        )
        + "</tr>\n"
        for cells, values in zip(table.cells(), table.rows, strict=True)
    )
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table"><table>'
        f"{title}<thead><tr>{heads}</tr></thead>\n"
        f"<tbody>\n{lines}</tbody></table></div>\n"
    )


def _sort_key(value: Any) -> str:
    return f' data-value="{value!r}"' if isinstance(value, (int, float)) else ""


def _text(text: str) -> str:
    """Text of any origin, safe between tags and inside quoted attributes."""
    return html.escape(printable(text), quote=True)


def _breakable(text: str) -> str:
    """As :func:`_text`, with places where a long name may be broken."""
    return _text(text).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _many(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _source(role: str, name: str, path: Path) -> SourceFile:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return SourceFile(role, name, file.tell(), digest)
    except OSError as error:
        raise FileAccessError(f"{path}: cannot be read: {error.strerror or error}.") from error


_HELP = """\
<section>
<h2>How to read it</h2>
<dl>
<dt>ESI</dt><dd>Expected Safety Impact: the absolute gradient of the safety objective with respect to a weight, times
the standard deviation of the tensor (with <code>sigma_per: expert</code>, of the expert) that holds it.</dd>
<dt>Share</dt><dd>Part of the mask that lies there.</dd>
<dt>Density</dt><dd>Part of the weights there that are selected, of parameters with at least one.</dd>
<dt>Enrichment</dt><dd>Density relative to that of the whole model: above 1 where the mask concentrates.</dd>
<dt>Jaccard index</dt><dd>Weights selected by both masks as a part of those selected by either; 1 for equal masks.</dd>
</dl>
</section>
"""

_STYLE = """
:root{--text:#1f2328;--soft:#59636e;--line:#d1d9e0;--page:#f6f8fa;--card:#fff;--accent:#0969da;--yes:#1a7f37;--no:#b3261e}
@media screen and (prefers-color-scheme:dark){:root{--text:#e6edf3;--soft:#9198a1;--line:#30363d;--page:#0d1117;
--card:#161b22;--accent:#58a6ff;--yes:#3fb950;--no:#ff7b72}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:62rem;margin:0 auto;padding:1.5rem 1rem 3rem}
h1{margin:0;font-size:1.7rem;line-height:1.2;overflow-wrap:anywhere}
h2{margin:0 0 .75rem;font-size:1.2rem}
header p{margin:.3rem 0 1.2rem}header .kind{margin:0;color:var(--soft);font-size:.9rem}
section{margin-top:1rem;padding:1.1rem 1.2rem;background:var(--card);border:1px solid var(--line);border-radius:8px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(10.5rem,1fr));gap:.75rem;margin:0}
.tiles div{padding:.8rem 1rem;background:var(--card);border:1px solid var(--line);border-radius:8px}
.tiles dt{color:var(--soft);font-size:.85rem}
.tiles dd{margin:0;color:var(--soft);font-size:.85rem;overflow-wrap:anywhere}
.tiles b{display:block;color:var(--text);font-size:1.3rem;line-height:1.3}
.checks{margin:0;padding:0;list-style:none}
.checks li{display:flex;gap:.6rem;padding:.2rem 0;overflow-wrap:anywhere}
.checks li>:first-child{flex:none;width:1.1em;text-align:center;font-weight:700;color:var(--soft)}
.checks .yes>:first-child{color:var(--yes)}.checks .no>:first-child{color:var(--no)}
.sr{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
figure{margin:0 0 1rem}figcaption{color:var(--soft);font-size:.9rem;overflow-wrap:anywhere}
.scroll{overflow-x:auto;position:relative}.scroll+.scroll{margin-top:1rem}
img{display:block;max-width:100%;height:auto;margin:0 auto .5rem}
.map img{min-width:36rem}.chart img{width:36rem}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{padding:.3rem 0;text-align:left;font-weight:600;white-space:nowrap}
th,td{padding:.25rem .7rem;border-bottom:1px solid var(--line)}
th{padding:0;border-bottom-width:2px}
th button{width:100%;padding:.25rem .7rem;border:0;background:none;color:inherit;font:inherit;font-weight:600;
text-align:inherit;white-space:nowrap;cursor:pointer}
th button:hover,summary:hover{color:var(--accent)}
th[aria-sort] button::after{content:" \\2193"}th[aria-sort=ascending] button::after{content:" \\2191"}
.number{text-align:right;white-space:nowrap}.text{text-align:left;overflow-wrap:anywhere}.text:first-child{min-width:9.5rem}
.sha256{font:.8em ui-monospace,monospace;min-width:14rem}
details{margin-top:.6rem}summary{cursor:pointer;overflow-wrap:anywhere}
details table{margin-top:.4rem}
code{font-size:.85em;overflow-wrap:anywhere}
section>dl{margin:0}section>dl dt{font-weight:600}section>dl dd{margin:0 0 .5rem}
@media screen and (max-width:40rem){caption{white-space:normal}th button,td{padding:.25rem .4rem}th{padding:0}
section{padding:.9rem}.text:first-child{min-width:6.5rem}}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
@media print{body{background:#fff;font-size:10.5pt}main{max-width:none;padding:0}
section{border:0;border-top:1px solid var(--line);border-radius:0;padding:.8rem 0}
.tiles div,figure,table,tr{break-inside:avoid}h2{break-after:avoid}.scroll{overflow:visible}.map img{min-width:0}
details:not([open]){display:none}th[aria-sort] button::after{content:""}}
"""

_SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, table = head.closest("table"), body = table.tBodies[0];
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => {
      const cell = row.cells[head.cellIndex];
      return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
    };
    const order = (a, b) => typeof a === "number" && typeof b === "number" ? a - b
      : String(a).localeCompare(String(b), undefined, {numeric: true});
    const rows = Array.from(body.rows).sort((a, b) => (down ? -1 : 1) * order(key(a), key(b)));
    body.append(...rows);
  });
}
"""
