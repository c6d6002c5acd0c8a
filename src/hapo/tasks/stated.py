r"""The answer that a text states: one place, for every reward.

What stands in thinking is never read. Of the rest, the first of these that occurs, and of several the last:
``<answer>...</answer>``, a box (``\boxed{...}``), a statement ("the answer is", "answer:", "####"). What is
found is searched again, so that a box in tags is opened, and comes without the dollars, stars and back-ticks
around it. Every search here takes time in proportion to the text, for model output has no bounds.
"""

from __future__ import annotations

import re

NAMES = "think|thinking|thoughts?|reason|reasoning|reflection|scratchpad|analysis"
THINKING = re.compile(
    rf"""
      (?P<open>  <\s*(?:\w+:)?(?:{NAMES})\s*>      | \[THINK\]  | ◁think▷
               | <\|\s*(?:begin_of_thought|start_thinking|thinking|think)\s*\|>
               | <\|channel\|>(?:analysis|commentary)[^<\n]{{0,60}}<\|message\|>)
    | (?P<close> <\s*/\s*(?:\w+:)?(?:{NAMES})\s*>  | \[/THINK\] | ◁/think▷
               | <\|\s*(?:end_of_thought|end_thinking|/thinking|/think)\s*\|>
               | <\|channel\|>final[^<\n]{{0,60}}<\|message\|>)
    """,
    re.IGNORECASE | re.VERBOSE,
)
OPEN_TAG = re.compile(r"<\s*(?:final[_ ]?)?answer\s*>", re.IGNORECASE)
CLOSE_TAG = re.compile(r"<\s*/\s*(?:final[_ ]?)?answer\s*>", re.IGNORECASE)

BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)

MARKS = r"[*_`]*"
"""Markdown that may stand around the words of a statement."""
IS = r"(?:is|are|was|equals|would\s+be|will\s+be|should\s+be|must\s+be|comes\s+(?:out\s+)?to)"
KINDS = r"(?:answers?|option|choice)"
STATEMENT = re.compile(
    rf"""
      ^[ \t]*(?:\#{{1,6}}[ \t]*)?{MARKS}(?:the[ ]|my[ ])?(?:final[ ])?answers?{MARKS}[ \t]*$  # ## Answer, over 5
    | (?<!\#)\#{{4,}}(?!\#)                                                         # #### 5
    | \b(?:answers?|ans){MARKS}\s?(?:\([^()\n]{{0,40}}\)\s?)?{MARKS}\s?[:=：]        # **Answer:** 5
    | \banswers?{MARKS}\s+{IS}\b                                                   # answer is 5
    | \b(?:the|my|our|correct|final|right|best)\s+{MARKS}(?:\w+\s+){{0,2}}{KINDS}{MARKS}
      (?:,?\s[^.:\n]{{0,60}}?)?\s{IS}\b                                              # the answer to it is 5
    """,
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
LEAD = re.compile(
    r"[\s*_:：,=}]*(?:(?:therefore|thus|then|hence|so|simply|just|indeed|clearly|also|as\s+follows|"
    r"given\s+(?:by|as)|equal\s+to|found\s+to\s+be|now)\b[\s*_:：,]*)*",
    re.IGNORECASE,
)
"""What may stand between the words of a statement and the answer."""

REMARK = re.compile(
    r"(?:correct|right|wrong|incorrect|reasonable|helpful|consistent|valid|verified|confirmed|found|obtained|"
    r"calculated|computed|derived|to|in|that|what|the\s+same|clear|below|above|explanation|verification|check|"
    r"note|step|solution|conclusion|summary|final\s+answer|answer)\b",
    re.IGNORECASE,
)
"""How a sentence goes on that speaks of an answer, or a heading that is none."""
SENTENCE_END = re.compile(
    r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bProf)[.!?。][\"'*_`$)\]]*\s+(?=[*_\"'(]*[A-Z])"
)
REASON = re.compile(
    r",?\s+(?:because|since|which|as\s+(?:required|desired|shown|needed|expected))\b", re.IGNORECASE
)
DISPLAYS = ((r"\[", r"\]"), ("$$", "$$"), ("```", "```"))
PAIRS = (
    ("$$", "$$"),
    ("$", "$"),
    (r"\(", r"\)"),
    (r"\[", r"\]"),
    ("**", "**"),
    ("__", "__"),
    ("*", "*"),
    ("`", "`"),
    ("<b>", "</b>"),
    ("<strong>", "</strong>"),
)
COLOUR = re.compile(r"\\(?:text)?color\s*\{\w+\}\s*\{(.*)\}", re.DOTALL)
QUOTED = re.compile(r"[\"“]([^\"“”]+)[\"”]")
FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|sf|tt|it|normal)|mbox|hbox|underline|displaystyle|bf|rm|bm|"
    r"boldsymbol)\s*\{"
)
LIST_OR_GRID = re.compile(r"\s*[\[\]{}\"'|(]|(?:(?![^\W\d_]{2}).)*$")


