"""What the documentation says of methods and engines, made from the code: a hook of mkdocs (mkdocs.yml).

When the documentation is built, the methods' pages get their places in the navigation, their classes and the parts
theirs on the API page, and the index its tables. README.md's list, which GitHub shows as it is, is written anew; a
test fails while it differs. By hand: `python scripts/docs_from_code.py`.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import GRPOConfig

import hapo
import hapo.parts
from hapo.cli.cards import REFERENCE, differences
from hapo.engines.trl.options import DECIDED_BY_METHOD, READ
from hapo.methods import options_of
from hapo.versions import ACCEPTED, ENGINES, SETS, VLLM

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs/methods"
BEGIN, END = "<!-- methods: made by scripts/docs_from_code.py -->", "<!-- end of methods -->"
EQUATION = re.compile(r"\beqs?\. (\d+(?:-\d+)?)")


def titles() -> dict[str, str]:
    """Method -> its name in words, the beginning of its page's heading; HAPO first."""
    found = {name: re.match(r"# ([^:\n]+)", (PAGES / f"{name}.md").read_text()) for name in hapo.methods()}
    names = {name: match[1].strip() for name, match in found.items() if match}
    return dict(sorted(names.items(), key=lambda item: (item[0] != "hapo", item[1].lower())))


def navigation() -> list[Any]:
    """Of each method its page, and the pages NAME_*.md beside it."""
    entries: list[Any] = ["methods/index.md"]
    for name, title in titles().items():
        entries.append({title: f"methods/{name}.md"})
        for page in sorted(PAGES.glob(f"{name}_*.md")):
            if page.stem not in hapo.methods():
                rest = page.stem.removeprefix(f"{name}_").replace("_", " ")
                entries.append({f"{title}: {rest}": f"methods/{page.name}"})
    return entries


def directives(names: list[str]) -> str:
    return "\n\n".join(f"::: {name}" for name in names)


def api_of_methods() -> str:
    return directives([f"{cls.__module__}.{cls.__name__}" for cls in map(options_of, titles())])


def api_of_parts() -> str:
    return directives([f"hapo.parts.{m.name}" for m in pkgutil.iter_modules(hapo.parts.__path__)])


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def papers() -> str:
    """Method, kind, what it does, paper, equations (as the class docstring cites them), deviations."""
    rows = []
    for name, title in titles().items():
        cls = options_of(name)
        equations = dict.fromkeys(EQUATION.findall(inspect.getdoc(cls) or ""))
        rows.append(
            [
                f"[{title}]({name}.md)",
                cls.kind,
                cls.summary,
                f"{cls.paper.title}, {cls.paper.year}, [arXiv {cls.paper.arxiv}]"
                f"(https://arxiv.org/abs/{cls.paper.arxiv})",
                ", ".join(equations).replace("-", "–"),
                f"[deviations]({name}.md#paper-and-released-code)",
            ]
        )
    return table(["method", "kind", "in one line", "paper", "equations", "paper and code"], rows)


def stages() -> str:
    """The parts of GRPO and of SFT in full, then of each method those that differ from the one of its kind."""
    rows = []
    kinds, first = hapo.methods(), REFERENCE.values()
    for name, title in sorted(titles().items(), key=lambda item: (kinds[item[0]], item[0] not in first)):
        chosen = hapo.method(name).stages if name in first else differences(name)
        for i, (stage, part) in enumerate(chosen.items()):
            rows.append(["" if i else f"[{title}]({name}.md)", stage, part if part == "none" else f"`{part}`"])
    return table(["method", "stage", "part"], rows)


def readme() -> str:
    """The methods by what drives them: entropies, other figures of rollouts, or demonstrations."""
    families: dict[str, list[str]] = {"entropy decides": [], "the others": [], "demonstrations": []}
    for name, title in titles().items():
        reads = any("entropy" in part for part in hapo.method(name).stages.values())
        family = "entropy decides" if reads else "the others"
        if hapo.methods()[name] == "supervised":
            family = "demonstrations"
        families[family].append(f"[{title}](docs/methods/{name}.md)")
    rows = [f"| {family} | {', '.join(links)} |" for family, links in families.items()]
    count = f"All {len(hapo.methods())} [methods](docs/methods/index.md), by what drives them:"
    return "\n".join([BEGIN, count, "", "| | |", "|---|---|", *rows, END])


def write_readme() -> None:
    """Put the list into README.md, where it differs."""
    file = ROOT / "README.md"
    text = file.read_text()
    before, rest = text.split(BEGIN)
    written = before + readme() + rest.split(END)[1]
    if written != text:
        file.write_text(written)


def trl_options() -> str:
    """Each option of TRL's GRPOConfig: who acts on it, and how."""
    own = {f.name for f in fields(TrainingArguments)}
    rows = []
    for f in fields(GRPOConfig):
        if f.name in own:
            continue
        who, what = "TRL's", ""
        if f.name in DECIDED_BY_METHOD:
            who, what = "the method", DECIDED_BY_METHOD[f.name]
        elif f.name in READ:
            who, what = "read", READ[f.name]
        rows.append([f"`{f.name}`", who, what])
    return table(["option", "", "instead, or how"], rows)


def engines() -> str:
    """What each engine can do, and the releases that hapo accepts of it."""
    rows = []
    for engine in ENGINES:
        package = engine.packages[0]
        accepted = f"{package} {ACCEPTED[package]}" if package in ACCEPTED else "any"
        rows.append([f"[{engine.name}]({engine.page})", accepted, engine.methods, engine.temperature])
    return table(["engine", "accepted", "methods", "adaptive temperature"], rows)


def told() -> str:
    """What each engine with rollouts tells of a draw."""
    rows = [[e.name, e.logps, e.support, e.entropies] for e in ENGINES if e.draws]
    return table(["engine", "log-probs", "support of a truncated draw", "entropies"], rows)


def tested_sets() -> str:
    """The releases that were run together."""
    packages = ["trl", "verl", "vllm", "transformers", "torch"]
    rows = []
    for tested in SETS:
        trainer = "no trainer" if tested.trainer == "none" else tested.trainer
        rows.append([trainer, *(tested.versions.get(name, "") for name in packages), f"`{tested.command}`"])
    return table(["training with", *packages, "run by"], rows)


def vllm_releases() -> str:
    """Each release of vLLM in which the adaptive temperature is accepted."""
    rows = [[r.minor, r.runners, f"`{r.torch}`", f"`{r.transformers}`", r.tested] for r in VLLM]
    return table(["vLLM", "model runners", "torch", "transformers", "run with hapo"], rows)


MADE = {
    "<!-- made: the options of every method -->": api_of_methods,
    "<!-- made: every part -->": api_of_parts,
    "<!-- made: the papers -->": papers,
    "<!-- made: the stages -->": stages,
    "<!-- made: TRL's options -->": trl_options,
    "<!-- made: the engines -->": engines,
    "<!-- made: what is told of a draw -->": told,
    "<!-- made: the tested sets -->": tested_sets,
    "<!-- made: the releases of vLLM -->": vllm_releases,
}
"""Comment on a page -> what takes its place."""


def on_config(config: Any) -> Any:
    """mkdocs: the methods' pages in the navigation."""
    write_readme()
    for entry in config["nav"]:
        if "Methods" in entry:
            entry["Methods"] = [*navigation(), *entry["Methods"]]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs: the tables and the directives."""
    for comment, make in MADE.items():
        if comment in markdown:
            markdown = markdown.replace(comment, make())
    return markdown


if __name__ == "__main__":
    write_readme()
