"""Prints the tables of docs/methods/index.md, made from the registered methods.

    python scripts/method_table.py            # print
    python scripts/method_table.py --write    # put them into the page

tests/test_docs.py fails while the page differs.
"""

from __future__ import annotations

import argparse
import inspect
import re
from pathlib import Path

import hapo
from hapo.cli.cards import differences
from hapo.methods import options_of

PAGE = Path(__file__).parents[1] / "docs/methods/index.md"
BEGIN, END = "<!-- made by scripts/method_table.py -->", "<!-- end -->"
BEFORE = {
    "temperature": "T_base",
    "filter": "all groups",
    "advantage": "",
    "signal": "none",
    "keep": "all tokens",
}
LOSS = {"ratio": "of each token", "reshape": "none", "bounds": "", "surrogate": "", "penalty": "", "reduce": ""}
"""Stages in their order, before the loss and in it, with what GRPO does where its own `stages` do not say."""
EQUATION = re.compile(r"\beqs?\. (\d+(?:-\d+)?)")


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(map(row, [head, ["---"] * len(head), *rows]))


def papers() -> str:
    """Method, what it does, paper, equations (as the class docstring cites them), deviations."""
    head = ["method", "in one line", "paper", "equations", "paper and code"]
    rows = []
    for name in hapo.methods():
        cls = options_of(name)
        paper = cls.paper
        equations = dict.fromkeys(EQUATION.findall(inspect.getdoc(cls) or ""))
        rows.append(
            [
                f"[{name}]({name}.md)",
                cls.summary,
                f"{paper.title}, {paper.year}, [arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})",
                ", ".join(equations).replace("-", "–"),
                f"[deviations]({name}.md#paper-and-released-code)",
            ]
        )
    return table(head, rows)


def stages(columns: dict[str, str]) -> str:
    """One column a stage: GRPO's choices in full, then the methods that differ in one, with just that."""
    rows = {"grpo": {**columns, **options_of("grpo").stages}}
    rows |= {name: differences(options_of(name)) for name in hapo.methods() if name != "grpo"}
    unknown = {stage for choices in rows.values() for stage in choices} - {*BEFORE, *LOSS}
    if unknown:
        raise ValueError(f"stages {sorted(unknown)} have no place in the order of {Path(__file__).name}: add them")
    return table(
        ["method", *columns],
        [
            [f"[{name}]({name}.md)", *(choices.get(stage, "") for stage in columns)]
            for name, choices in rows.items()
            if choices.keys() & columns
        ],
    )


def tables() -> str:
    parts = {
        "Papers": papers(),
        "Stages of sampling, prepare and step": stages(BEFORE),
        "Stages of the loss": stages(LOSS),
    }
    return "\n\n".join([BEGIN, *(f"## {title}\n\n{text}" for title, text in parts.items()), END])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"put them into {PAGE.name} instead of printing")
    if parser.parse_args().write:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(before + tables() + rest.split(END)[1])
    else:
        print(tables())
