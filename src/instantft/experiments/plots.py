"""The pictures of the report, as PNG. matplotlib is an extra, and is imported only here."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from .core import extra

__all__ = ["bars", "curves", "scatter"]

COLOURS = (
    "#c0392b",
    "#2980b9",
    "#27ae60",
    "#e67e22",
    "#8e44ad",
    "#16a085",
    "#7f8c8d",
    "#2c3e50",
    "#d35400",
    "#f39c12",
)
MARKERS = "osD^vP*Xdh"


def curves(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    *,
    x: str | Mapping[str, str],
    y: str,
    lines: Mapping[str, Mapping[str, float]] | None = None,
    markers: bool = True,
) -> bytes:
    """Lines side by side.

    Args:
        panels: title to label to (xs, ys).
        x, y: names of the axes; x by title where panels differ.
        lines: title to label to a height at which a dotted line is drawn.
        markers: whether every point is marked.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), dpi=110, squeeze=False, sharey=True)
    for ax, (title, series) in zip(axes[0], panels.items(), strict=True):
        for n, (label, (xs, ys)) in enumerate(series.items()):
            style = {"marker": MARKERS[n % len(MARKERS)], "markersize": 5} if markers else {}
            dashes = "--" if n % 2 else "-"  # so that a line on top of its neighbour does not hide it
            ax.plot(xs, ys, label=label, color=COLOURS[n % len(COLOURS)], linewidth=1.5, linestyle=dashes, **style)
        for label, height in ((lines or {}).get(title) or {}).items():
            ax.axhline(height, color="#7f8c8d", linestyle=":", linewidth=1.2, label=label)
        ax.set_title(title, fontsize=11)
        ax.set_xlabel(x if isinstance(x, str) else x[title])
        _tidy(ax)
    axes[0][0].set_ylabel(y)
    _legend(figure, axes[0])
    return _png(plt, figure)


def bars(groups: Mapping[str, Mapping[str, float]], *, y: str, log: bool = False) -> bytes:
    """Bars in groups: label to group to height."""
    plt = _pyplot()
    names = list(dict.fromkeys(name for heights in groups.values() for name in heights))
    figure, ax = plt.subplots(figsize=(max(7.0, 0.28 * len(names) * len(groups) + 3), 4.4), dpi=110)
    width = 0.8 / len(groups)
    for n, (label, heights) in enumerate(groups.items()):
        at = [names.index(name) + (n - (len(groups) - 1) / 2) * width for name in heights]
        ax.bar(at, list(heights.values()), width * 0.92, label=label, color=COLOURS[n % len(COLOURS)], zorder=2)
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=9)
    if log:
        ax.set_yscale("log")
        _plain_ticks(ax.yaxis, *ax.get_ylim())
    ax.set_ylabel(y)
    _tidy(ax)
    _legend(figure, [ax])
    return _png(plt, figure)


def scatter(
    points: Mapping[str, tuple[float, float]], *, x: str, y: str, line: tuple[str, float] | None = None
) -> bytes:
    """Points with their names, x on a log scale; `line`: a name and a height at which a dotted line is drawn."""
    plt = _pyplot()
    figure, ax = plt.subplots(figsize=(7.5, 4.8), dpi=110)
    for n, (name, (at, height)) in enumerate(points.items()):
        ax.scatter(
            [at],
            [height],
            s=70,
            color=COLOURS[n % len(COLOURS)],
            marker=MARKERS[n % len(MARKERS)],
            label=name,
            zorder=3,
        )
    ax.set_xscale("log")
    _plain_ticks(ax.xaxis, *ax.get_xlim())
    if line is not None:
        ax.axhline(line[1], color="#7f8c8d", linestyle=":", linewidth=1.2, label=line[0])
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    _tidy(ax)
    _legend(figure, [ax])
    return _png(plt, figure)


def _tidy(ax: Any) -> None:
    ax.grid(True, which="major", color="#ecf0f1", zorder=0)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _plain_ticks(axis: Any, low: float, high: float) -> None:
    """1, 2 and 5 of every power of ten, without powers."""
    ticks = [m * 10.0**e for e in range(-9, 9) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    axis.set_ticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_ticks([], minor=True)


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    """One for all panels, to the right of them."""
    found: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        list(found.values()), list(found), loc="center left", bbox_to_anchor=(1.0, 0.55), frameon=False, fontsize=9
    )


def _pyplot() -> Any:
    extra("matplotlib", "matplotlib").use("Agg")
    return extra("matplotlib.pyplot", "matplotlib")


def _png(plt: Any, figure: Any) -> bytes:
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()
