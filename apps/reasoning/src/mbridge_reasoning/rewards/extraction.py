"""Finds the final answer in what a policy wrote."""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def without_thoughts(text: str) -> str:
    """Return what follows the last </think>, or all of `text`."""
    return text.rpartition("</think>")[2]


def tagged_answer(text: str) -> str | None:
    """Return the content of the last <answer>…</answer>: "" where the last tag is not closed, None without a tag."""
    start = text.rfind("<answer>")
    if start < 0:
        return None
    content, closing, _ = text[start + len("<answer>") :].partition("</answer>")
    return content.strip() if closing else ""


def boxes(text: str) -> list[tuple[int, int, str | None]]:
    """Return (start, end, content) of each \\boxed{…} and \\fbox{…}, outermost alone; content None: never closed."""
    found: list[tuple[int, int, str | None]] = []
    end = 0
    for match in _BOX.finditer(text):
        if match.start() < end:
            continue  # inside the one before
        end = _closing_brace(text, match.end())
        if end < 0:
            found.append((match.start(), len(text), None))
            break
        found.append((match.start(), end, text[match.end() : end - 1]))
    return found


def final_answer(text: str) -> str:
    """Return the content of the last closed answer tag, else of the last closed box, else all after the thoughts."""
    text = without_thoughts(text)
    tagged = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    if tagged:
        return str(tagged[-1]).strip()
    closed = [content for *_, content in boxes(text) if content is not None]
    return (closed[-1] if closed else text).strip()


def _closing_brace(text: str, start: int) -> int:
    """Return the position after the brace that closes the one before `start`, or -1."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return -1
