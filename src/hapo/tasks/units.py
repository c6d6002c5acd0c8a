"""Units and their names: 3 hours are 3 h, and not 3 minutes."""

from __future__ import annotations

import re

UNITS = {
    name: names.split()[0]
    for names in (
        "second s sec secs", "minute min mins", "hour h hr hrs", "day", "week", "month", "year yr yrs",
        "millimetre mm millimeter", "centimetre cm centimeter", "metre m meter", "kilometre km kilometer",
        "inch in inche", "foot ft feet", "yard yd yds", "mile mi", "milligram mg", "gram g",
        "kilogram kg kilo kgs",
        "pound lb lbs £ gbp \\pounds", "ounce oz", "ton tonne", "millilitre ml milliliter", "litre l liter",
        "gallon gal", "dollar $ usd us$ buck \\$ us\\$", "cent ¢", "euro € eur \\euro", "yen ¥ yuan \\yen",
        "rupee ₹ rs inr", "joule j", "newton n", "watt w", "kilowatt kw", "volt v", "square sq", "cubic cu",
        "acre",
        "mile/hour mph", "kilometre/hour kmh kph kmph", "degree deg degs", "radian rad", "celsius °c",
        "fahrenheit °f",
        "hz hertz", "pa pascal", "mol mole", "k kelvin",
    )
    for name in names.split()
}  # fmt: skip
"""Names of units, each with the name that stands for it."""
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
CHANGE = """
    january february march april may june july august september october november december
    jan feb mar apr jun jul aug sep oct nov dec
    hundred thousand million billion trillion
    or and to times plus minus divided over mod if for is are with either when where than not but am pm
    sin cos tan cot log ln exp sqrt frac pi infinity sum
    remainder base half quarter third thirds halves quarters fourths
"""
NO_UNITS = frozenset(CHANGE.split())
"""Words behind a number that change it, so that they are no unit."""


def unit_of(text: str, glued: bool = False) -> str | None:
    """The one name of a unit, "" for words that may be one; None for what is none. `glued` to its number: 5km."""
    degree = re.match(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\(?:degree|circ)\b", text)
    if degree is not None:
        rest = text[degree.end() :].strip()
        return {"": "", "C": "celsius", "F": "fahrenheit"}.get(rest)
    text = re.sub(r"\bper\b", "/", text.strip().lower()).replace("\\cdot", " ").replace("\\mathrm", " ")
    tokens = re.findall(r"/|\^\s*\{?\s*-?\d\s*\}?|\\?[^\W\d_]+\.?|[€£¥₹¢]|\\?\$|\S", text)
    names: list[str] = []
    known, first = True, True
    for token in tokens:
        token = token.rstrip(".")
        if token == "/":
            names.append("/")
        elif token.startswith("^"):
            names.append("^" + re.sub(r"[^-\d]", "", token))
        elif token in UNITS or token.removesuffix("s") in UNITS:
            if glued and first and len(token) == 1:
                return None  # 5m may be 5 times m
            names.append(UNITS.get(token) or UNITS[token.removesuffix("s")])
        elif not token.isalpha() or token in NO_UNITS or (first and len(token) < 3) or (glued and first):
            return None
        else:
            known = False
        first = False
    if not tokens or len(tokens) > 7:
        return None
    if not known:
        return ""
    name = "".join(n if n in "/" or n.startswith("^") else f" {n}" for n in names).replace("/ ", "/").strip()
    area = re.fullmatch(r"(square|cubic) (\S+)|(\S+) (squared|cubed)", name)
    return f"{area[2]}^{2 if area[1] == 'square' else 3}" if area and area[1] else name
