"""The letters that an answer to a multiple choice names."""

from __future__ import annotations

import re

LETTER = r"(?:\(\s*[A-J]\s*\)|\[[A-J]\]|[A-J]\b(?:[.)](?!\w))?)"
CHOICE_WORDS = re.compile(
    r"(?:(?:both|only|the|correct|options?|choices?|answers?|letters?|is|are)\b[\s:]*)+", re.IGNORECASE
)
CHOICES = re.compile(
    rf"({LETTER}(?:\s*(?:,\s*and|,|;|&|/|\band\b|\bor\b|\s)\s*{LETTER})*)\.?"
    r"(?:\s+(?:only|(?:is|are)\s+(?:the\s+)?(?:correct|right|best|true)?\s*(?:answers?|options?|choices?)?))?[.!]?"
)
LABEL = re.compile(r"(?:\(\s*([A-J])\s*\)|\[([A-J])\]|([A-J])\s*[.):])\s*\S", re.DOTALL)
SAID = re.compile(
    r"(?<![A-Za-z])\(?([A-J])\)?\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b"
    r"|\b(?:choose|pick|select)\s+(?:the\s+)?(?:option\s+|answer\s+)?\(?([A-J])\)?(?![A-Za-z])"
)
MORE_LABELS = re.compile(r"(?:,|;|\band\b|\n)\s*(?:\(\s*([A-J])\s*\)|([A-J])\s*[.):])\s*\S")
RUN = re.compile(r"[A-J]{2,8}")


def letters_of(text: str) -> frozenset[str]:
    """The letters of choices that a text names: "B", "(B)", "B) 12", "Option B", "A and C"; else none."""
    text = re.sub(r"\s+", " ", text.replace("\\", " ")).strip()
    words = CHOICE_WORDS.match(text)
    text = text if words is None else text[words.end() :]
    small = r"\(?[a-j](?![a-z])" if words is not None else r"\(?[a-j]\)"  # else it may be a variable
    if re.match(small, text):
        text = text.replace(text.strip("(")[0], text.strip("(")[0].upper(), 1)
    listed = CHOICES.fullmatch(text)
    if listed is not None:
        return frozenset(re.findall(r"(?<![A-Za-z])[A-J](?![A-Za-z])", listed[1]))
    if RUN.fullmatch(text) and len(set(text)) == len(text):
        return frozenset(text)
    label = LABEL.match(text)
    if label is None:
        return frozenset()
    more = [a or b for a, b in MORE_LABELS.findall(text)]
    return frozenset(letter for letter in [*label.groups(), *more] if letter)


def letter_said(text: str) -> frozenset[str]:
    """The letter that a text last calls right or chooses: "(B) is correct", "I choose B"; else none."""
    said = SAID.findall(text)
    return frozenset(said[-1][0] or said[-1][1]) if said else frozenset()
