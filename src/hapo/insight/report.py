"""The report of some runs: one HTML page that needs no network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode

import numpy as np
import pandas as pd

import hapo

from ..outputs import check_made, check_page, write_made, write_page
from ..tasks import TaskConfig
from .agents import LOOP_OPTIONS, agent_figures
from .curves import POINTS, SPAN, curves, others
from .doctor import SEVERITIES, examine_run
from .figures import Figure, labels, printable, unchecked, visible
from .microscope import microscope
from .page import new_nonce, render
from .run import Run, of_runs
from .targets import READ, extremes, method_of_targets, reweigh, target_figures
from .token_figures import ROLLOUTS, analysed, token_figures
from .tokens import Tokens
from .unmasking import unmasking

PARTIAL = (
    "Rollout batches were recorded in part (record_tokens_rows), so that what a method takes over a whole batch, "
    "its statistics and totals, is taken over that part here: the order holds, the last digits may not."
)
ROWS = 15
"""Tokens in each table of the most amplified and the most suppressed."""
BEFORE = 5
"""Tokens shown before each of them."""


@unchecked()
def write_report(
    folders: Sequence[Path | str],
    output: Path | str,
    *,
    against: Sequence[str] = (),
    rollouts: Sequence[int] | None = None,
    prompts: Sequence[int] | None = None,
    replace: bool = False,
) -> Path:
    """Write the page of some runs, and return its path. An older page of these runs, if unchanged, gives way.

    Args:
        folders: of the runs, of any engine, finished or not.
        output: the .html file.
        against: methods to show on the same rollouts in the token microscope, as `NAME[:option=value,...]`.
        rollouts: first steps of the rollout batches in the microscope; as many as fit unless told.
        prompts: in the microscope, by their number in these rollout batches (`group`); as many as fit unless told.
        replace: write over whatever file is there.

    Raises:
        FileNotFoundError: a folder holds no run.
        FileExistsError: another file is there, the page of other runs, or a page that was changed.
        ValueError: no folder, a broken file in one, an unknown method, rollout batch or prompt.
        OSError: the page cannot be written there.
    """
    if not folders:
        raise ValueError("a report needs the folder of a run")
    runs, nonce = [Run(folder) for folder in folders], new_nonce()
    output, of = Path(output), of_runs(runs)
    check_page(output, of, replace)
    names = labels(runs)
    shown = [_shown(run, name) for run, name in zip(runs, names, strict=True)]
    over, more = curves(runs), others(runs)
    seen = [run for run, of in zip(runs, shown, strict=True) if of["pushes"] or not run.rollouts]
    html = render(
        "report.html",
        title=names[0] if len(runs) == 1 else f"{len(runs)} runs",
        nonce=nonce,
        supervised=all(run.supervised for run in runs),
        figures=[*over, *more, *(figure for run in shown for figure in run["figures"])],
        runs=shown,
        findings=_findings(runs),
        facts=_table([_facts(run) for run in runs]),
        origin=_table([_origin(run) for run in runs]),
        curves=over,
        others=more,
        points=POINTS,
        span=SPAN,
        rollouts=ROLLOUTS,
        microscope=microscope(seen, against=against, nonce=nonce, rollouts=rollouts, prompts=prompts),
    )
    write_page(output, html, of, replace)
    return output


@unchecked()
def write_figures(
    folders: Sequence[Path | str], output: Path, kind: Literal["png", "svg"] = "png", replace: bool = False
) -> list[Path]:
    """Write each figure of the report as a file of its own, and return those that the runs have data for.

    Older figures of the same runs, as they were written, give way; with `replace` whatever file is there does.

    Raises:
        FileNotFoundError: a folder holds no run.
        FileExistsError: another file is there, a figure of other runs, or a changed one; nothing is written.
        ValueError: a broken file in one.
        OSError: a file cannot be written.
    """
    runs = [Run(folder) for folder in folders]
    named = [(figure.name, figure) for figure in curves(runs)]
    for number, run in enumerate(runs, 1):
        suffix = "" if len(runs) == 1 else f"-{number}"
        named += [(figure.name + suffix, figure) for figure in _token_figures(run)]
    drawn = {f"{name}.{kind}": figure for name, figure in named if figure.chart is not None}
    check_made(output, drawn, of := of_runs(runs), replace)
    write_made(output, {name: figure.drawn(kind) for name, figure in drawn.items()}, of, replace)
    return [output / name for name in drawn]


def _shown(run: Run, name: str) -> dict[str, Any]:
    """What the template reads of one run."""
    tokens = analysed(run)
    pushes, note = (_extremes if run.supervised else _pushes)(run, tokens, name)
    return {
        "label": name,
        "summary": _summary(run),
        "results": _results(run),
        "figures": _token_figures(run, tokens),
        "supervised": run.supervised,
        "pushes": pushes,
        "pushes_note": note,
    }


def _token_figures(run: Run, tokens: Tokens | None = None) -> list[Figure]:
    """Of the recorded tokens of a run, which are read unless given."""
    tokens = analysed(run) if tokens is None else tokens
    if run.agent:
        return agent_figures(tokens)
    if run.supervised:
        return target_figures(tokens)
    return token_figures(tokens) + ([unmasking(tokens)] if "unmasked" in tokens else [])


def _findings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What the doctor found, the worst first; what several runs have in common once, with what it saw in each."""
    merged: dict[tuple[str, ...], dict[str, Any]] = {}
    for run, name in zip(runs, labels(runs), strict=True):
        for found in examine_run(run):
            words = {"severity": found.severity, "why": found.why, "change": found.change}
            merged.setdefault((found.name, *words.values()), {**words, "saw": []})["saw"].append((name, found.saw))
    return sorted(merged.values(), key=lambda found: SEVERITIES.index(found["severity"]))