def extract_answer(text: str) -> str:
    r"""The answer that a text states; where it states none, all of the text but for thinking.

    The first of these that occurs, and of several the last: what stands in ``<answer>...</answer>``, in
    ``\boxed{...}``, after "the answer is", "answer:" or ``####``. It comes without Markdown, dollars,
    back-ticks and the sentences behind it. What stands in thinking (``<think>``, ``<reasoning>`` and others,
    also where it is never closed) is not read.
    """
    answer = stated_answer(text)
    return visible(text).strip() if answer is None else answer


def stated_answer(text: str) -> str | None:
    """The answer that a text states, None if it states none; see `extract_answer`."""
    found = _find(visible(text))
    if found is None:
        return None
    for _ in range(8):  # a box in tags, a statement in a box, ...
        inner = _find(found)
        if inner is None or inner == found:
            break
        found = inner
    return unwrap(found)


def visible(text: str) -> str:
    """The text without thinking: a tag that is never closed hides what follows, one never opened what precedes."""
    out: list[str] = []
    kept, thinking, end = 0, False, 0
    for tag in THINKING.finditer(text):
        if not thinking:
            out.append(text[end : tag.start()])
        if tag["open"] is None:
            if not thinking:
                del out[kept:]
            thinking = False
        elif not thinking:
            thinking, kept = True, len(out)
        end = tag.end()
    if not thinking:
        out.append(text[end:])
    return "".join(out)


def _find(text: str) -> str | None:
    for look in (_tagged, last_box, _statement):
        found = look(text)
        if found is not None:
            return found
    return None


def _tagged(text: str) -> str | None:
    """What the last closed tags hold; without closed ones, what follows the last that is open."""
    openings = [tag.end() for tag in OPEN_TAG.finditer(text) if tag.end() < len(text)]
    closings = [tag.start() for tag in CLOSE_TAG.finditer(text)]
    if not openings:
        return None
    closed = [start for start in openings if closings and start <= closings[-1]]
    if not closed:
        return text[openings[-1] :]
    start = closed[-1]  # of nested tags the inner ones
    return text[start : next(end for end in closings if end >= start)]


def last_box(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` holds that is closed and not empty."""
    boxes = list(BOX.finditer(text))
    for box in reversed(boxes[-64:]):
        content = braced(text, box.end())
        if content is not None and content.strip():
            return content
    return None


def braced(text: str, start: int) -> str | None:
    """What stands from `start`, behind an opening brace, up to the brace that closes it."""
    depth = 1
    for brace in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : brace.start()]
    return None


def _statement(text: str) -> str | None:
    """What the last statement says; one that only says what it is not counts where there is no other."""
    denial = None
    for mark in reversed(list(STATEMENT.finditer(text))[-64:]):
        content = _content(text, mark)
        if not content or REMARK.match(content):
            continue
        if not re.match(r"not\b", content, re.IGNORECASE):
            return content
        denial = denial or content
    return denial


def _content(text: str, mark: re.Match[str]) -> str:
    lead = LEAD.match(text, mark.end())
    assert lead is not None
    start = lead.end()
    for left, right in DISPLAYS:
        if text.startswith(left, start):
            end = text.find(right, start + len(left))
            if end >= 0:
                return text[start + len(left) : end].strip()
    lines = text[start : start + 20_000].split("\n")
    kept = [lines[0]]
    if not mark[0].startswith("####") or "\n" in lead[0]:
        for line in lines[1:]:  # a grid goes on, prose does not
            if not line.strip() or not LIST_OR_GRID.match(line):
                break
            kept.append(line)
    content = "\n".join(kept)
    end_of = SENTENCE_END.search(content)
    if "?" in (content.rstrip()[-1:] if end_of is None else end_of[0]):
        return ""  # it asks
    content = content if end_of is None else content[: end_of.start()]
    content = REASON.split(content, maxsplit=1)[0]
    return unwrap(content.strip(), prose=True)


def unwrap(text: str, *, prose: bool = False) -> str:
    r"""A text without the dollars, Markdown and fonts (``\text{}``) that stand around all of it.

    A full stop or comma goes too, in prose always, elsewhere behind a single word or number.
    """
    text = text.strip()
    for _ in range(16):  # enough for what is meant, and no work without end for what is not
        before = text
        for left, right in PAIRS:
            inner = text[len(left) : -len(right)]
            if text.startswith(left) and text.endswith(right) and inner.strip() and left not in inner:
                text = inner.strip()
        font = FONT.match(text)
        if font is not None:
            inner = braced(text, font.end()) or ""
            if inner.strip() and font.end() + len(inner) + 1 == len(text):
                text = inner.strip()
        if prose:  # **The answer is 5.** leaves the stars of its end
            for sign in ("**", "__", "*", "`", "$"):
                if text.endswith(sign) and text.count(sign) % 2:
                    text = text.removesuffix(sign).strip()
            quoted = QUOTED.fullmatch(text)
            text = (text if quoted is None else quoted[1]).rstrip("# ") or text
        coloured = COLOUR.fullmatch(text)
        text = text if coloured is None else coloured[1].strip()
        text = text.removesuffix("\\\\").rstrip() or text
        if (
            text.endswith((".", ",", ";", "。"))
            and not text.endswith("..")
            and (prose or not re.search(r"\s", text))
        ):
            text = text[:-1].strip() or text
        if text == before:
            break
    return text
