"""Scores answers with a function that the user names: `reward.function=path/to/file.py:name` or `module:name`.

The function is called with the text of the answer, the row of its prompt (a dict with all columns) and why the answer
ended ("end_token", "stop_string" or "length"), and returns a number:

    def concise(text, row, end):
        return float(row["answer"] in text and end != "length") - 0.001 * len(text)

With the attribute `batched = True` it is called with three lists of equal length instead, and returns a list of
numbers. Which answers share a call depends on which were waiting, so each score must depend on its own answer alone.
"""

import importlib
import importlib.util
import math
import os
import sys
import traceback
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from mbridge_reasoning.errors import RewardError
from mbridge_reasoning.rewards.base import Answer, Scorer


def function_scorer(spec: str) -> Scorer:
    """Load the function that `spec` names.

    Raises `RewardError` if the file, module or name does not exist or importing it fails; when called, if the function
    raises or does not return finite numbers. The message has the user's own part of the traceback.
    """
    setting = f"reward.function={spec}"
    place, _, name = spec.rpartition(":")
    try:
        module = _load(place)
    except (Exception, SystemExit) as error:  # noqa: BLE001 (the user's code)
        raise RewardError(f"{setting} cannot be imported:\n{_own_traceback(error)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        what = f"holds no function {name!r}" if function is None else f"has {name!r}, which is no function"
        raise RewardError(f"{setting}: {place} {what}; its functions are {', '.join(found) or 'none'}")
    batched = bool(getattr(function, "batched", False))

    def score(answers: Sequence[Answer]) -> list[float]:
        columns = [[answer.text for answer in answers], [dict(answer.prompt.row) for answer in answers]]
        arguments = [*columns, [answer.end for answer in answers]]
        try:
            values = function(*arguments) if batched else [function(*row) for row in zip(*arguments, strict=True)]
        except MemoryError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 (the user's code)
            where = ", ".join(answer.prompt.source for answer in answers[:3]) + (", …" if len(answers) > 3 else "")
            raise RewardError(f"{setting} raised on the answer to {where}:\n{_own_traceback(error)}") from None
        if not hasattr(values, "__len__") or len(values) != len(answers):
            raise RewardError(
                f"{setting} is batched and returned {values!r:.60} for {len(answers)} answers: "
                "return a list with a number for each"
            )
        return [_number(value, answer, setting) for value, answer in zip(values, answers, strict=True)]

    return Scorer(score, batched)


def _number(value: Any, answer: Answer, setting: str) -> float:
    try:
        number = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(
            f"{setting} returned {value!r:.60} ({type(value).__name__}) for the answer to {answer.prompt.source}: "
            "return a finite number"
        )
    return number


def _load(place: str) -> ModuleType:
    sys.dont_write_bytecode = True  # a run writes nowhere but into its directory
    if not place.endswith(".py"):
        sys.path.insert(0, os.getcwd())  # as `python -m` does
        return importlib.import_module(place)
    path = Path(place).expanduser().absolute()
    sys.path.insert(0, str(path.parent))  # as `python FILE` does, for the file's own imports
    # Its own name could be that of a library.
    spec = importlib.util.spec_from_file_location("reward_function", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _own_traceback(error: BaseException) -> str:
    """Format the traceback of `error` without the frames of this file and of the import system above the user's."""
    ours = (__file__, "<frozen importlib", str(Path(importlib.__file__).parent))
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(ours):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()