def _summary(run: Run) -> str:
    how = str(run.config.get("method") or "TRL's own trainer")
    how += f" on {_task(run)}" if _task(run) else ""
    if (steps := _last(run, "step")) is not None:
        how += f", {steps:,.0f} optimiser steps"
    seconds = (run.finished or {}).get("seconds") or _last(run, "wall_seconds")
    if seconds is not None:
        how += f" in {_duration(seconds)}"
    if run.finished is None:
        return f"{how}; stopped before its end, or still running"
    ends = {"max_steps": "ended at its last step", "token_budget": "ended with its token budget"}
    return f"{how}; {ends.get(run.finished.get('why', ''), 'ended')}"


def _results(run: Run) -> list[dict[str, Any]]:
    """First and last measurement of held-out accuracy, greedy and sampled, and of held-out loss."""
    found = []
    if len(losses := run.held_out_loss()):
        first, last = (f"{losses['eval_loss'].iloc[i]:.4f}" for i in (0, -1))
        before = first if len(losses) > 1 else ""
        found.append({"what": "loss", "before": before, "after": last, "intervals": "", "size": "nats per target"})
    for how, lines in run.evaluations.groupby("how", sort=False):
        last = lines.iloc[-1]
        show = _percent if last["binary"] else "{:.3f}".format
        ends = lines.iloc[[0, -1]] if len(lines) > 1 else lines
        intervals = [f"{show(line.low)} to {show(line.high)}" for line in ends.itertuples()]
        answers = f", {last['samples']} answers each" if last["samples"] > 1 else ""
        found.append(
            {
                "what": f"{'accuracy' if last['binary'] else 'score'}, {how}",
                "before": show(lines.iloc[0]["mean"]) if len(lines) > 1 else "",
                "after": show(last["mean"]),
                "intervals": " → ".join(intervals),
                "size": f"{last['problems']} problems{answers}",
            }
        )
    return found


