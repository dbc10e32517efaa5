"""Finds the final answer in what a policy wrote.

What is not finished is no answer: an open thought, answer tag or box hides whatever was guessed before it.
"""

import re

_END_OF_THOUGHTS = re.compile(r"</think(?:ing)?\s*>", re.IGNORECASE)
_THOUGHTS = re.compile(r"<think(?:ing)?\b", re.IGNORECASE)
_TAG = re.compile(r"<answer\b\s*>?", re.IGNORECASE)
_END_OF_TAG = re.compile(r"</answer\s*>", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def without_thoughts(text: str) -> str:
    """Return the text after the last </think>, or all of it without one; "" where thoughts never end."""
    text = _END_OF_THOUGHTS.split(text)[-1]
    return "" if _THOUGHTS.search(text) else text


def tagged_answer(text: str) -> str | None:
    """Return the content of the last <answer>…</answer>: "" where that tag is not closed, None without a tag."""
    tags = list(_TAG.finditer(text))
    if not tags:
        return None
    content, *closed = _END_OF_TAG.split(text[tags[-1].end() :], maxsplit=1)
    return content.strip() if closed else ""


def boxes(text: str) -> list[tuple[int, int, str | None]]:
    r"""Return (start, end, content) of each outermost \boxed{…} or \fbox{…}; content is None if it is not closed."""
    found: list[tuple[int, int, str | None]] = []
    end = 0
    for match in _BOX.finditer(text):
        if match.start() < end:
            continue  # inside the previous box
        end = _closing_brace(text, match.end())
        if end < 0:
            found.append((match.start(), len(text), None))
            break
        found.append((match.start(), end, text[match.end() : end - 1]))
    return found


def final_answer(text: str) -> str:
    """Return the content of the last answer tag, else of the last box, else all text after the thoughts."""
    text = without_thoughts(text)
    tagged = tagged_answer(text)
    if tagged is not None:
        return tagged
    found = boxes(text)
    return ((found[-1][2] or "") if found else text).strip()


def _closing_brace(text: str, start: int) -> int:
    """Return the position after the brace that closes the one before `start`, or -1."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return -1
