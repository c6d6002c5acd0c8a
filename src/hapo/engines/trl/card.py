"""The model card of a run: what the model is, how well it does, how to load it, whom to cite."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import SchedulerType, TrainingArguments

import hapo

from ...method import Method
from ...methods import options_of
from ...supervised import Supervised
from ..estimate import Estimate
from ..records import PACKAGES
from .recorder import options_told

BUNDLED = Path(hapo.__file__).parent / "assets"


def model_card(
    args: TrainingArguments,
    method: Method | Supervised,
    *,
    recipe: dict[str, Any],
    base: str,
    adapter: str | None,
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    step: int,
    tags: Sequence[str],
    hub_id: str | None,
    weights: str,
) -> ModelCard:
    """The card of a run's model. It names no path of the machine.

    Args:
        args: what the run was told. Accuracies are those in the evaluations.jsonl of its output folder.
        method: it was trained with.
        recipe: what the run was told beside. The task is the recipe's.
        base: name or path of the model it was made from; empty where there is none.
        adapter: type of the PEFT adapter that the weights are; None of a whole model.
        data, settings: further facts by name, of what it learnt from and of the training; None is none.
        step: optimiser steps so far.
        tags: beside that of the method.
        hub_id: repository on the Hub, if the model goes to one.
        weights: what `from_pretrained` takes, seen from the folder of the card; or `hub_id`.
    """
    named, base_id = _base(base)
    facts = {
        "base model": named,
        "task": _task(recipe),
        **data,
        **_accuracies(Path(args.output_dir) / "evaluations.jsonl"),
        "method": f"`{method.name}`",
        "optimiser steps": step,
        "learning rate": f"{args.learning_rate:g}, {SchedulerType(args.lr_scheduler_type).value}",
        **settings,
        "seed": args.seed,
        "versions": ", ".join(f"{package} {version}" for package, version in _versions().items()),
    }
    header = ModelCardData(
        library_name="peft" if adapter else "transformers",
        base_model=base_id,
        tags=["generated_from_trainer", *tags, method.name],
    )
    return ModelCard.from_template(
        header,
        template_str=resources.files(__package__).joinpath("card.md").read_text(encoding="utf-8"),
        title=hub_id or Path(args.output_dir).resolve().name,
        facts={fact: value for fact, value in facts.items() if value is not None},
        weights=weights,
        local=weights != hub_id,
        adapter=adapter,
        options=yaml.safe_dump({"method": method.name, **options_told(method)}, sort_keys=False),
        citation=_citation(method.name),
    )


def _base(name: str) -> tuple[str, str | None]:
    """The base model in words, and its id on the Hub if it has one."""
    path = Path(name)
    if name in ("tiny", "diffusion_tiny") or path.parent == BUNDLED:
        return f"`{path.name}`, the small model that hapo brings", None
    if not name:
        return "made in the training script", None
    if path.is_absolute() or path.exists():
        return f"`{path.resolve().name}`, from a folder", None
    return f"[{name}](https://huggingface.co/{name})", name


def _task(recipe: dict[str, Any]) -> str | None:
    """The data set's name; of a file, the last part of its path. A recipe leaves out what is the default."""
    if not recipe:
        return None
    name = str(recipe.get("dataset", "addition"))
    return f"`{Path(name).name if Path(name).suffix else name}`"


def _accuracies(file: Path) -> dict[str, str]:
    """The last measurement of each kind, with the optimiser step that it was made after."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    last = {line["how"]: line for line in lines}
    return {
        f"held out, {how}": f"{Estimate.of(line)} on {line['problems']} problems, after step {line['step']}"
        for how, line in last.items()
    }


def _versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def _citation(method: str) -> str:
    """BibTeX of the method's paper; for a method of one's own, what to cite in its place."""
    if method not in hapo.methods():
        return f"`{method}` is a method of the authors' own: ask them."
    paper = options_of(method).paper
    fields = {
        "title": f"{{{paper.title}}}",
        "year": paper.year,
        "eprint": paper.arxiv,
        "archivePrefix": "arXiv",
    }
    entry = "".join(f"  {key} = {{{value}}},\n" for key, value in fields.items())
    return f"```bibtex\n@misc{{{method}{paper.year},\n{entry}}}\n```"
