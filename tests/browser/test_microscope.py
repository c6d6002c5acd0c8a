"""The token microscope as a reader meets it: in a browser, without a network, under a strict content policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from playwright.sync_api import Page, expect

import hapo
from hapo.insight.microscope import encode, microscope
from hapo.insight.run import Run, recompute
from tests.browser.conftest import Opened
from tests.insight.conftest import make_run
from tests.insight.demonstrations import make_demonstrations

Open = Callable[..., Opened]

SHELL = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>microscope</title>
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'nonce-N0nce'; style-src 'unsafe-inline'; img-src data: blob:">
<style>:root {{ --bg: #fff; --fg: #1c1e21; --muted: #666c75; --line: #d9dce1; --accent: #3366cc }}
@media (prefers-color-scheme: dark) {{
  :root {{ --bg: #14161a; --fg: #e6e8eb; --muted: #9aa1ab; --line: #31363d; --accent: #7aa2ff }} }}
body {{ background: var(--bg); margin: 1rem }}</style></head><body>{}</body></html>"""

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<img src=x onerror=alert(3)>",
    "\"'`><b>",
    "&lt;",
    "<!--",
    "\u202egnidaer",
    "\u2028",
    "\u0000",
    "\ufffd",
    "👩\u200d🚀",
    "مرحبا",
    "w" * 10_000,
    " ",
    "\n",
    "\t",
)


def page_of(folder: Path, runs: list[Run], **options: object) -> Path:
    file = folder / "page.html"
    file.write_text(SHELL.format(microscope(runs, nonce="N0nce", **options)), encoding="utf-8")
    return file


def link(**place: object) -> str:
    return f"#microscope?{urlencode(place)}"


def follow(page: Page, **place: object) -> None:
    """Go to a token as a link elsewhere in the page does."""
    page.evaluate("hash => { location.hash = hash }", link(**place))
    expect(page.locator(".mx-facts")).to_contain_text(
        f"token {place['position']} of response {place['response']} "
    )


def numbers(page: Page) -> dict[tuple[str, str], str]:
    """What the panel shows: (quantity, place of the method) -> text."""
    cells = page.eval_on_selector_all(
        "#mx-token td[data-key]", "a => a.map(x => [x.dataset.key, x.dataset.method, x.textContent])"
    )
    return {(key, method): text for key, method, text in cells}


def same(text: str, x: float) -> bool:
    """The text is the number, to six significant digits."""
    return text == "–" if np.isnan(x) else float(text) == float(f"{x:.6g}")


def side(row: pd.Series) -> str:
    return "no" if not row.clipped else "below" if row.ratio < 1 else "above"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(make_run(tmp_path_factory.mktemp("runs") / "mine", "hapo", rollouts=2, length=40, seed=3))


