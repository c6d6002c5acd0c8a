"""One prompt's answers as a figure: every token in its text, coloured by a number of it."""

from __future__ import annotations

from dataclasses import replace

import altair as alt

from .figures import Figure, short, visible
from .run import Run, recompute

WIDTH = 80
"""Characters of an answer that are shown."""
DIVERGING = {"push", "token_reward", "advantage", "advantage_used", "signal"}
"""Numbers of either sign: 0 has no colour."""


def excerpt(run: Run, rollout: int | None = None, group: int | None = None, colour: str = "push") -> Figure:
    """The answers to one prompt, a line each, up to their first 80 characters; the right ones on top.

    A glance for a notebook or a paper; the microscope of the report has all prompts and all numbers.

    Args:
        run: with token records.
        rollout: first optimiser step of a recorded rollout batch; the last one unless told.
        group: prompt id in it; unless told, the prompt whose tokens are pushed hardest.
        colour: "push" (see `recompute`) or a numeric column of the records.

    Raises:
        ValueError: the run recorded no tokens, no such rollout batch, or no such number.
    """
    if not run.rollouts:
        raise ValueError(f"{run.folder} recorded no tokens: train with record_tokens_every above 0")
    first = run.rollouts[-1] if rollout is None else rollout
    tokens = run.tokens(first).drop_duplicates(["response", "position"], keep="last")  # of several iterations
    pushes = recompute(run.rollout(first), run.method())[["response", "step", "position", "push"]]
    tokens = tokens.merge(pushes, on=["response", "step", "position"], validate="one_to_one")
    if group is None:
        group = tokens["push"].abs().groupby(tokens["group"]).sum().idxmax()
    tokens = tokens[tokens["group"] == group]
    if tokens.empty:
        raise ValueError(f"{run.folder}: rollout batch {first} has no prompt {group}")
    if colour not in tokens or tokens[colour].dtype.kind not in "fiub":
        raise ValueError(f"no number of the tokens is called {colour!r}; take push, entropy, ratio, advantage ...")
    tokens = tokens.assign(text=tokens["text"].map(visible))
    ends = tokens["text"].str.len().groupby(tokens["response"]).cumsum()
    tokens = tokens.assign(end=ends, start=ends - tokens["text"].str.len())[ends <= WIDTH]
    answers = tokens.drop_duplicates("response").sort_values("verdict", ascending=False, kind="stable")["response"]
    line = {response: number for number, response in enumerate(answers)}
    rows = [
        {"line": line[t.response], "start": t.start, "end": t.end, "text": t.text, "value": short(float(value))}
        for t, value in zip(tokens.itertuples(), tokens[colour], strict=True)
    ]
    verdicts = tokens.drop_duplicates("response").set_index("response")["verdict"]
    marks = [{"line": line[r], "verdict": f"{verdicts[r]:g}"} for r in answers]
    most = float(tokens[colour].abs().max()) or 1.0
    scale = (
        alt.Scale(scheme="blueorange", domain=[-most, most], reverse=True)
        if colour in DIVERGING
        else alt.Scale(scheme="oranges")
    )
    y = alt.Y("line:O", title="answer, by verdict", axis=alt.Axis(labels=False, ticks=False))
    x = alt.X(
        "start:Q",
        title="characters",
        axis=None,
        scale=alt.Scale(domain=[-4, int(tokens["end"].max())], nice=False),
    )
    base = alt.Chart(alt.InlineData(values=rows))
    chart = alt.layer(
        base.mark_rect().encode(
            x=x,
            x2="end:Q",
            y=y,
            color=alt.Color("value:Q", title=colour.replace("_", " "), scale=scale),
            tooltip=[alt.Tooltip("text:N", title="token"), alt.Tooltip("value:Q", title=colour)],
        ),
        base.transform_calculate(middle="(datum.start + datum.end) / 2")
        .mark_text(font="monospace", fontSize=11)
        .encode(x="middle:Q", y=y, text="text:N"),
        alt.Chart(alt.InlineData(values=marks))
        .mark_text(font="monospace", fontWeight="bold", align="left")
        .encode(x=alt.datum(-4), y=y, text="verdict:N"),
    )
    figure = Figure(
        "excerpt",
        f"Answers to {visible(str(tokens['prompt'].iloc[0]))}",
        f"Rollout batch of step {first}; a line is an answer, its verdict in front; the colour is the {colour}.",
    )
    return replace(figure, chart=chart)
