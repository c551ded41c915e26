"""How figures look, and how a method does everywhere: one colour, line and marker, in figures and page alike.

The colours are Okabe and Ito's, safe for colour-blind readers; line and marker tell methods apart in black and white.
A layer-wise adaptive method has a strong colour and a thick solid line, its tuned base the same colour, thinner and
dashed. Many methods are drawn as small multiples, a panel per group with the layer-wise methods in each.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from scipy.optimize import isotonic_regression

OLIVE, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#667022", "#e69f00", "#56b4e9", "#009e73", "#b5a800", "#0072b2", "#d55e00", "#cc79a7",
)  # fmt: skip
GREY, BROWN, PURPLE, TEAL = "#7f7f7f", "#8c564b", "#7b5ea7", "#3a8f9d"
SOLID, DASHED, DOTTED, DASHDOT, LONG = "-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2))


@dataclass(frozen=True)
class Style:
    """Colour, line and marker of one method; `bold` methods are drawn thick and on top."""

    color: str
    line: object
    marker: str
    bold: bool = False

    @property
    def width(self) -> float:
        return 2.4 if self.bold else 1.3

    def plot(self) -> dict:
        """Keyword arguments for matplotlib's plot."""
        return {
            "color": self.color, "linestyle": self.line, "marker": self.marker, "linewidth": self.width,
            "markersize": 5.5 if self.bold else 4, "zorder": 4 if self.bold else 3, "markeredgecolor": "white",
            "markeredgewidth": 0.5,
        }  # fmt: skip

    def dashes(self) -> str:
        """The line pattern as SVG's stroke-dasharray, in pixels."""
        return "" if self.line == SOLID else " ".join(f"{self.width * part:g}" for part in self.line[1])


# Methods by the group they are drawn in; within a group colours differ, over all groups line and marker do.
GROUPS = {
    "Layer-wise": {
        "lw_sgdm": Style(RED, SOLID, "o", bold=True),
        "lw_adamw": Style(BLUE, SOLID, "s", bold=True),
    },
    "First order": {
        "sgdm": Style(RED, DASHED, "o"),
        "adamw": Style(BLUE, DASHED, "s"),
        "sgd": Style(ORANGE, DASHED, "v"),
        "adam": Style(SKY, DASHED, "^"),
        "lars": Style(PINK, DASHED, "<"),
        "lamb": Style(GREEN, DASHED, "h"),
        "muon": Style(PURPLE, DASHED, "P"),
    },
    "Adaptive rates": {
        "curvature_rescaling": Style(TEAL, LONG, "p"),
        "layer_specific": Style(OLIVE, DOTTED, "d"),
        "back_matching": Style(GREY, DOTTED, "*"),
        "prodigy": Style(GREEN, DOTTED, "o"),
        "dadaptation": Style(ORANGE, DOTTED, "s"),
        "dog": Style(PINK, DOTTED, "^"),
        "schedulefree": Style(PURPLE, LONG, "v"),
        "gen_sgdm": Style(BROWN, DOTTED, "P"),
        "gen_adamw": Style(SKY, DOTTED, "X"),
    },
    "Second order": {
        "kfac": Style(GREEN, DASHDOT, "D"),
        "shampoo": Style(PINK, DASHDOT, "P"),
        "tnt": Style(PURPLE, DASHDOT, "X"),
        "mbf": Style(YELLOW, DASHDOT, "h"),
        "kbfgs": Style(BROWN, DASHDOT, "<"),
        "kbfgs_l": Style(ORANGE, LONG, ">"),
        "shampoo_grafted": Style(GREY, DASHDOT, "o"),
        "soap": Style(TEAL, DASHDOT, "s"),
        "adahessian": Style(OLIVE, DASHDOT, "^"),
    },
}
STYLES = {name: look for group in GROUPS.values() for name, look in group.items()}
KINDS = {"layerwise": "Layer-wise", "first_order": "First order", "second_order": "Second order"}