def _table(facts: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """A row each fact, with a value for every run; rows that no run fills are left out."""
    rows = {name: [printable(of.get(name, "")) for of in facts] for name in facts[0]}
    return {name: values for name, values in rows.items() if any(values)}


def _facts(run: Run) -> dict[str, str]:
    config = _config(run)
    sizes = _pairs({k: config.get(k) for k in ("train_size", "eval_size")})
    return {
        "method": _method(run),
        "task": f"{_task(run)} ({sizes})" if sizes else _task(run),
        "model": str(config.get("model_name_or_path") or run.manifest.get("model") or ""),
        "seed": str(run.manifest.get("seed", config.get("seed", ""))),
        "learning rate": str(config.get("learning_rate", "")),
        "tokens generated": _count((run.finished or {}).get("num_tokens") or _last(run, "num_tokens")),
    }


def _origin(run: Run) -> dict[str, str]:
    manifest = run.manifest
    return {
        "command": " ".join(map(str, manifest.get("command") or [])),
        "begun": str(manifest.get("created") or ""),
        "initial weights": str(manifest.get("weights_sha256") or ""),
        "data fingerprint": str(manifest.get("data_fingerprint") or ""),
        "machine": _pairs({**(manifest.get("machine") or {}), "processes": manifest.get("processes")}),
        "versions": _pairs({"python": manifest.get("python"), **(manifest.get("versions") or {})}),
    }


def _config(run: Run) -> dict[str, Any]:
    """The options of the run, with those of an arm of TRL's own in their place."""
    return {**run.config, **(run.config.get("trl") or {})}


def _task(run: Run) -> str:
    """The data set; the default of `hapo train` where the run was told other options of a task."""
    if run.agent:
        return str(run.config.get("environment", ""))
    told = {f.name for f in fields(TaskConfig)} & set(run.config)
    return str(run.config.get("dataset") or (TaskConfig.dataset if told else ""))


def _method(run: Run) -> str:
    """Name and the options that differ from the method's defaults."""
    name = run.config.get("method")
    if name is None:
        return f"TRL's own ({_pairs(run.config.get('trl') or {})})" if "trl" in run.config else "none of hapo's"
    if run.agent:
        return f"{name} ({_pairs({k: run.config.get(k) for k in LOOP_OPTIONS})})"
    given = run.config.get("method_options") or {}
    try:
        default = hapo.method(name).options
    except ValueError:  # a method of the user's own
        default = {}
    changed = {k: v for k, v in given.items() if k not in default or default[k] != v}
    return f"{name} ({_pairs(changed)})" if changed else f"{name}, options at their defaults"


Pushes = dict[str, dict[str, list[dict[str, Any]]]]
Pick = Callable[[pd.DataFrame], dict[tuple[str, str], pd.DataFrame]]


def _pushes(run: Run, tokens: Tokens, name: str) -> tuple[Pushes, str]:
    """The tokens with the greatest push each way: {among: {side: rows}}; or none; and what to know of it."""
    if not len(tokens):
        return {}, "It is made of token records (`record_tokens_every`), and none were found."
    if run.agent:
        return _drawn(_picked(tokens, tokens.batches("push", "verdict"), _most_pushed), name), ""
    try:
        run.method()
    except ValueError as error:
        return {}, f"Neither made nor in the microscope, as the method cannot be rebuilt: {error}."
    made = (tokens.batch(first, "verdict").assign(push=run.pushes(first)[0]) for first in tokens.rollouts)
    picked = _picked(tokens, made, _most_pushed)
    complete = all(run.pushes(first)[1] for first in tokens.rollouts)
    return _drawn(picked, name), "" if complete else PARTIAL


def _extremes(run: Run, tokens: Tokens, name: str) -> tuple[Pushes, str]:
    """The heaviest and the lightest targets of a supervised run, as `_pushes` gives tokens."""
    if not len(tokens):
        return {}, "It is made of token records (`record_tokens_every`), and none were found."
    try:
        method = method_of_targets(run)
    except ValueError as error:
        return {}, f"Neither made nor in the microscope, as the method cannot be rebuilt: {error}."
    made = (reweigh(some, method).assign(rank=some["rank"]) for some in tokens.batches(*READ))
    return _drawn(_picked(tokens, made, _heaviest), name), ""


def _picked(tokens: Tokens, tables: Iterable[pd.DataFrame], pick: Pick) -> dict[Any, pd.DataFrame]:
    """What `pick` takes of the tables of all rollout batches, one at a time, with place and text of each token."""
    found = []
    for first, table in zip(tokens.rollouts, tables, strict=True):
        rows = sorted({row for some in pick(table).values() for row in some.index})
        place = tokens.batch(first, "response", "step", "position", "group", "prompt", "text")
        with_before = place.loc[rows].astype({"text": str, "prompt": str}).assign(before=_before(place, rows))
        found.append(table.loc[rows].join(with_before).assign(rollout=first))
    return pick(pd.concat(found, ignore_index=True))


def _before(place: pd.DataFrame, rows: Sequence[int]) -> list[str]:
    """The text before the tokens in some rows, in their responses."""
    at, words = np.array(rows, int), [""] * len(rows)
    of = place[["response", "step"]].to_numpy()
    for n in range(BEFORE, 0, -1):
        earlier = np.maximum(at - n, 0)
        there = (of[earlier] == of[at]).all(1) & (at >= n)
        texts = place["text"].iloc[earlier]
        words = [word + text if same else word for word, text, same in zip(words, texts, there, strict=True)]
    return words


def _most_pushed(table: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """Of all answers, of the wrong and of the right ones."""
    right = table["verdict"] > 0
    among = {"all": table["push"], "wrong": table["push"][~right], "right": table["push"][right]}
    sides = {
        (name, side): most
        for name, push in among.items()
        for side, most in (
            ("Most amplified", push[push > 0].nlargest(ROWS)),
            ("Most suppressed", push[push < 0].nsmallest(ROWS)),
        )
    }
    return {place: table.loc[most.index] for place, most in sides.items()}


def _heaviest(table: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    return {("all", side): some for side, some in extremes(table, ROWS).items()}


def _drawn(picked: dict[tuple[str, str], pd.DataFrame], name: str) -> Pushes:
    """{among: {side: rows of the page}}."""
    found: Pushes = {}
    for (among, side), some in picked.items():
        found.setdefault(among, {})[side] = [_push(row, name) for row in some.itertuples()]
    return found


def _push(row: Any, name: str) -> dict[str, Any]:
    place = {
        "run": name,
        "rollout": row.rollout,
        "response": row.response,
        "step": row.step,
        "position": row.position,
        "prompt": row.group,
    }
    return {
        "push": f"{row.push:+#.3g}".replace("-", "−"),
        "text": visible(row.text),
        "before": visible(row.before, most=60, tail=True),
        "answer": "" if not hasattr(row, "verdict") else "right" if row.verdict > 0 else "wrong",
        "prompt": visible(row.prompt, most=160, marks=False),
        "step": row.step,
        "link": f"#microscope?{urlencode(place)}",
    }


def _last(run: Run, metric: str) -> float | None:
    if metric not in run.metrics or run.metrics[metric].isna().all():
        return None
    return float(run.metrics[metric].dropna().iloc[-1])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _count(number: float | None) -> str:
    return "" if number is None else f"{number:,.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest if not hours else 0, "s")]
    return " ".join(f"{n} {unit}" for n, unit in parts if n) or "less than a second"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items() if v is not None)
