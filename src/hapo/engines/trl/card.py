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

from ...methods import Paper, options_of
from ..estimate import Estimate
from ..records import PACKAGES

BUNDLED = Path(hapo.__file__).parent / "assets"


def model_card(
    folder: Path,
    method: str,
    options: Mapping[str, Any],
    paper: Paper | None,
    *,
    base: str,
    adapter: str | None,
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    step: int,
    seed: int,
    tags: Sequence[str] = (),
    hub_id: str | None = None,
    weights: str,
) -> ModelCard:
    """The card of a run's model. It names no path of the machine.

    Args:
        folder: of the run. Accuracies are those in its evaluations.jsonl.
        method, options, paper: it was trained with; no paper is that of a method of one's own.
        base: name or path of the model it was made from; empty where there is none.
        adapter: type of the PEFT adapter that the weights are; None of a whole model.
        data, settings: further facts by name, of what it learnt from and of the training; None is none.
        step: optimiser steps so far.
        seed: of the run.
        tags: beside that of the method; "trl" of a model that TRL trained.
        hub_id: repository on the Hub, if the model goes to one.
        weights: what `from_pretrained` takes, seen from the folder of the card; or `hub_id`.
    """
    named, base_id = _base(base)
    facts = {
        "base model": named,
        **data,
        **_accuracies(folder / "evaluations.jsonl"),
        "method": f"`{method}`",
        "optimiser steps": step,
        **settings,
        "seed": seed,
        "versions": ", ".join(f"{package} {version}" for package, version in _versions().items()),
    }
    header = ModelCardData(
        library_name="peft" if adapter else "transformers",
        base_model=base_id,
        tags=["generated_from_trainer", *tags, method],
    )
    return ModelCard.from_template(
        header,
        template_str=resources.files(__package__).joinpath("card.md").read_text(encoding="utf-8"),
        title=hub_id or folder.resolve().name,
        trl="trl" in tags,
        facts={fact: value for fact, value in facts.items() if value is not None},
        weights=weights,
        local=weights != hub_id,
        adapter=adapter,
        options=yaml.safe_dump({"method": method, **options}, sort_keys=False),
        citation=_citation(method, paper),
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


def told_of(args: TrainingArguments, recipe: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run of TRL's says of its task and of its training, in the words of a card."""
    rate = f"{args.learning_rate:g}, {SchedulerType(args.lr_scheduler_type).value}"
    return {"task": _task(recipe)}, {"learning rate": rate}


def paper_of(method: str) -> Paper | None:
    """Of a method of the library; None of one's own."""
    return options_of(method).paper if method in hapo.methods() else None


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


def _citation(method: str, paper: Paper | None) -> str:
    """BibTeX of the method's paper; for a method of one's own, what to cite in its place."""
    if paper is None:
        return f"`{method}` is a method of the authors' own: ask them."
    fields = {
        "title": f"{{{paper.title}}}",
        "year": paper.year,
        "eprint": paper.arxiv,
        "archivePrefix": "arXiv",
    }
    entry = "".join(f"  {key} = {{{value}}},\n" for key, value in fields.items())
    return f"```bibtex\n@misc{{{method}{paper.year},\n{entry}}}\n```"
