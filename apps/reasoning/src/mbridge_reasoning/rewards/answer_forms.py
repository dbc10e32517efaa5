r"""Compares the forms of an answer that math-verify reads as other mathematics: choices, bases, clock times, dates."""

import re

from mbridge_reasoning.rewards.math_notation import NUMBER_WORDS

_MARKUP = re.compile(r"\\(?:text(?:bf|rm|it)?|math(?:bf|rm)|q?quad|[ ,;:!])|[{}$*]")
# `(B) 5`, `B. 5`, `B) 5`, `B: 5`, `Option B`; not `A: B = 3: 4`.
_CHOICE = re.compile(
    r"(?:(?i:option|choice)\s)?(?:\(([A-J])\)|([A-J])(?:[.)](?=\s|$)|:(?=\s)(?!.*=)|$))(?!.*\([A-J]\))\s*(.*)"
)
_STATEMENT = re.compile(r"(?i)\b(?:answer|option|choice)(?:\s+is\b|\s*:)+")
_BASED = re.compile(r"\(?([0-9A-Za-z]+)\)?_[{(]*(?:\\text\s*\{\s*)?(?:base\s*\}?\s*)?(\w+)\s*[})]*")
_CLOCK = re.compile(r"(\d{1,2}):(\d\d)\s*(?:([ap])\.?\s?m\b\.?)?", re.IGNORECASE)
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_MODULUS = re.compile(r"\\[pb]?mod\b\W*(\d+)")
# `6 if n is even`, `6 or more`, `5 \to 6`, `\ge 6`: math-verify takes the 6 out of each.
_MORE_THAN_A_VALUE = re.compile(r"^\W*\\(?:geq?|leq?|neq?)\b|\\(?:to|rightarrow)\b|\bif\b|\bor (?:more|less|fewer)\b")


def split_choice(text: str) -> tuple[str | None, str]:
    r"""Return the label and the rest of a choice such as `(B)\ 5`, `B. 5` or `The answer is B`.

    The label is None, and the rest all of `text`, where there is none, or where another one follows.
    """
    match = _CHOICE.fullmatch(_plain(_STATEMENT.split(text)[-1]).rstrip(". "))
    return (match[1] or match[2], match[3]) if match else (None, text)


def statement(text: str) -> str:
    """Return what follows the last "answer is" in `text`, else its last word."""
    text = text.strip().rstrip(".")
    parts = _STATEMENT.split(text)
    return parts[-1] if len(parts) > 1 else text.rpartition(" ")[2]


def same_form(given: str, wanted: str) -> bool | None:
    """Compare an answer with a solution where math-verify would ignore a part of them; None where it ignores nothing.

    A base, a half of the day and a modulus count only where both sides have them.
    """
    if _MORE_THAN_A_VALUE.search(given) and not _MORE_THAN_A_VALUE.search(wanted):
        return False
    moduli = [match[1] for match in map(_MODULUS.search, (given, wanted)) if match]
    if len(set(moduli)) == 2:
        return False
    given_times, wanted_times = _clock_times(given), _clock_times(wanted)
    if given_times and wanted_times and min(len(given_times), len(wanted_times)) == 1:
        return bool(given_times & wanted_times)
    if _DATE.fullmatch(_plain(wanted)) or _DATE.fullmatch(_plain(given)):
        return _plain(given) == _plain(wanted)
    return _same_base(given, wanted)


def _plain(text: str) -> str:
    return " ".join(_MARKUP.sub(" ", text).split())


def _clock_times(text: str) -> set[int]:
    """Return the minutes since midnight that `text` may mean: two without AM or PM, one with it or after noon."""
    match = _CLOCK.fullmatch(_plain(text))
    if match is None:
        return set()
    hours, minutes, half = int(match[1]), int(match[2]), (match[3] or "").lower()
    if hours > 12:
        return {60 * hours + minutes}
    morning = 60 * (hours % 12) + minutes
    return {"a": {morning}, "p": {morning + 720}}.get(half, {morning, morning + 720})


def _same_base(given: str, wanted: str) -> bool | None:
    """Compare numbers with their bases. If `1011_2 = 11_{10}` holds, each of its sides is an answer."""
    truth = _number_in_base(wanted)
    values = {side: _value(side) for side in given.split("=")}
    numbers = [_number_in_base(side) for side in values]
    if truth is None or not any(numbers):
        return None
    return truth in numbers and len(set(values.values()) - {None}) <= 1


def _number_in_base(text: str) -> tuple[str, int] | None:
    """Return (digits, base) of a number such as `101_2` or `1A_{16}`; None for anything else."""
    match = _BASED.fullmatch(text.strip().strip("$").strip())
    if match is None or not any(character.isdigit() for character in match[1]):
        return None
    base = int(match[2]) if match[2].isdecimal() else NUMBER_WORDS.get(match[2], 0)
    return (match[1].upper().lstrip("0") or "0", base) if 2 <= base <= 36 else None


def _value(side: str) -> int | None:
    digits, base = _number_in_base(side) or (side.strip(), 10)
    try:
        return int(digits, base)
    except ValueError:
        return None
