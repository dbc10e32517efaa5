"""What a patch is, and how a table of them is checked and applied: all of it, or nothing and an error.

Megatron-Core names the device as a constant inside its functions (`torch.zeros(1, device="cuda")`,
`param.type() == "torch.cuda.FloatTensor"`). Four ways to change that were weighed:

- A `TorchFunctionMode` that maps "cuda" to "cpu" slows every torch call, holds for one thread, is suspended inside
  its own handlers, and cannot see a comparison with a type name. `torch.set_default_device` does not touch an explicit
  `device=`.
- A stand-in for the name `torch` in Megatron's modules catches calls that nobody meant to change, silently, and not
  the type names.
- A copy of each function with the constant changed drifts from upstream, silently.
- Rewriting the constant in the function's code keeps upstream's logic, costs nothing when it runs, holds for every
  module that already imported the function (the function object stays the same), and can be checked: where the
  constant is gone, upstream has changed, and that is an error.

So the last is used. Whole functions are replaced or wrapped only where no constant decides.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import CodeType, FunctionType
from typing import Any

from mbridge_model.errors import ModelError


class PatchError(ModelError):
    """A name or constant that must be changed to run without a GPU is not in the installed version."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Patch:
    """One change to a function or class that is not ours. Exactly one kind of change is given.

    Attributes:
        target: "module:qualified.name".
        reason: why Megatron-Core cannot run on a CPU without the change.
        replacement: what the name shall refer to.
        wrapper: called with the original, returns what the name shall refer to.
        constants: constants in the function's code, and what they shall become.
        names: names that the function's code looks up, and what they shall become.
    """

    target: str
    reason: str
    replacement: Any = None
    wrapper: Callable[[Any], Any] | None = None
    constants: Mapping[Any, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = [self.replacement is not None, self.wrapper is not None, bool(self.constants or self.names)]
        if sum(kinds) != 1:
            raise ValueError(f"{self.target}: give one of replacement, wrapper, or constants and names")


def apply_patches(patches: tuple[Patch, ...]) -> None:
    """Apply a table of patches. All are checked first: either every one is applied or none.

    Raises:
        PatchError: naming each target, constant or name that is gone, and the installed versions.
    """
    changes: list[Callable[[], None]] = []
    problems: list[str] = []
    for patch in patches:
        try:
            changes.append(_prepare(patch))
        except LookupError as error:
            problems.append(f"{patch.target}: {error.args[0]} (needed because {patch.reason})")
    if problems:
        raise PatchError(
            f"cannot run without a GPU on torch {_version('torch')} and megatron-core {_version('megatron-core')}: "
            f"{'; '.join(problems)}. Install the megatron-core release that this version of mbridge-model asks for"
        )
    for change in changes:
        change()


def _prepare(patch: Patch) -> Callable[[], None]:
    """Find the target and return the function that makes the change."""
    owner, name = _resolve(patch.target)
    current = getattr(owner, name)
    if patch.replacement is not None:
        return lambda: setattr(owner, name, patch.replacement)
    if patch.wrapper is not None:
        wrapped = patch.wrapper(current)
        return lambda: setattr(owner, name, wrapped)
    function = inspect.unwrap(getattr(current, "__func__", current))  # of a class method, of a decorated function
    if not isinstance(function, FunctionType):
        raise LookupError(f"is a {type(function).__name__}, not a Python function")
    code = rewrite_code(function.__code__, patch.constants, patch.names)
    return lambda: setattr(function, "__code__", code)


def _resolve(target: str) -> tuple[Any, str]:
    """The object that holds the target, and the target's name in it."""
    module_name, _, qualified_name = target.partition(":")
    try:
        owner: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise LookupError(f"there is no module {error.name}") from error
    *path, name = qualified_name.split(".")
    for part in [*path, name]:
        if not hasattr(owner, part):
            raise LookupError(f"there is no {part!r} in {getattr(owner, '__name__', owner)}")
        if part is not name:
            owner = getattr(owner, part)
    return owner, name


def rewrite_code(code: CodeType, constants: Mapping[Any, Any], names: Mapping[str, str]) -> CodeType:
    """A copy of `code`, functions nested in it included, with constants and looked-up names exchanged.

    Raises:
        LookupError: a constant or name is not in the code.
    """
    missing: set[object] = {*constants, *names}
    rewritten = _rewrite(code, constants, names, missing)
    if missing:
        raise LookupError(f"its code no longer has {', '.join(sorted(map(repr, missing)))}")
    return rewritten


def _rewrite(code: CodeType, constants: Mapping[Any, Any], names: Mapping[str, str], missing: set[object]) -> CodeType:
    def exchange(constant: object) -> object:
        if isinstance(constant, CodeType):
            return _rewrite(constant, constants, names, missing)
        if isinstance(constant, tuple):  # `x in ["a", "b"]` keeps its list as a tuple
            return tuple(exchange(item) for item in constant)
        for old, new in constants.items():
            if type(old) is type(constant) and old == constant:  # 1 == True, but they are two constants
                missing.discard(old)
                return new
        return constant

    missing.difference_update(names.keys() & set(code.co_names))
    return code.replace(
        co_consts=tuple(exchange(constant) for constant in code.co_consts),
        co_names=tuple(names.get(name, name) for name in code.co_names),
    )


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "(not installed)"
