"""Results as pictures: contenders side by side, and how safekern's time grows."""

from collections.abc import Sequence
from pathlib import Path

from safekern import plots
from safekern.bench.cases import OPS
from safekern.bench.results import Row, series, slopes


def plot_ops(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draws for every op the speed of its contenders against the baseline's, as ``OP.png``.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        FileAccessError: a file cannot be written.
    """
    paths = []
    for op in dict.fromkeys(row.op for row in rows):
        mine = [row for row in rows if row.op == op]
        settings = list(dict.fromkeys(row.setting for row in mine))
        names = list(dict.fromkeys(row.contender for row in mine))
        figure = plots.new_figure()
        figure.set_size_inches(8, 1.5 + 0.22 * len(settings) * len(names))
        axes = figure.subplots()
        for i, name in enumerate(names):
            bars = [(settings.index(r.setting) + i / (len(names) + 1), r.speedup) for r in mine if r.contender == name]
            positions, speeds = zip(*bars, strict=True)
            drawn = axes.barh(positions, speeds, height=0.9 / (len(names) + 1), label=name)
            axes.bar_label(drawn, fmt="%.2g", padding=2, fontsize=7)
        labels = [
            " ".join(filter(None, (dtype, f"{elements:,}", f"{ratio:.3g}" if ratio else "", f"{threads}t")))
            for _, dtype, elements, ratio, threads in settings
        ]
        axes.set_yticks([i + 0.4 for i in range(len(settings))], labels, fontsize=8)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlabel("speed against the baseline, which is the second in the legend")
        axes.set_title(f"{op}: {OPS[op].title}", fontsize=10)
        axes.legend(fontsize=8)
        paths.append(folder / f"{op}.png")
        plots.write(figure, paths[-1])
    return paths


def plot_scaling(rows: Sequence[Row], axis: str, path: Path) -> None:
    """Draws safekern's time along an axis, an op beside the other, with the fitted slopes in the legends.

    Args:
        rows: at several sizes or ratios.
        axis: as for :func:`slopes`.
        path: the image.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        FileAccessError: a file cannot be written.
    """
    fitted, lines = slopes(rows, axis), series(rows, axis)
    ops = list(dict.fromkeys(op for op, _, _ in lines))
    figure = plots.new_figure()
    figure.set_size_inches(3.2 * len(ops), 3.4)
    panels = figure.subplots(1, len(ops), sharey=True, squeeze=False)[0]
    for op, axes in zip(ops, panels, strict=True):
        for key, points in lines.items():
            _, dtype, threads = key
            if key[0] == op:
                slope = f"slope {fitted[key]:.2f}" if key in fitted else ""
                label = " ".join(filter(None, (dtype, f"{threads}t", slope)))
                axes.loglog(*zip(*points, strict=True), marker="o", markersize=4, label=label)
        axes.set_title(op, fontsize=10)
        axes.set_xlabel({"elements": "elements", "selected": "selected weights"}[axis])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    panels[0].set_ylabel("ms")
    plots.write(figure, path)