def style(optimizer: str) -> Style:
    """The method's style; a method without an entry gets one from its name, the same every time."""
    if optimizer in STYLES:
        return STYLES[optimizer]
    number = zlib.crc32(optimizer.encode())
    colors = (GREY, BROWN, PURPLE, TEAL, PINK, GREEN, ORANGE, SKY, OLIVE)
    bold = optimizer.startswith("lw_")
    line = SOLID if bold else (DOTTED, LONG, DASHDOT)[number // 64 % 3]
    return Style(colors[number % len(colors)], line, "ov^<>sphXDd"[number // 8 % 11], bold=bold)


def group(optimizer: str, kind: str) -> str:
    """The group a method is drawn in: the table's, else by its kind."""
    return next((name for name, members in GROUPS.items() if optimizer in members), KINDS.get(kind, kind))


def order(optimizers) -> list[str]:
    """Methods in the order of every legend and table: the table above, then the others by name."""
    known = list(STYLES)
    return sorted(set(optimizers), key=lambda name: (known.index(name) if name in STYLES else len(known), name))


RC = {
    "font.family": "DejaVu Sans", "font.size": 8.5, "axes.titlesize": 9.5, "axes.titleweight": "regular",
    "axes.titlelocation": "left", "axes.labelsize": 8.5, "axes.labelcolor": "#444444", "axes.edgecolor": "#999999",
    "axes.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "xtick.color": "#999999",
    "ytick.color": "#999999", "xtick.labelcolor": "#444444", "ytick.labelcolor": "#444444", "xtick.labelsize": 8,
    "ytick.labelsize": 8, "legend.frameon": False, "legend.fontsize": 8, "legend.handlelength": 3.2,
    "figure.dpi": 100, "savefig.dpi": 160, "figure.titlesize": 12, "figure.titleweight": "regular",
    "pdf.fonttype": 42, "lines.solid_capstyle": "round", "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 5), "axes.formatter.use_mathtext": True,
}  # fmt: skip


def use() -> None:
    """Set matplotlib up: no window, the same fonts and sizes everywhere."""
    mpl.use("Agg")
    mpl.rcdefaults()
    mpl.use("Agg")
    mpl.rcParams.update(RC)


PANEL, HEIGHT, LEGEND = 4.1, 3.3, 1.75  # inches
PLOT, NAMES = 2.35, 1.75  # inches of a panel in small multiples, and of the names on its right


def multiples(title: str, rows: int, columns: int, plot: float = PLOT, note: str = "") -> tuple[Figure, np.ndarray]:
    """A grid of panels with room for names to the right of each; `plot` is a panel's width in inches."""
    use()
    width, height, gap = 0.75 + columns * (plot + NAMES), plot + 0.25, 0.62
    tall = 0.85 + rows * (height + gap)
    figure, axes = plt.subplots(rows, columns, figsize=(width, tall), squeeze=False)
    figure.subplots_adjust(
        left=0.75 / width, right=1 - NAMES / width, top=1 - 0.85 / tall, bottom=(gap - 0.1) / tall,
        wspace=NAMES / plot, hspace=gap / height,
    )  # fmt: skip
    _titles(figure, title, note)
    return figure, axes


def canvas(
    title: str, panels: int, rows: int = 1, height: float = HEIGHT, note: str = "", entries: int = 0
) -> tuple[Figure, np.ndarray]:
    """A grid of panels in fixed inches, with room on the right for a legend of so many `entries`.

    `note` stands below the title.
    """
    height = max(height, (0.175 * entries + 0.55) / rows)
    use()
    width, tall = panels * PANEL + LEGEND + 0.12, rows * height + 0.35
    figure, axes = plt.subplots(rows, panels, figsize=(width, tall), squeeze=False)
    figure.subplots_adjust(
        left=0.74 / width, right=1 - (LEGEND + 0.1) / width, top=1 - 0.72 / tall, bottom=0.5 / tall,
        wspace=0.68 / (PANEL - 0.68), hspace=0.78 / (height - 0.78),
    )  # fmt: skip
    _titles(figure, title, note)
    return figure, axes


def _titles(figure: Figure, title: str, note: str) -> None:
    width, tall = figure.get_size_inches()
    figure.suptitle(title, x=0.12 / width, y=1 - 0.1 / tall, ha="left", va="top", color="#222222")
    figure.text(0.12 / width, 1 - 0.33 / tall, note, ha="left", va="top", color="#666666", fontsize=7.5)


def heading(text: str) -> Line2D:
    """A legend entry that heads those below it."""
    return Line2D([], [], linestyle="none", label=text, gid="heading")


def method_handles(entries: list[tuple[str, str, str]]) -> list[Line2D]:
    """Legend entries of methods, by group; `entries` are (optimizer, label, group)."""
    handles = []
    for name in dict.fromkeys(of for *_, of in entries):
        members = [(optimizer, label) for optimizer, label, of in entries if of == name]
        handles += [heading(name), *(Line2D([], [], label=label, **style(o).plot()) for o, label in members)]
    return handles


def legend(figure: Figure, handles: list[Line2D]) -> None:
    """The legend outside the axes, on the right."""
    width, tall = figure.get_size_inches()
    place = (1 - (LEGEND + 0.05) / width, 1 - 0.62 / tall)
    box = figure.legend(handles=handles, loc="upper left", bbox_to_anchor=place, borderaxespad=0, labelspacing=0.45)
    for handle, text in zip(handles, box.get_texts(), strict=True):
        if handle.get_gid() == "heading":
            text.set_color("#8a8a8a")


def shade(optimizer: str, methods: int) -> dict:
    """How a band is filled: fainter where many would lie on each other."""
    look = style(optimizer)
    return {"color": look.color, "alpha": 0.16 if look.bold else 0.08 if methods <= 6 else 0.04, "linewidth": 0}


def names_at_ends(axis, ends: list[tuple[str, str, float, float]]) -> None:
    """The name of each line to the right of its panel at the height where it ends; `ends` are (optimizer, name, x, y).

    Names that would overlap are moved apart; a thin line leads from the line's end to its name. Axis limits must stand.
    """
    known = [end for end in ends if np.isfinite(end[3])]
    if not known:
        return
    to_axes = axis.transData + axis.transAxes.inverted()
    at = np.clip([to_axes.transform((x, y)) for *_, x, y in known], 0, 1)
    gap = 9.5 / 72 / (axis.get_position().height * axis.figure.get_figheight())
    levels, looks = spread_out(at[:, 1], gap), [style(optimizer) for optimizer, *_ in known]
    leads = [
        [(x, y), (1.02, level if x > 0.98 else y), (1.05, level)] for (x, y), level in zip(at, levels, strict=True)
    ]
    colors = [look.color for look in looks]
    axis.add_collection(
        LineCollection(leads, colors=colors, linewidths=0.7, linestyles=":", transform=axis.transAxes, clip_on=False),
        autolim=False,
    )
    for (_, name, *_), look, level in zip(known, looks, levels, strict=True):
        axis.plot([1.085], [level], marker=look.marker, color=look.color, markersize=4, transform=axis.transAxes,
                  clip_on=False)  # fmt: skip
        axis.text(1.12, level, name, transform=axis.transAxes, va="center", fontsize=8.5 if look.bold else 7.5,
                  color=look.color if look.bold else "#333333")  # fmt: skip


def spread_out(positions, gap: float) -> np.ndarray:
    """Positions in [0, 1] moved as little as can be (least squares) so that neighbours are `gap` apart.

    >>> spread_out([0.5, 0.5, 0.0], 0.1).round(2).tolist()
    [0.45, 0.55, 0.0]
    """
    positions = np.asarray(positions, float)
    ranked, steps = np.argsort(positions, kind="stable"), gap * np.arange(len(positions))
    level = isotonic_regression(positions[ranked] - steps).x
    result = np.empty_like(positions)
    result[ranked] = np.clip(level, 0, max(0.0, 1 - steps[-1])) + steps
    return result


def value_axis(axis, values, accuracy: bool, ceiling: float | None = None) -> None:
    """Losses on a logarithmic axis where they span more than a factor 3, cut above the first value of the runs."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if ceiling is not None and np.isfinite(ceiling) and not accuracy:
        values = values[values <= ceiling * 1.05]
    if not len(values):
        return
    low, high = values.min(), values.max()
    if not accuracy and low > 0 and high / low > 3:
        log_axis(axis, values)
    else:
        room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        axis.set_ylim(low - room, high + room)


def log_axis(axis, values) -> None:
    """A logarithmic axis for the positive ones of the values and a little more, with plain short numbers at it."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values) & (values > 0)]
    low, high = (values.min(), values.max()) if len(values) else (1.0, 1.0)
    ratio = max(high / low, 1.5)
    axis.set_yscale("log")
    axis.set_ylim(low / ratio**0.05, high * ratio**0.05)
    subs = (1.0,) if ratio > 1e3 else (1.0, 2.0, 5.0) if ratio > 10 else (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    axis.yaxis.set_major_locator(LogLocator(subs=subs))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