@pytest.fixture(scope="module")
def file(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page_of(tmp_path_factory.mktemp("page"), [run], against=["dapo", "grpo:kl_coef=0.0"])


def test_the_numbers_shown_are_those_of_the_records(file: Path, run: Run, open_page: Open) -> None:
    page = open_page(file).page
    rng = np.random.default_rng(0)
    seen = 0
    for rollout in run.rollouts:
        tokens = run.tokens(rollout)
        own = recompute(run.rollout(rollout), run.method())
        for i in rng.choice(len(tokens), 6, replace=False):
            row = tokens.iloc[i]
            follow(page, run="mine", rollout=rollout, response=row.response, position=row.position)
            cells = numbers(page)
            for (key, method), text in cells.items():
                if method in ("", "0") and key in tokens and key not in ("kept", "push"):
                    assert same(text, row[key]), key
                    seen += 1
            assert same(cells["mismatch", ""], float(row.logp_old) - float(row.logp_sampler))
            assert same(cells["push", "0"], own.push[i])
            assert cells["kept", "0"] == ("yes" if row.kept else "no")
            assert cells["side", "0"] == side(row)
    assert seen > 100


@pytest.mark.parametrize("place", [1, 2])
def test_another_method_is_what_the_core_makes_of_the_same_rollout(
    file: Path, run: Run, open_page: Open, place: int
) -> None:
    other = [hapo.method("dapo"), hapo.method("grpo", kl_coef=0.0)][place - 1]
    rollout = run.rollouts[1]
    tokens, made = run.tokens(rollout), recompute(run.rollout(rollout), other)
    page = open_page(file, link(run="mine", rollout=rollout)).page
    page.select_option("#mx-other", index=place - 1)
    for i in np.random.default_rng(place).choice(len(tokens), 8, replace=False):
        row = made.iloc[i]
        follow(page, run="mine", rollout=rollout, response=row.response, position=row.position)
        cells = numbers(page)
        for key in ("advantage", "advantage_used", "ratio", "bound_low", "bound_high", "push"):
            assert same(cells[key, str(place)], row[key]), key
        assert cells["kept", str(place)] == ("yes" if row.kept else "no")
        assert cells["side", str(place)] == side(row)


def test_the_line_in_words_counts_what_differs(file: Path, run: Run, open_page: Open) -> None:
    opened = open_page(file, link(run="mine", rollout=run.rollouts[1]))
    rollout = run.rollout(run.rollouts[1])
    own, other = recompute(rollout, run.method()), recompute(rollout, hapo.method("dapo"))
    more = own.push - other.push
    counts = more.abs() > 0.1 * np.maximum(own.push.abs(), other.push.abs())
    expected = {
        "up": (counts & (more > 0)).sum(),
        "down": (counts & (more < 0)).sum(),
        "here": (own.clipped & ~other.clipped).sum(),
        "there": (other.clipped & ~own.clipped).sum(),
    }
    line = opened.page.locator("#mx-words [data-of=rollout]")
    assert {k: int(line.get_attribute(f"data-{k}") or "") for k in expected} == expected
    assert expected["up"] and expected["down"]
    assert "further down than dapo" in line.inner_text()


def test_the_colours_follow_the_quantity_the_method_and_the_difference(
    file: Path, run: Run, open_page: Open
) -> None:
    page = open_page(file, link(run="mine", rollout=1, response=0, position=0)).page
    tokens = run.tokens(1)
    first = tokens[tokens.response == 0]
    page.click("[data-key=advantage_used]")
    looks = page.eval_on_selector_all("[data-place='0'] .mx-body .t", "a => a.map(x => x.className)")
    assert len(looks) == len(first)
    for look, value in zip(looks, first.advantage_used, strict=True):
        assert (" p " in look) == (value > 0) or " k" not in look
    own = recompute(run.rollout(1), run.method())
    page.click("[data-key=push]")
    page.click("[data-as=difference]")
    for place, method in enumerate([hapo.method("dapo"), hapo.method("grpo", kl_coef=0.0)]):
        page.select_option("#mx-other", index=place)
        other = recompute(run.rollout(1), method)
        difference = (own.push - other.push).to_numpy()[: len(first)]
        looks = page.eval_on_selector_all("[data-place='0'] .mx-body .t", "a => a.map(x => x.className)")
        farthest = np.abs(difference).argmax()
        assert f" {'p' if difference[farthest] > 0 else 'n'} k" in looks[farthest]
        for look, value in zip(looks, difference, strict=True):
            assert (" p " in look) == (value > 0) or " k" not in look
    low, _, high = page.locator("#mx-legend .mx-ends span").all_inner_texts()
    assert float(high) == -float(low) > 0
    page.click("[data-key=entropy]")
    assert "the same under every method" in page.inner_text("#mx-legend")


def test_clipped_tokens_carry_a_mark_that_is_no_colour(file: Path, run: Run, open_page: Open) -> None:
    tokens = run.tokens(1)
    row = tokens[tokens.clipped].iloc[0]
    page = open_page(file, link(run="mine", rollout=1, response=row.response, position=row.position)).page
    look = page.locator("#mx-text .t.on")
    assert ("lo" if row.ratio < 1 else "hi") in (look.get_attribute("class") or "").split()
    assert "inset" in look.evaluate("node => getComputedStyle(node).boxShadow")
    assert "clipped" in page.inner_text(".mx-said")


def test_tokens_that_are_not_in_the_loss_are_struck_through(file: Path, run: Run, open_page: Open) -> None:
    tokens = run.tokens(1)
    row = tokens[~tokens.kept].iloc[0]
    page = open_page(file, link(run="mine", rollout=1, response=row.response, position=row.position)).page
    style = page.locator("#mx-text .t.on").evaluate("node => getComputedStyle(node).textDecorationLine")
    assert style == "line-through"
    assert page.inner_text(".mx-said").startswith("It is not in the loss.")


@pytest.mark.parametrize("method", ["dapo", "hapo"])
def test_a_run_alone_is_shown_without_a_switch(tmp_path: Path, open_page: Open, method: str) -> None:
    run = Run(make_run(tmp_path / "alone", method, rollouts=1))
    page = open_page(page_of(tmp_path, [run])).page
    assert not page.locator("#mx-views").is_visible()
    assert not page.locator("#mx-words").is_visible()
    assert page.locator("[data-key=signal][type=button]").count() == (method == "hapo")
    for button in page.locator("#mx-quantities button").all():
        button.click()
        page.keyboard.press("m")
        page.keyboard.press("ArrowRight")
    position = len(page.locator("#mx-quantities button").all())
    assert page.inner_text(".mx-facts").startswith(f"token {position} of response 0 ")


def test_a_link_opens_its_token_and_the_address_follows_the_reader(file: Path, run: Run, open_page: Open) -> None:
    page = open_page(file, link(run="mine", rollout=run.rollouts[1], response=5, position=3)).page
    assert page.inner_text(".mx-facts").startswith("token 3 of response 5 ")
    assert page.evaluate("document.activeElement.classList.contains('on')")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("location.hash") == link(run="mine", rollout=run.rollouts[1], response=5, position=4)


def test_an_address_is_left_alone_until_the_reader_acts(file: Path, open_page: Open) -> None:
    assert open_page(file).page.evaluate("location.hash") == ""


@pytest.mark.parametrize(
    ("place", "answer"),
    [
        ({"run": "else"}, "no tokens of the run else"),
        ({"run": "mine", "rollout": 5}, "no rollout 5 of mine, only 1, 9. To see it: hapo report"),
        ({"run": "mine", "rollout": 1, "response": 99}, "no response 99 of rollout 1"),
    ],
)
def test_a_link_to_what_is_not_there_says_so(
    file: Path, open_page: Open, place: dict[str, object], answer: str
) -> None:
    assert answer in open_page(file, link(**place)).page.inner_text("#mx-note")


def test_all_of_it_by_keyboard(file: Path, run: Run, open_page: Open) -> None:
    page = open_page(file, link(run="mine", rollout=1, response=0, position=0)).page
    press, facts = page.keyboard.press, lambda: page.inner_text(".mx-facts").split(" · ")[0]
    press("ArrowRight")
    press("ArrowDown")
    assert facts() == "token 1 of response 1"
    press("ArrowUp")
    press("End")
    last = int(run.tokens(1).query("response == 0").position.max())
    assert facts() == f"token {last} of response 0"
    press("Home")
    press("PageDown")
    assert facts() == "token 0 of response 4"
    press("2")
    assert page.get_attribute("[data-key=signal]", "aria-pressed") == "true"
    press("c")
    press("C")
    press("m")
    assert page.get_attribute("[data-as=other]", "aria-pressed") == "true"
    press("f")
    assert page.locator(".mx-card").count() == 1
    press("f")
    press("n")
    assert "clipped" in page.inner_text("#mx-said")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    press("]")
    expect(page.locator("#mx-rollout")).to_have_value("9")
    press("?")
    assert page.locator("#mx-help").is_visible()
    press("Escape")
    assert not page.locator("#mx-help").is_visible()
    press("/")
    assert page.evaluate("document.activeElement.id") == "mx-search"


def test_the_most_suppressed_token_of_the_wrong_answers_is_one_key_away(
    file: Path, run: Run, open_page: Open
) -> None:
    page = open_page(file, link(run="mine", rollout=1, response=0, position=0)).page
    page.select_option("#mx-verdict", "wrong")
    page.click("[data-key=push]")
    page.keyboard.press("Shift+E")
    tokens = run.tokens(1).assign(push=recompute(run.rollout(1), run.method()).push)
    row = tokens[tokens.verdict <= 0].sort_values("push").iloc[0]
    assert page.inner_text(".mx-facts").startswith(f"token {row.position} of response {row.response} ")


def test_filters_and_order(file: Path, run: Run, open_page: Open) -> None:
    page = open_page(file, link(run="mine", rollout=1)).page
    tokens = run.tokens(1)
    own = recompute(run.rollout(1), run.method())
    heads = tokens.drop_duplicates("response").set_index("response")

    def listed() -> list[int]:
        order = page.eval_on_selector_all(".mx-row", "a => a.map(x => x.ariaLabel)")
        return [int(text.split(",")[0].split()[1]) for text in order]

    page.select_option("#mx-verdict", "right")
    assert sorted(listed()) == heads.index[heads.verdict > 0].tolist()
    page.select_option("#mx-verdict", "")
    page.check("#mx-clipped")
    assert sorted(listed()) == sorted(tokens[tokens.clipped].response.unique())
    page.uncheck("#mx-clipped")
    page.select_option("#mx-sort", "push")
    assert listed()[0] == own.push.abs().groupby(own.response).mean().idxmax()
    page.select_option("#mx-sort", "moved")
    moved = (tokens.advantage_used - tokens.advantage).abs()
    assert listed()[0] == moved.groupby(tokens.response).mean().idxmax()
    prompt = heads.prompt.iloc[-1]
    page.fill("#mx-search", prompt)
    assert sorted(listed()) == heads.index[heads.prompt == prompt].tolist()
    page.fill("#mx-search", "nothing has this")
    assert page.inner_text("#mx-count") == f"0 of {len(heads)} responses"


def test_of_a_diffusion_model_the_order_of_its_draws_and_its_likelihood(tmp_path: Path, open_page: Open) -> None:
    def with_draws(table: pa.Table) -> pa.Table:
        place = table["position"].to_numpy()
        ended = np.where(place > 5, np.nan, 5 - place).astype(np.float32)
        confidence = pa.array((1 - place / 32).astype(np.float32))
        return table.append_column("unmasked", pa.array(ended)).append_column("confidence", confidence)

    run = Run(make_run(tmp_path / "mine", "espo", rollouts=1, rows=with_draws))
    page = open_page(page_of(tmp_path, [run])).page
    first = run.tokens(1).query("response == 0")
    columns = {"unmasked": "unmasked", "confidence": "confidence", "contribution": "logp_new"}
    for key, column in columns.items():
        page.click(f"#mx-quantities [data-key={key}]")
        looks = page.eval_on_selector_all("[data-place='0'] .mx-body .t", "a => a.map(x => x.className)")
        depth = [int(look.partition(" k")[2].split()[0]) if " k" in look else 0 for look in looks]
        value = first[column].abs().fillna(0.0).to_numpy()
        assert depth[value.argmax()] > 0 == depth[value.argmin()] or key == "confidence"
        assert (np.diff(np.array(depth)[value.argsort()]) >= 0).all(), key
    follow(page, run="mine", rollout=1, response=0, position=4)
    shown = numbers(page)
    assert all(same(shown[key, ""], first[column].iloc[4]) for key, column in columns.items())
    follow(page, run="mine", rollout=1, response=0, position=6)
    assert numbers(page)["unmasked", ""] == "–"


def test_what_an_environment_said_stands_apart(tmp_path: Path, open_page: Open) -> None:
    """Without a colour, under its own heading, and as text alone; it can be searched."""
    hostile = "".join(HOSTILE[:5])

    def with_answers(table: pa.Table) -> pa.Table:
        place = table["position"].to_pylist()
        return table.append_column("said", pa.array([{1: hostile, 3: "a tool\n"}.get(p) for p in place]))

    run = Run(make_run(tmp_path / "mine", "grpo", rollouts=1, rows=with_answers))
    page = open_page(page_of(tmp_path, [run])).page
    answers = page.locator("[data-place='0'] .mx-else")
    assert answers.all_text_contents() == [f"not the model's{hostile}", "not the model'sa tool↵\n"]
    assert page.locator("[data-place='0'] .t:nth-of-type(2) + .mx-else").count() == 1
    assert answers.locator(".t").count() == 0
    page.fill("#mx-search", "a tool")
    assert page.locator(".mx-row").count() == run.tokens(1)["response"].nunique()


@pytest.mark.parametrize("width", [1400, 400])
def test_hostile_text_executes_nothing_and_breaks_nothing(tmp_path: Path, open_page: Open, width: int) -> None:
    folder = tmp_path / "<img src=x onerror=alert(4)>"
    run = Run(make_run(folder, "dapo", rollouts=1, words=HOSTILE, prompts=HOSTILE, groups=8, length=32))
    page = open_page(
        page_of(tmp_path, [run, run], against=["grpo:kl_coef=0.0"]), viewport={"width": width, "height": 900}
    ).page
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    tokens = run.tokens()
    first = tokens[tokens.response == 0].text.tolist()
    pieces = page.eval_on_selector_all("[data-place='0'] .mx-body .t", "a => a.map(x => x.textContent)")
    named = {
        "\u202egnidaer": "⟨U+202E⟩gnidaer",
        "\u2028": "⟨U+2028⟩",
        "\u0000": "␀",
        " ": "␣",
        "\n": "↵\n",
        "\t": "⇥\t",
    }
    assert pieces == [named.get(text, f"⟨{HOSTILE.index(text)}⟩" if text == "\ufffd" else text) for text in first]
    wide = "Array.from(document.querySelectorAll('.mx-body'), x => x.scrollWidth - x.clientWidth)"
    assert max(page.evaluate(wide)) <= 0
    for _ in range(7):
        page.focus("#mx-text .t.on")
        page.keyboard.press("PageDown")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("#microscope script:not([type])").count() == 1
    assert page.locator("#microscope img").count() == 0


def test_of_64_responses_of_1000_tokens_only_those_of_one_prompt_are_written(
    tmp_path: Path, open_page: Open
) -> None:
    """So that the page opens, and changes its colours, at once: the work is bounded, whatever the machine."""
    run = Run(
        make_run(
            tmp_path / "large",
            "hapo",
            rollouts=1,
            groups=8,
            size=8,
            length=2000,
            rows=lambda table: table.filter(pc.less(table["position"], 1000)),
        )
    )
    assert len(run.tokens()) == 64_000
    file = page_of(tmp_path, [run], against=["dapo"])
    assert file.stat().st_size <= 15e6
    page = open_page(file).page
    written = page.locator("#mx-text .mx-card .t")
    expect(written).to_have_count(8000)
    own = recompute(run.rollout(1), run.method())
    for key in ("push", "ratio"):
        page.click(f"[data-key={key}]")
        assert written.count() == 8000
    row = own[own.response == 7].iloc[999]
    follow(page, run="large", rollout=1, response=7, position=row.position)
    assert same(numbers(page)["ratio", "0"], row.ratio)


def test_a_long_response_is_written_a_piece_at_a_time_and_goes_to_any_token_at_once(
    tmp_path: Path, open_page: Open
) -> None:
    run = Run(make_run(tmp_path / "long", "dapo", rollouts=1, groups=1, size=2, length=5500))
    page = open_page(page_of(tmp_path, [run])).page
    tokens = run.tokens(1)
    last = tokens[tokens["response"] == 1].iloc[-1]
    follow(page, run="long", rollout=1, response=1, position=last.position)
    expect(page.locator("[data-place='1'] .t.on")).to_have_count(1)
    for place in (0, 1):
        written = page.locator(f"[data-place='{place}'] .mx-body .t")
        expect(written).to_have_count(int((tokens["response"] == place).sum()))
    page.click("[data-key=entropy]")
    coloured = page.eval_on_selector_all(
        "[data-place='1'] .mx-body .t", "a => a.filter(x => / k/.test(x.className)).length"
    )
    assert coloured > 1000  # beyond the first piece


def test_what_a_page_left_out_is_said_with_the_command_that_shows_it(tmp_path: Path, open_page: Open) -> None:
    run = Run(make_run(tmp_path / "mine", "dapo", rollouts=1))
    some = page_of(tmp_path, [run], rollouts=[1], budget=int(0.4 * len(encode(run, 1, []).data)))
    page = open_page(some).page
    note = page.locator("#mx-note")
    expect(note).to_contain_text("Of 16 recorded responses of this rollout batch the page holds 4")
    command = f"hapo report {run.folder} --rollouts 1 --prompts "
    expect(note).to_contain_text(command)
    shown = {int(x) for x in page.eval_on_selector_all(".mx-row", "a => a.map(x => x.ariaLabel.match(/\\d+/)[0])")}
    tokens = run.tokens(1)
    away = tokens[~tokens["response"].isin(shown)].iloc[0]
    page.evaluate(
        "hash => { location.hash = hash }",
        link(run="mine", rollout=1, response=away.response, position=0, prompt=away.group),
    )
    expect(note).to_contain_text(
        f"no response {away.response} of rollout 1. To see its prompt: {command}{away.group}"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_colour(file: Path, open_page: Open, scheme: str) -> None:
    page = open_page(file, color_scheme=scheme).page
    contrasts = page.evaluate("""() => {
        const draw = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const light = (...colours) => {
            for (const colour of colours) { draw.fillStyle = colour; draw.fillRect(0, 0, 1, 1); }
            const [r, g, b] = Array.from(draw.getImageData(0, 0, 1, 1).data.slice(0, 3), (x) =>
                x / 255 <= 0.04045 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const style = (node) => getComputedStyle(node);
        const text = light(style(document.getElementById("microscope")).color);
        return Array.from(document.getElementById("mx-hues").children, (node) => {
            const ground = light(style(document.body).backgroundColor, style(node).backgroundColor);
            return (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
        });
    }""")
    assert len(contrasts) == 3
    assert min(contrasts) >= 4.5


def test_targets_of_demonstrations_are_coloured_by_weight_and_have_no_verdict(open_page, tmp_path):
    folder = make_demonstrations(tmp_path / "r")
    opened = open_page(page_of(tmp_path, [Run(folder)], against=["sft"]))
    page = opened.page
    assert page.locator(".mx-right, .mx-wrong").count() == 0
    assert "reward" not in page.locator("#mx-text").inner_text()
    page.locator('#mx-quantities button[data-key="target_weight"]').click()
    assert page.locator('#mx-text span[class*=" k"]').count() > 0
    shown = page.locator("#mx-token tr.on td").first.inner_text()
    assert float(shown) == pytest.approx(Run(folder).tokens(1)["weight"].iloc[0], rel=1e-5)
    page.locator('#mx-quantities button[data-key="behind"]').click()
    assert page.locator('#mx-text span[class*=" p "], #mx-text span[class*=" n "]').count() > 0
    assert opened.complaints == [] and page.locator("#mx-token").inner_text().count("expected rank") == 1


def test_channels_of_attribution_are_colours(open_page: Open, tmp_path: Path) -> None:
    """As many as the records have, with any name; a token's numbers are those of the records."""
    channels = {"attribution_shap": 0.25, "attribution_</script>": -0.5}

    def with_channels(table: pa.Table) -> pa.Table:
        for name, scale in channels.items():
            values = pc.multiply(pc.cast(table["position"], pa.float32()), pa.scalar(scale, pa.float32()))
            table = table.append_column(name, values)
        return table

    run = Run(make_run(tmp_path / "mine", "hapo", rollouts=1, rows=with_channels))
    page = open_page(page_of(tmp_path, [run])).page
    for name, scale in channels.items():
        page.get_by_role("group", name="colour by").get_by_text(
            name.removeprefix("attribution_"), exact=True
        ).click()
        follow(page, run="mine", rollout=1, response=0, position=2)
        assert same(numbers(page)[name, ""], 2 * scale)
        expect(page.locator(".mx-fig figcaption").first).to_contain_text(name.removeprefix("attribution_"))
