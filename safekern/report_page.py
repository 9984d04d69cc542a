"""One HTML page about a mask, that needs nothing but itself.

Names, descriptions and numbers come from files of any origin. So everything is escaped, and the page forbids itself
whatever it does not bring along: no network, no script and no style but its own.
"""

import base64
import hashlib
import html
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from safekern import plots
from safekern.report import Audit
from safekern.tables import Column, Table, counted, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARK = " - safekern report</title>"
"""Near the beginning of every page."""


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
        f"<title>{_text(audit.files[0].name)}{MARK}\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _header(audit: Audit) -> str:
    meta = audit.mask.meta
    layers = len({cell.layer for cell in audit.summary if cell.layer is not None})
    model = meta.get("model")
    named = _text(model) if isinstance(model, str) and model else "not named in the file"
    facts = [f"{audit.mask.model_numel:,} weights"]
    if layers:
        facts.append(f"selected from in {counted(layers, 'layer')}, {counted(len(audit.mask), 'parameter')}")
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
        f"in {unused:,} of {counted(len(audit.experts), 'expert')} none is."
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
    zeros = f", and {counted(every.zeros, 'weight')} with an ESI of zero" if every.zeros else ""
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
    rows = counted(len(table.rows), "row")
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


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


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
