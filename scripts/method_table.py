"""Prints the two tables of docs/methods/index.md, made from the registered methods.

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
from hapo.methods import options_of

PAGE = Path(__file__).parents[1] / "docs/methods/index.md"
BEGIN, END = "<!-- made by scripts/method_table.py -->", "<!-- end -->"
STAGES = (
    "temperature",
    "filter",
    "advantage",
    "signal",
    "keep",
    "ratio",
    "reshape",
    "bounds",
    "surrogate",
    "penalty",
    "reduce",
)
EQUATION = re.compile(r"\beqs?\. (\d+(?:-\d+)?)")


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(map(row, [head, ["---"] * len(head), *rows]))


def papers() -> str:
    """Method, paper, equations (as the class docstring cites them), module, tests, and what it does."""
    head = ["method", "paper", "year", "equations", "module", "worked example", "in one line", "paper and code"]
    rows = []
    for name in hapo.methods():
        cls = options_of(name)
        equations = dict.fromkeys(EQUATION.findall(inspect.getdoc(cls) or ""))
        rows.append(
            [
                f"[{name}]({name}.md)",
                f"{cls.paper.title}, [arXiv {cls.paper.arxiv}](https://arxiv.org/abs/{cls.paper.arxiv})",
                str(cls.paper.year),
                ", ".join(equations).replace("-", "–"),
                f"`{cls.__module__}`",
                f"`tests/methods/test_worked_examples.py -k {name}`",
                cls.summary,
                f"[deviations]({name}.md#paper-and-released-code)",
            ]
        )
    return table(head, rows)


def stages() -> str:
    """One row a method, one column a stage that some method sets; bold where it differs from GRPO."""
    names = hapo.methods()
    unknown = {stage for name in names for stage in options_of(name).stages} - set(STAGES)
    if unknown:
        raise ValueError(f"stages {sorted(unknown)} have no place in the order of {Path(__file__).name}: add them")
    used = [stage for stage in STAGES if any(stage in options_of(name).stages for name in names)]
    base = options_of("grpo").stages

    def cell(name: str, stage: str) -> str:
        text = options_of(name).stages.get(stage, "–")
        return text if text == base.get(stage, "–") else f"**{text}**"

    return table(["method", *used], [[name, *(cell(name, stage) for stage in used)] for name in names])


def tables() -> str:
    return f"{BEGIN}\n\n## Papers\n\n{papers()}\n\n## Stages\n\n{stages()}\n\n{END}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"put them into {PAGE.name} instead of printing")
    if parser.parse_args().write:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(before + tables() + rest.split(END)[1])
    else:
        print(tables())
