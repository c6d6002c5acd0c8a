"""Pages: one HTML file that needs no network, with figures, and no script but its own.

A template extends `page.html` (blocks `links` and `main`) and draws figures with the macro of `figures.html`.
Text of models and users reaches a page through autoescape or as JSON with < > & ' escaped, never otherwise.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from functools import cache
from importlib import resources
from importlib.metadata import version
from typing import Any

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined

import hapo

from ..outputs import remembered
from .figures import VEGA_LITE, Figure, theme


def render(template: str, *, title: str, nonce: str, figures: Sequence[Figure], **context: Any) -> str:
    """A page from a template of this package.

    Args:
        template: its file name.
        title: of the document.
        nonce: the only scripts that run are those which carry it; see `new_nonce`.
        figures: all that the template draws; without a chart among them the page holds no Vega.
        context: what else the template reads.
    """
    drawn = any(figure.chart is not None for figure in figures)
    shared = {
        "themes": {mode: theme(mode) for mode in ("light", "dark")} if drawn else None,
        "script": _script() if drawn else "",
        "version": hapo.__version__,
    }
    return _environment().get_template(template).render(title=title, nonce=nonce, **shared, **context)


def new_nonce() -> str:
    """A nonce for one page."""
    return secrets.token_urlsafe(16)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment


@cache
def _script() -> str:
    """Vega, Vega-Lite and Vega-Embed, with the script that draws the figures, as one script.

    Bundling them takes seconds, hence once for each version of what they are made of.
    """
    figures = resources.files(__package__).joinpath("templates", "figures.js").read_text(encoding="utf-8")
    of = hashlib.sha256(f"{version('vl-convert-python')} {VEGA_LITE} {figures}".encode()).hexdigest()
    bundle = remembered("figures.js", of, lambda: vl_convert.javascript_bundle(figures, VEGA_LITE))
    return bundle.replace("</script", "<\\/script")
