"""A figure: one definition for the page and for PNG or SVG, in Vega-Lite, without colours of text and ground."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import altair as alt
import vl_convert
from altair.utils import schemapi

from ..outputs import write_whole
from .run import Run

SIZE = {"width": 480, "height": 240}
"""Pixels of an exported figure at scale 1; in the page the width is that of the column."""
VEGA_LITE = "6.4"
"""Version of Vega-Lite that draws the figures."""
FLOOR = 1e-4
"""Entropies below it, nats, are drawn at it."""
unchecked = partial(schemapi.debug_mode, False)
"""Decorates what makes charts: Altair does not check each part of each, half the time of a page. The tests do."""

NO_RECORDS = "It is made of token records (`record_tokens_every`), and none were found."
"""Why a figure of tokens is missing."""


@dataclass(frozen=True)
class Figure:
    """A figure, or why there is none."""

    name: str
    """Anchor in the page and stem of the file; letters, digits and hyphens."""
    title: str
    look: str
    """One sentence: what to look for."""
    chart: alt.TopLevelMixin | None = field(default=None, repr=False)
    missing: str = ""
    """Where there is no chart: what would make it appear."""

    @cached_property
    def spec(self) -> dict[str, Any]:
        """The Vega-Lite specification, as wide as what it is put into, without colours of text and ground.

        Raises:
            ValueError: there is no chart.
        """
        if self.chart is None:
            raise ValueError(f"there is no figure {self.name!r}: {self.missing}")
        words = f"{self.title}. {self.look}"
        chart = self.chart.properties(width="container", height=SIZE["height"], description=words)
        return chart.to_dict(validate=False)

    def _repr_png_(self) -> bytes | None:
        """In a notebook the figure shows itself; where it has no chart, its name and the reason stand there."""
        if self.chart is None:
            return None
        return vl_convert.vegalite_to_png({**self.spec, **SIZE}, VEGA_LITE, config=theme("light"), ppi=72)

    def save(self, file: Path, kind: Literal["png", "svg"]) -> None:
        """Write the figure as `drawn` gives it, in one piece.

        Raises:
            ValueError: there is no chart.
        """
        write_whole(file, self.drawn(kind))

    def drawn(self, kind: Literal["png", "svg"]) -> bytes:
        """The figure for a paper: light, without a title, PNG at 300 dpi.

        Raises:
            ValueError: there is no chart.
        """
        spec = {**self.spec, **SIZE}
        if kind == "svg":
            return vl_convert.vegalite_to_svg(spec, VEGA_LITE, config=theme("light")).encode()
        return vl_convert.vegalite_to_png(spec, VEGA_LITE, config=theme("light"), ppi=300)


OKABE_ITO = {
    "light": ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B5B5B"],
    "dark": ["#56B4E9", "#E69F00", "#2BBF94", "#CC79A7", "#D55E00", "#F0E442", "#B8B8B8"],
}
"""Colours of Okabe and Ito that every kind of colour vision can tell apart, ordered by contrast on each ground."""


def theme(mode: Literal["light", "dark"]) -> dict[str, Any]:
    """Vega's configuration for figures on a light or a dark ground."""
    ink, muted, grid, ground = {
        "light": ("#24262b", "#666b75", "#e9e7e2", "#ffffff"),
        "dark": ("#e7e6e3", "#9da2ab", "#2c3037", "#15171b"),
    }[mode]
    axis = {"labelColor": muted, "titleColor": muted, "gridColor": grid, "domainColor": grid, "tickColor": grid}
    text = {"titleFontWeight": "normal", "labelFontSize": 11, "titleFontSize": 11}
    line = {
        "symbolType": "stroke",
        "symbolStrokeWidth": 3,
        "symbolSize": 140,
        "symbolOpacity": 1,
        "symbolStrokeColor": ink,
    }
    return {
        "background": ground,
        "font": "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif",
        "view": {"stroke": None},
        "axis": {**axis, **text, "domain": False, "ticks": False, "labelPadding": 6, "titlePadding": 10},
        "axisX": {"grid": False, "domain": True, "ticks": True, "labelFlush": True},
        "legend": {"labelColor": ink, "titleColor": muted, **text, "orient": "top", "labelLimit": 260, **line},
        "range": {"category": OKABE_ITO[mode], "heatmap": {"scheme": "blues" if mode == "light" else "viridis"}},
        "rule": {"color": muted},
        "text": {"color": ink, "fontSize": 11},
        "mark": {"color": OKABE_ITO[mode][0]},
    }


def labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run: that of its folder, or its path where two are called the same."""
    count = Counter(run.name for run in runs)
    names = [printable(run.name if count[run.name] == 1 else str(run.folder)) for run in runs]
    return [name if names.count(name) == 1 else f"{n}: {name}" for n, name in enumerate(names, 1)]


def printable(name: str) -> str:
    """A name of a file as text that can be encoded: what is no Unicode becomes a question mark."""
    return name.encode("utf-8", "replace").decode("utf-8")


def short(value: float) -> float | None:
    """Six digits are more than a figure shows; what is no number has no place in it."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def visible(text: str, most: int = 40, *, marks: bool = True, tail: bool = False) -> str:
    """A text for readers: cut to its first, or last, `most` characters, its control characters shown.

    White space becomes a sign with `marks`, else blanks. Characters that do not print, such as those which turn
    the direction of writing, are written as their escapes.
    """
    cut = text[-most:] if tail else text[:most]
    signs = {" ": "␣", "\n": "↵", "\t": "⇥"} if marks else {" ": " ", "\n": " ", "\t": " "}
    shown = "".join(signs.get(c, c if c.isprintable() else f"\\u{ord(c):04x}") for c in cut)
    if len(cut) == len(text):
        return shown
    return f"…{shown}" if tail else f"{shown}…"


LOG = alt.Scale(type="log", nice=False, padding=8)
"""A logarithmic scale that ends where the data end."""


def entropy_channel(channel: type[alt.X] | type[alt.Y], shorthand: str, title: str) -> Any:
    """An axis of entropies, logarithmic."""
    return channel(shorthand, title=title, scale=LOG, axis=powers(-4, 2))


def powers(low: int, high: int) -> alt.Axis:
    """An axis with 1, 2 and 5 in each power of ten."""
    return alt.Axis(values=[m * 10.0**k for k in range(low, high) for m in (1, 2, 5)], format="~g")


def kinds(shorthand: str, names: list[str], symbol: str = "stroke") -> alt.Color:
    """A colour for each of these names, with a legend."""
    key = alt.Legend(title=None, symbolType=symbol, symbolStrokeWidth=3 if symbol == "stroke" else 0)
    return alt.Color(shorthand, legend=key, scale=alt.Scale(domain=names))


def rule_at(at: float, axis: str = "y") -> alt.Chart:
    """A dashed line across the figure."""
    rule = alt.Chart(alt.InlineData(values=[{"at": short(at)}])).mark_rule(strokeDash=[3, 3])
    return rule.encode(**{axis: "at:Q"})
