r"""Rewrites the ways in which people and models write numbers, sets and units into the LaTeX that math-verify reads.

Both the answer and the solution are rewritten, so a rule needs to be consistent rather than complete.
"""

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

Rule = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_VULGAR_FRACTIONS = {
    ord(character): "\\frac{{{0.numerator}}}{{{0.denominator}}}".format(
        Fraction(unicodedata.numeric(character)).limit_denominator(10)
    )
    for character in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
}
_SYMBOLS = str.maketrans(
    {"。": ".", "：": ": ", "、": ",", "或": ",", "和": ",", "\u3000": " ", "\u00a0": " ", "−": "-", "–": "-"}
    | {"⁄": "/", "∕": "/"}
    | {"∞": r"\infty ", "π": r"\pi ", "∅": r"\emptyset ", "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "×": r"\times "}
    | {"·": r"\cdot ", "√": r"\sqrt ", "°": r"^\circ ", "€": "", "£": "", "¥": "", "￥": "", "₹": ""}
)
_CHARACTERS = _FULL_WIDTH | _VULGAR_FRACTIONS | _SYMBOLS
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_POWERS = {"百": 10**2, "千": 10**3, "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
# Ideographs that may be part of the number itself are left, so that the number is not taken for another one.
_IDEOGRAPHS = re.compile(r"(?:(?![〇零一二两三四五六七八九十百千万萬亿億兆半几负負分点點倍])[\u3400-\u9fff])+")
_TEXT = re.compile(r"\\(?:text|mathrm)\{(.*)\}")
NUMBER_WORDS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8} | {
    "nine": 9,
    "ten": 10,
    "eleven": 11,
    "twelve": 12,
    "sixteen": 16,
}
_LARGE = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def _repeating(match: re.Match[str]) -> str:
    r"""Write 1.2\overline{34} as a fraction: (1234 - 12) / 990."""
    whole, fixed, repeated = match[1], match[2], match[3] or match[4]
    numerator = int(f"{whole}{fixed}{repeated}") - int(f"{whole}{fixed}" or "0")
    value = Fraction(numerator, (10 ** len(repeated) - 1) * 10 ** len(fixed))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _digits(match: re.Match[str]) -> str:
    return re.sub(r"\D", "", match[0])


_CLAIM = r"(?:\$?(?:\\boxed\{)?\(?(?:-?[\d./,]*\d|[A-J]\b)\)?\}?\$?)"
_ANYWHERE: tuple[Rule, ...] = (
    # `\$` is money, but math-verify takes it for a delimiter; after a line break `\\`, `$` is one.
    (re.compile(r"(?<!\\)\\\$"), ""),
    (re.compile(r"\\fbox(?![a-zA-Z])"), r"\\boxed"),
    (re.compile(r"\\varnothing(?![a-zA-Z])"), r"\\emptyset"),
    (re.compile(r"\\degrees?(?![a-zA-Z])"), r"^\\circ"),
    (re.compile(r"\{:\}"), ":"),
    # `5 and not 6` claims 5 alone.
    (re.compile(rf"(?i:not|n't|rather than|instead of|不是|而非|并非)(?: be| equal to)?\s*{_CLAIM}"), " "),
    (re.compile(r"[⁻⁰¹²³⁴-⁹]+"), lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}"),
    # Chinese: minus five, a half (parts first), 3.5 ten thousands.
    (re.compile(r"[负負]\s*(?=\d)"), "-"),
    (re.compile(r"(\d+)\s*分之\s*(\d+)"), r"\\frac{\2}{\1}"),
    (
        re.compile(rf"(\d+(?:\.\d+)?)\s*([{''.join(_POWERS)}])"),
        lambda match: str(Fraction(match[1]) * _POWERS[match[2]]),
    ),
    # Groups of digits, as in 12\,345 and 12{,}345.
    (re.compile(r"(?<![\d.])\d{1,3}(?:(?:\\[,!:; ]|\{,\}|,\\!)\d{3})+(?!\d)"), _digits),
    (re.compile(r"(?<![\d.])(\d*)\.(\d*)(?:\\overline|\\bar|\\dot)\s*(?:\{(\d+)\}|(\d))(?!\d)"), _repeating),
)

_EXPRESSION: tuple[Rule, ...] = (
    (re.compile(r"\\(?:boldsymbol|bm|underline|checkmark)(?![a-zA-Z])"), ""),
    (re.compile(r"^\\text\s*\{[^{}]*(?:\bis|:)\s*\}"), ""),  # \text{The answer is } 5
    (re.compile(r"^(?:\\text\s*\{)?([A-Za-z]+)\}?$"), lambda match: str(NUMBER_WORDS.get(match[1].lower(), match[0]))),
    (
        re.compile(rf"^(-?\d+(?:\.\d+)?)\s*(?:\\text\s*\{{)?\s*({'|'.join(_LARGE)})\b"),
        lambda match: f"{Fraction(match[1]) * _LARGE[match[2]]} " + ("\\text{" if "{" in match[0] else ""),
    ),
    (re.compile(r"(?<=\d)\^?\{?\\text\s*\{(?:st|nd|rd|th)\}\}?"), ""),
    (re.compile(r"(?<=\d)!=(?=\s*\d)"), "! ="),  # a factorial, not an inequality
    (re.compile(r"(?<![\d.,/])(\d+)\s+(\d+)/(\d+)$"), r"\1\\frac{\2}{\3}"),
    (re.compile(r"^\\?\{\s*[a-z]\s*(?:\\mid|\||:)(.*?)\\?\}$"), r"\1"),  # {x | x > 1}
    (re.compile(r"(?<!\\)~(?!=)"), " "),  # a space at which no line breaks
    (re.compile(r"(?:(?<!\\)[.,;:?]|\s)+$"), ""),  # the punctuation of the sentence around it
    (re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d.])"), _digits),  # 12 345; outside, two numbers may stand so
    # 1.5e-3 and 1e3; 2e-3 may be twice Euler's number.
    (re.compile(r"(\d\.\d+|^\d+(?=[eE]\+?\d+$))[eE]([+-]?\d+)"), r"\1 \\cdot 10^{\2}"),
    (re.compile(r"(?<=\d)\s+(?:km|m|cm|mi|miles|ft|feet)/(?:s|h|hr|min)$"), ""),  # math-verify knows only plain units
    (re.compile(r"^(-?[\d.]+)\s*=\s*([a-zA-Z])$"), r"\2=\1"),  # 5 = x; math-verify reads only x = 5
    (re.compile(r"(?<![\\a-zA-Z])pi(?![a-zA-Z])"), r"\\pi "),
    (re.compile(r"(?<![\\a-zA-Z])inf(?:ini)?ty(?![a-zA-Z])"), r"\\infty "),
    (re.compile(r"(?:\\|(?<![\\a-zA-Z]))sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\s*\*\s*"), r" \\cdot "),
)


def _rewrite(text: str, rules: tuple[Rule, ...]) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def normalize(text: str) -> str:
    """Rewrite the spellings that mean the same wherever they stand, in prose too."""
    return _rewrite(text.translate(_CHARACTERS), _ANYWHERE)


def without_chinese(text: str) -> str:
    """Replace text in Chinese by spaces, except for characters that belong to a number."""
    return _IDEOGRAPHS.sub(" ", text)


def normalize_expression(content: str) -> str:
    """Rewrite the normalized content of a box, an answer tag or a solution, which is one expression."""
    numbers = without_chinese(content)
    if numbers != content and not re.search(r"[0-9A-Za-z]", re.sub(r"\\(?:text|mathrm)\b", "", numbers)):
        return _TEXT.sub(r"\1", content).strip()  # a word, not a number with its unit
    return _rewrite(numbers.strip(), _EXPRESSION)
