"""Rewrites the many ways in which people and models write one number or set into the LaTeX that math-verify reads."""

import re
from fractions import Fraction

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_CHARACTERS = _FULL_WIDTH | str.maketrans(
    {
        "。": ".",
        "：": ": ",
        "、": ",",
        "或": ",",
        "和": ",",
        "\u3000": " ",
        "\u00a0": " ",
        "−": "-",
        "∞": r"\infty ",
        "π": r"\pi ",
        "∅": r"\emptyset ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "∪": r"\cup ",
        "×": r"\times ",
        "·": r"\cdot ",
    }
)
_POWERS = {"百": 10**2, "千": 10**3, "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_TIMES_POWER = re.compile(rf"(\d+(?:\.\d+)?)\s*([{''.join(_POWERS)}])")
_PARTS = re.compile(r"(\d+)\s*分之\s*(\d+)")
# Ideographs that may be a part of the number itself are left, so that the number is not taken for another one.
_NUMERALS = "〇零一二两三四五六七八九十百千万萬亿億兆半几负負分点點倍"
_IDEOGRAPHS = re.compile(rf"(?:(?![{_NUMERALS}])[\u3400-\u9fff])+")
_GROUPS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\\[,!:; ]|\{,\}|,\\!)\d{3})+(?!\d)")
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)(?:\\overline|\\bar|\\dot)\s*(?:\{(\d+)\}|(\d))(?!\d)")
_BASED = re.compile(r"\(?([0-9A-Za-z]+)\)?_(?:\{?\(?(\d+)\)?\}?)")


def normalize(text: str) -> str:
    """Rewrite full-width characters, thin spaces between groups of digits, repeating decimals, and functions and
    constants without a backslash. Text in Chinese becomes spaces, except where it belongs to a number."""
    text = text.translate(_CHARACTERS)
    text = _PARTS.sub(r"\\frac{\2}{\1}", re.sub(r"[负負]\s*(?=\d)", "-", text))
    text = _TIMES_POWER.sub(lambda match: str(Fraction(match[1]) * _POWERS[match[2]]), text)
    text = _IDEOGRAPHS.sub(" ", text)
    text = _GROUPS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = _REPEATING.sub(_repeating, text)
    return text.replace(r"\varnothing", r"\emptyset").replace(r"\fbox", r"\boxed")


def normalize_content(content: str) -> str:
    """Normalize what stands in a box or an answer tag, or is a solution: one mathematical expression."""
    normalized = normalize(content)
    if not re.search(r"[0-9A-Za-z]", re.sub(r"\\(?:text|mathrm)\b", "", normalized)) and _IDEOGRAPHS.search(content):
        return re.sub(r"\\(?:text|mathrm)\{(.*)\}", r"\1", content).strip()  # a word, not a number with its unit
    content = re.sub(r"(?:(?<!\\)[.,;:]|\s)+$", "", normalized.strip())
    content = re.sub(r"(?<![\\a-zA-Z])(pi|infty|infinity)(?![a-zA-Z])", lambda m: rf"\{m[1][:5]} ", content)
    content = content.replace(r"\infin ", r"\infty ")
    content = re.sub(r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", content)
    return re.sub(r"\s*\*\s*", r" \\cdot ", content.replace("**", "^"))


def number_in_base(content: str) -> tuple[str, int] | None:
    r"""Return (digits, base) of a number such as `101_2` or `1A_{16}`; None for anything else."""
    match = _BASED.fullmatch(content.strip().strip("$").strip())
    if match is None or not any(character.isdigit() for character in match[1]) or not 2 <= int(match[2]) <= 36:
        return None
    return match[1].upper().lstrip("0") or "0", int(match[2])


def _repeating(match: re.Match[str]) -> str:
    """Write 1.2\\overline{34} as a fraction: (1234 - 12) / 990."""
    whole, fixed, repeated = match[1], match[2], match[3] or match[4]
    numerator = int(f"{whole}{fixed}{repeated}") - int(f"{whole}{fixed}" or "0")
    value = Fraction(numerator, (10 ** len(repeated) - 1) * 10 ** len(fixed))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
