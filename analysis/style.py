"""How a method looks, everywhere: one colour, line and marker each, in figures and in the page alike.

The colours are Okabe and Ito's, safe for colour-blind readers; line and marker tell methods apart in black and white.
A layer-wise adaptive method has a strong colour and a thick solid line, its tuned base the same colour, thinner and
dashed; the other methods are thin, first-order ones dashed and second-order ones dash-dotted.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import matplotlib as mpl

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


STYLES = {
    "lw_sgdm": Style(RED, SOLID, "o", bold=True),
    "lw_adamw": Style(BLUE, SOLID, "s", bold=True),
    "sgdm": Style(RED, DASHED, "o"),
    "adamw": Style(BLUE, DASHED, "s"),
    "sgd": Style(ORANGE, DASHED, "v"),
    "adam": Style(SKY, DASHED, "^"),
    "kfac": Style(GREEN, DASHDOT, "D"),
    "shampoo": Style(PINK, DASHDOT, "P"),
    "tnt": Style(PURPLE, DASHDOT, "X"),
    "kbfgs": Style(BROWN, DASHDOT, "<"),
    "kbfgs_l": Style(BROWN, LONG, ">"),
    "mbf": Style(YELLOW, DASHDOT, "h"),
    "curvature_rescaling": Style(TEAL, LONG, "p"),
    "layer_specific": Style(OLIVE, DOTTED, "d"),
    "back_matching": Style(GREY, DOTTED, "*"),
}
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
    "figure.dpi": 100, "savefig.dpi": 160, "figure.titlesize": 11, "figure.titleweight": "bold",
    "pdf.fonttype": 42, "lines.solid_capstyle": "round", "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 5), "axes.formatter.use_mathtext": True,
}  # fmt: skip


def use() -> None:
    """Set matplotlib up: no window, the same fonts and sizes everywhere."""
    mpl.use("Agg")
    mpl.rcdefaults()
    mpl.use("Agg")
    mpl.rcParams.update(RC)
