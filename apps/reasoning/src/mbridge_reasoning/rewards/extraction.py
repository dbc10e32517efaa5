"""Finds the final answer in what a policy wrote."""

import re


def without_thoughts(text: str) -> str:
    """Return what follows the last </think>, or all of `text`."""
    return text.rpartition("</think>")[2]


def final_answer(text: str) -> str:
    """Return the content of the last <answer>…</answer>, else of the last \\boxed{…}, else all after the thoughts."""
    text = without_thoughts(text)
    tagged = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    if tagged:
        return str(tagged[-1]).strip()
    boxed = _last_boxed(text)
    return (text if boxed is None else boxed).strip()


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None
