r"""What a stated answer means: letters of choices, a time of the day, or mathematics in LaTeX with its unit.

math-verify compares mathematics. Read before it is what it reads wrongly, or differently from one version of
its parser (antlr) to the next: percent, mixed numbers, repeating decimals, 3e-05, units, signs outside of LaTeX.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

from .choices import letters_of
from .stated import FONT, braced, unwrap
from .units import SCALES, UNITS, unit_of

LONGEST = 2000
"""Characters of an answer that are read here; a longer one goes to math-verify as it stands."""

SIGNS = {
    "√": r"\sqrt ", "π": r"\pi ", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*",
    "−": "-", "–": "-", "—": "-", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "θ": r"\theta ", "α": r"\alpha ",
    "β": r"\beta ", "λ": r"\lambda ", "ℝ": r"\mathbb{R}", "°": r"^{\circ}", "º": r"^{\circ}",
    "²": "^{2}", "³": "^{3}", "⁄": "/", "％": "%", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "",
    "½": r" \frac{1}{2}", "¼": r" \frac{1}{4}", "¾": r" \frac{3}{4}", "⅓": r" \frac{1}{3}", "⅔": r" \frac{2}{3}",
    "⅛": r" \frac{1}{8}", "⅕": r" \frac{1}{5}",
}  # fmt: skip
SPACING = re.compile(r"\\[,;:> ]|~|\\q?quad\b|\\(?:left|right)(?![a-z])\s*(?=[()\[\]|])|\\displaystyle\b")
THOUSANDS = re.compile(r"(?<![\d.])(\d{1,3})((?:(,\s?|\s)\d{3})(?:\3\d{3})*)(?![\d])")
FUNCTIONS = re.compile(r"(?<![\\A-Za-z])(sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp|pi)(?![A-Za-z])")
ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\s*(?:\(([^()]*)\)|\{([^{}]*)\})")

PLAIN = r"(?:\d+(?:\.\d*)?|\.\d+)"
NUMBER = re.compile(
    rf"""
    (?P<sign>[-+]?)\s*(?:
      (?P<whole>\d+)[\s+]*\\[dt]?frac\s*(?:\{{\s*(?P<up>\d+)\s*\}}\s*\{{\s*(?P<down>\d+)\s*\}}|(?P<u>\d)\s*(?P<d>\d))
    | (?P<whole2>\d+)\s+(?P<up2>\d+)\s*/\s*(?P<down2>\d+)
    | (?P<before>\d*)\.(?P<fixed>\d*)(?:\\overline\s*\{{(?P<over>\d+)\}}
        |\\bar\s*\{{?(?P<bar>\d+)\}}?|\((?P<round>\d+)\)
        |\\dot\s*\{{?(?P<dot>\d)\}}?(?P<between>\d*)(?:\\dot\s*\{{?(?P<dot2>\d)\}}?)?|(?P<line>(?:\d\u0305)+))
    | (?P<before2>\d*)\.(?P<digits>\d+)\s*(?:\.\.\.|…|\\l?dots|\\cdots)
    | (?P<mantissa>{PLAIN})(?:[eE](?P<exp>[-+]?\d{{1,6}})(?![\d.])
        |\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{{\s*(?P<power>[-+]?\d{{1,6}})\s*\}}|(?P<power2>[-+]?\d{{1,6}})))
    | \\[dt]?frac\s*(?:\{{\s*(?P<num>-?{PLAIN})\s*\}}\s*\{{\s*(?P<den>{PLAIN})\s*\}}|(?P<n>\d)\s*(?P<m>\d))
    | (?P<num2>{PLAIN})\s*/\s*(?P<den2>{PLAIN})
    | (?P<decimal>{PLAIN})
    )
    """,
    re.VERBOSE,
)
LIMIT = 400
"""Powers of ten that are written out; beyond, the power stays one."""

CURRENCY = r"(?:(?:US|A|C)?\\?\$|€|£|¥|₹|\\(?:euro|pounds|yen)\b|(?:USD|EUR|GBP|Rs)\b\.?)"
PREFIX = re.compile(
    r"(?:\\approx|≈|=|(?:approximately|approx\.?|about|around|roughly|exactly|only)\s)\s*", re.IGNORECASE
)
EQUATION = re.compile(
    r"((?:\\angle\s*)?[A-Za-z]{1,3}(?:_\{?\w+\}?)?(?:\s*\([a-z0-9]\))?|\\[a-z]+)\s*=\s*([^=<>]+)$"
)
PERCENT = re.compile(r"\\?%|percent(?:age)?(?:\s+points?)?\b|per\s+cent\b|pct\b", re.IGNORECASE)
TIME = re.compile(
    r"(?<![\d:.])(\d{1,2})(?::([0-5]\d))?(?::([0-5]\d))?\s*(?:(a\.?\s?m|p\.?\s?m)\b\.?|(o'clock|hours|hrs|h|noon)\b)?(?![\d:])",
    re.IGNORECASE,
)

BEHIND = re.compile(r"(?<=[\d})a-z])\s+((?:[A-Za-z]{2,}\.?(?:\^\{?\d\}?)?(?:[\s/]+|$)){1,7})$")
"""Words behind mathematics that may be its unit."""

WORDS = re.compile(r"[^\W\d_][^\W\d_]+(?:[\s'.,-]+[^\W\d_]+)*\.?")
DATE = re.compile(r"\d{1,4}\s*([-/.])\s*\d{1,2}\s*\1\s*\d{1,4}")
RANGE = re.compile(r"\d+(?:\.\d+)?\s*-\s*\d+(?:\.\d+)?(?:\s*[A-Za-z]{2,})?")


@dataclass(frozen=True)
class Reading:
    """What an answer means."""

    latex: str = ""
    """As mathematics; of a percentage the number before the sign."""
    whole: str = ""
    """As mathematics, with all that stands behind the number."""
    percent: bool = False
    unit: str | None = None
    """The unit by its one name, "" for one without a known name, None for none."""
    letters: frozenset[str] = frozenset()
    """The letters that it names, if it may be an answer to a multiple choice."""
    time: tuple[int, int, int, str] | None = None
    """Hour, minute, second and a, p or nothing."""
    words: bool = False
    """It is made of words, in no `\\text{}`."""

    @property
    def plain(self) -> bool:
        """Whether all of it was read as a number with a unit."""
        return self.latex != self.whole


def read(answer: str) -> Reading:
    """What a stated answer means."""
    if len(answer) > LONGEST:
        return Reading(latex=answer, whole=answer)
    text = unwrap(answer)
    wrapped, flat = _tidy(text), _tidy(_without_fonts(text))
    flat = PREFIX.sub("", flat, count=1) if PREFIX.match(flat) else flat
    letters = letters_of(_without_fonts(text.replace("$", "").replace("*", "")))
    time = time_of(flat)
    name, right = "", flat
    equation = EQUATION.fullmatch(flat)
    if equation is not None:
        name, right = f"{equation[1]}=", PREFIX.sub("", equation[2].strip(), count=1)
    quantity = _quantity(right)
    if quantity is not None:
        value, percent, unit = quantity
        return Reading(name + value, _mathematics(wrapped), percent and not name, unit, letters, time)
    words = WORDS.fullmatch(flat) is not None and re.search(r"[^\W\d_]{3}", flat) is not None
    words = words and not FUNCTIONS.fullmatch(flat)
    if words and FONT.search(answer) is not None:
        latex = rf"\text{{{flat.rstrip('.')}}}"
        return Reading(latex, latex, letters=letters)
    latex = _mathematics(wrapped)
    return Reading(latex, latex, letters=letters, time=time, words=words)


def time_of(text: str) -> tuple[int, int, int, str] | None:
    """The time of the day that is all of a text: 12:00, 3 pm, 3:30 p.m."""
    match = TIME.fullmatch(text.strip())
    if match is None or not (match[2] or match[4] or (match[5] or "").lower() == "o'clock"):
        return None
    hour, minute, second = (int(part or 0) for part in match.groups()[:3])
    return (hour, minute, second, (match[4] or "")[:1].lower()) if hour <= 24 else None


def same_time(one: tuple[int, int, int, str], other: tuple[int, int, int, str]) -> bool:
    """Whether two times of the day are one; 3:30 is 3:30 am and 3:30 pm, too."""

    def of_day(time: tuple[int, int, int, str]) -> int:
        return time[0] % 12 + 12 * (time[3] == "p") if time[3] else time[0] % 24

    if one[1:3] != other[1:3]:
        return False
    return of_day(one) == of_day(other) or (one[0] == other[0] and "" in (one[3], other[3]))


def canonical_number(text: str) -> str | None:
    """A plain number by its value, in digits: 5.0, "1,234", 3e-05 are "5", "1234", "0.00003"; None for others."""
    text = text.strip().replace("−", "-")
    if not re.fullmatch(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d*)?(?:[eE][-+]?\d{1,3})?", text):
        return None
    try:
        number = Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None
    return format(number.normalize(), "f") if number else "0"


def gold_text(gold: Any) -> str:
    """A gold answer of a data set as text; a number by its value: 5.0 is "5", 3e-05 "0.00003".

    Raises ValueError for what is no text and no number.
    """
    if isinstance(gold, (str, bool)):
        return str(gold)
    if hasattr(gold, "item"):  # numpy's
        gold = gold.item()
    if not isinstance(gold, (int, float, Decimal)) or gold != gold or gold in (float("inf"), -float("inf")):
        raise ValueError("it is no text and no number")
    if isinstance(gold, int):
        return str(gold)
    number = Decimal(repr(gold)) if isinstance(gold, float) else gold
    return format(number.normalize(), "f") if number else "0"


def gold_fault(gold: Reading, text: str) -> str | None:
    """Why a gold answer cannot be compared by math-verify, and what to write instead; None where it can."""
    flat = _tidy(_without_fonts(unwrap(text)))
    if gold.letters or gold.time is not None:
        return None
    if DATE.fullmatch(flat):
        return "it looks like a date, which is read as a calculation; choose the reward exact for dates"
    if RANGE.fullmatch(flat):
        return (
            "it is read as a subtraction; write a range as an interval, such as [5, 6], or choose the reward exact"
        )
    if re.search(r"(?:\.\.\.|…|\\l?dots|\\cdots)", flat) and not gold.plain:
        return r"where it goes on is not said; write a repeating decimal as 0.\overline{3} or as a fraction"
    if gold.words or re.search(r"(?<![\\A-Za-z])[A-Za-z]{3,}", _mathematics_alone(gold.latex)):
        return (
            "math-verify reads a word as a product of letters; give the number with one unit at most, put a word "
            r"into \text{}, or choose the reward exact"
        )
    return None


def _mathematics_alone(latex: str) -> str:
    return re.sub(r"\\(?:text|textbf|mathrm|mbox|operatorname|begin|end|mathbb|mathcal)\s*\{[^}]*\}", "", latex)


def _without_fonts(text: str) -> str:
    r"""The text with ``\text{km}`` and the like as `` km``."""
    for _ in range(32):
        font = FONT.search(text)
        if font is None:
            break
        inner = braced(text, font.end())
        if inner is None:
            break
        behind = text[font.end() + len(inner) + 1 :]
        gap = " " if inner[:1].isalpha() else ""
        text = text[: font.start()] + gap + inner + (" " if behind[:1].isalnum() else "") + behind
    return text.strip()


def _tidy(text: str) -> str:
    """LaTeX with simple spaces, its signs in ASCII, thousands together, without dollars."""
    for sign, latex in SIGNS.items():
        text = text.replace(sign, latex)
    text = re.sub(r"√", r"\\sqrt ", text)
    text = re.sub(r"\\sqrt (\d+|[a-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt \s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = text.replace("\\!", "").replace("{,}", ",").replace("{:}", ":").replace(r"\{,\}", ",")
    text = SPACING.sub(lambda m: "" if m[0].startswith((r"\left", r"\right")) else " ", text)
    text = re.sub(r"\\\(|\\\)|\\\[|\\\]|`", "", text)
    text = re.sub(r"(?<!\\)\$(?!\s?\d)|(?<!\\)(?<![A-Z])\$(?=\s?[^$]*\$)", " ", text)
    text = re.sub(r"^\*\*(.*)\*\*$", r"\1", text.strip())
    text = re.sub(r"\s+", " ", text).strip()
    if THOUSANDS.search(text) and not re.search(r"[(\[{;]|, ", text):
        text = THOUSANDS.sub(lambda m: m[1] + re.sub(r"[,\s]", "", m[2]), text)
    return text


def _quantity(text: str) -> tuple[str, bool, str | None] | None:
    """A number, whether it is a percentage, and its unit; None if a text is not that and nothing else."""
    money = re.match(rf"(?P<sign>[-+]?)\s*(?P<money>{CURRENCY})\s*(?P<minus>-?)", text)
    if money is not None:
        text = money["sign"] + money["minus"] + text[money.end() :]
    brackets = re.fullmatch(r"\(\s*(-\s*[\d.]+)\s*\)(.*)|\{\s*([\d.]+)\s*\}(.*)", text)
    if brackets is not None:
        text = (brackets[1] or brackets[3]) + (brackets[2] or brackets[4] or "")
    number = NUMBER.match(text)
    if number is None:
        return None
    value = _value(number)
    rest = text[number.end() :]
    if value is None or re.match(r"[,.]?\d", rest):
        return None
    glued = rest[:1].isalpha()
    rest = rest.strip()
    scale = re.match(r"(" + "|".join(SCALES) + r")\b\s*", rest, re.IGNORECASE)
    power = 0
    if scale is not None:
        power, rest = SCALES[scale[1].lower()], rest[scale.end() :]
    percent = PERCENT.match(rest)
    if percent is not None:
        rest = rest[percent.end() :].strip()
    unit = unit_of(rest.rstrip("."), glued) if rest.rstrip(".") else None
    if rest.rstrip(".") and unit is None:
        return None
    if money is not None:
        unit = unit or UNITS.get(money["money"].lower().strip("."), "")
    return _latex(value * 10**power), percent is not None, unit


def _value(number: re.Match[str]) -> Fraction | str | None:
    group = number.groupdict()
    sign = -1 if group["sign"] == "-" else 1

    def first(*names: str) -> str | None:
        return next((group[name] for name in names if group[name] is not None), None)

    try:
        whole = first("whole", "whole2")
        if whole is not None:
            up, down = int(first("up", "u", "up2") or 0), int(first("down", "d", "down2") or 0)
            return sign * (int(whole) + Fraction(up, down))
        repeated = first("over", "bar", "round", "line")
        if group["dot"] is not None:
            repeated = group["dot"] + ((group["between"] + group["dot2"]) if group["dot2"] else "")
        if repeated is not None:
            repeated = repeated.replace("\u0305", "")
            return sign * _repeating(group["before"], group["fixed"], repeated)
        if group["digits"] is not None:
            block = re.search(r"(\d+?)\1{2,}$", group["digits"]) or re.search(r"(\d{3,}?)\1$", group["digits"])
            if block is None:
                return None
            return sign * _repeating(group["before2"], group["digits"][: block.start()], block[1])
        up_text, down_text = first("num", "n", "num2"), first("den", "m", "den2")
        if up_text is not None and down_text is not None:
            return sign * Fraction(up_text) / Fraction(down_text)
        power = first("exp", "power", "power2")
        digits = first("mantissa", "decimal")
        assert digits is not None
        if power is not None and abs(int(power)) > LIMIT:
            return None
        return sign * Fraction(digits.rstrip(".")) * Fraction(10) ** int(power or 0)
    except (ValueError, ZeroDivisionError):  # int() refuses thousands of digits
        return None


def _repeating(before: str, fixed: str, repeated: str) -> Fraction:
    shift = 10 ** len(fixed)
    return Fraction(int((before or "0") + fixed), shift) + Fraction(
        int(repeated), shift * (10 ** len(repeated) - 1)
    )


def _latex(value: Any) -> str:
    """A number for math-verify, which compares decimals by six places: exactly, where these are too few."""
    up, down = value.numerator, value.denominator
    if down == 1:
        return str(up)
    rest = down
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest == 1 and abs(value) >= Fraction(1, 100) and down < 10**30:
        return (
            format((Decimal(up) / Decimal(down)).normalize(), "f")
            if len(str(up)) < 20
            else rf"\frac{{{up}}}{{{down}}}"
        )
    return rf"{'-' if up < 0 else ''}\frac{{{abs(up)}}}{{{down}}}"


def _mathematics(text: str) -> str:
    """LaTeX for math-verify of what is no plain number."""
    text = re.sub(r"(?<=[\w)])\*\*(?=[\w(])", "^", text)
    text = ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text)
    text = FUNCTIONS.sub(r"\\\1 ", text)
    text = re.sub(
        r"\s*(?:,\s*)?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])\s*|\s*\\text\{\s*,?\s*(?:and|or)\s*\}\s*", ", ", text
    )
    parts = text.split(",")
    if len(parts) > 1 and all(re.search(r"\\?%\W*$", part) for part in parts):
        text = re.sub(r"\\?%", "", text)
    text = re.sub(r"(\d+(?:\.\d+)?)\s*\\?%", r"\\frac{\1}{100}", text)
    bare = BEHIND.search(text)
    if bare is not None and unit_of(bare[1]):
        text = text[: bare.start(1)]
    return text.strip(" .;")
