"""Patches of libraries: each with its reason, checked before any is applied, and undone together.

Megatron-Core names the device as a constant inside its functions (`torch.zeros(1, device="cuda")`,
`param.type() == "torch.cuda.FloatTensor"`). A patch rewrites such a constant in the function's code. That keeps
upstream's logic, costs nothing when it runs, holds for every module that has already imported the function, and is
checked: where the constant is gone, upstream has changed, and that is an error.

The alternatives are worse. A `TorchFunctionMode` slows down every torch call, holds for one thread, and cannot see a
comparison with a type name. A stand-in for the name `torch` in Megatron's modules also catches calls that nobody meant
to change. A changed copy of each function drifts from upstream, silently. So whole functions are replaced or wrapped
only where no constant decides.
"""

import importlib
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from types import CodeType, FunctionType
from typing import Any, NamedTuple, Self

from torch.utils._config_module import ConfigModule

from mbridge_model.errors import ModelError

_ABSENT: Any = object()
_lock = threading.RLock()


class PatchError(ModelError):
    """A name or constant that must be changed is not in the installed version, or somebody else has changed it."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Patch:
    """One change to a function, class or module that is not ours. Exactly one kind of change is given.

    Attributes:
        target: "module:qualified.name", or "qualified.name" within the object that the table is applied to.
        reason: why the library does not do without the change.
        replacement: what the name refers to while the patch is applied.
        wrapper: called with the original, returns what the name refers to.
        constants: constants in the function's code, and what they become.
        names: names that the function's code looks up, and what they become.
        adds: whether the library may lack the name, which the patch then adds.
    """

    target: str
    reason: str
    replacement: Any = _ABSENT
    wrapper: Callable[[Any], Any] | None = None
    constants: Mapping[Any, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    adds: bool = False

    def __post_init__(self) -> None:
        kinds = [self.replacement is not _ABSENT, self.wrapper is not None, bool(self.constants or self.names)]
        if sum(kinds) != 1:
            raise ValueError(f"{self.target}: give one of replacement, wrapper, or constants and names")


class PatchTable:
    """Patches that are applied together or not at all, and undone together. As a context manager: for the block.

    A module that copied a name by `from ... import ...` keeps the replacement, which so works without its table, too.

    Args:
        purpose: what is impossible without the patches, to complete "cannot ..." in an error.
        patches: in the order in which they are applied.
        owner: the object in which targets without a module are looked up.
    """

    def __init__(self, purpose: str, *patches: Patch, owner: Any = None) -> None:
        self.purpose = purpose
        self.patches = patches
        self._owner = owner
        self._changes: list[_Change] = []
        self._entered: list[bool] = []

    def on(self, owner: Any) -> Self:
        """Return the table for one object, with a state of its own."""
        return type(self)(self.purpose, *self.patches, owner=owner)

    @property
    def is_applied(self) -> bool:
        """Whether the patches are in place."""
        return bool(self._changes)

    def apply(self) -> bool:
        """Apply the patches; a no-op while they are applied.

        Returns:
            Whether they were applied now.

        Raises:
            PatchError: naming what is gone, and the installed versions. Nothing has been changed then.
        """
        with _lock:
            if self._changes:
                return False
            changes, problems = [], []
            for patch in self.patches:
                try:
                    changes.append(_prepare(patch, self._owner))
                except LookupError as error:
                    problems.append(f"{patch.target}: {error.args[0]} (needed because {patch.reason})")
            if problems:
                raise PatchError(
                    f"cannot {self.purpose} on torch {version('torch')} and megatron-core "
                    f"{version('megatron-core')}: {'; '.join(problems)}. "
                    "Install the versions that mbridge-model asks for"
                )
            for change in changes:
                setattr(change.owner, change.name, change.new)
            self._changes = changes
            return True

    def undo(self) -> None:
        """Put back what was there; a no-op unless the patches are applied.

        Raises:
            PatchError: something else has changed a target since, and would be lost. Nothing has been put back then.
        """
        with _lock:
            taken = [change.target for change in self._changes if _current(change.owner, change.name) is not change.new]
            if taken:
                raise PatchError(
                    f"cannot put back {', '.join(taken)}: something else has replaced it since; undo that first"
                )
            for change in reversed(self._changes):
                if change.old is _ABSENT:
                    delattr(change.owner, change.name)
                else:
                    setattr(change.owner, change.name, change.old)
            self._changes = []

    def __enter__(self) -> Self:
        self._entered.append(self.apply())
        return self

    def __exit__(self, *exception: object) -> None:
        if self._entered.pop():
            self.undo()


class _Change(NamedTuple):
    """An attribute to set. `old` is what `owner` itself has under the name, `_ABSENT` if it inherits or lacks it."""

    target: str
    owner: Any
    name: str
    old: Any
    new: Any


def _current(owner: Any, name: str) -> Any:
    """What `owner` itself has under `name`, unbound.

    The code of a function and the values of torch's configuration modules are no entries of a dictionary.
    """
    if name == "__code__" or isinstance(owner, ConfigModule):
        return getattr(owner, name)
    return vars(owner).get(name, _ABSENT)


def _prepare(patch: Patch, owner: Any) -> _Change:
    """Find the target and what it becomes."""
    module_name, _, qualified_name = patch.target.rpartition(":")
    if module_name:
        try:
            owner = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise LookupError(f"there is no module {error.name}") from error
    *path, name = qualified_name.split(".")
    for part in path:
        owner = _attribute(owner, part)
    original = getattr(owner, name, _ABSENT) if patch.adds else _attribute(owner, name)
    if patch.replacement is not _ABSENT:
        new = patch.replacement
    elif patch.wrapper is not None:
        new = patch.wrapper(original)
    else:
        function = inspect.unwrap(getattr(original, "__func__", original))  # of a class method, of a decorated function
        if not isinstance(function, FunctionType):
            raise LookupError(f"is a {type(function).__name__}, not a Python function")
        owner, name = function, "__code__"
        new = rewrite_code(function.__code__, patch.constants, patch.names)
    return _Change(patch.target, owner, name, _current(owner, name), new)


def _attribute(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        raise LookupError(f"there is no {name!r} in {getattr(owner, '__name__', type(owner).__name__)}")
    return getattr(owner, name)


def rewrite_code(code: CodeType, constants: Mapping[Any, Any], names: Mapping[str, str]) -> CodeType:
    """Return a copy of `code`, functions nested in it included, with constants and looked-up names exchanged.

    Raises:
        LookupError: a constant or name is not in the code.
    """
    missing: set[object] = {*constants, *names}

    def exchange(constant: object) -> object:
        if isinstance(constant, CodeType):
            return rewrite(constant)
        if isinstance(constant, tuple):  # `x in ["a", "b"]` keeps its list as a tuple
            return tuple(map(exchange, constant))
        for old, new in constants.items():
            if type(old) is type(constant) and old == constant:  # 1 == True, but they are two constants
                missing.discard(old)
                return new
        return constant

    def rewrite(code: CodeType) -> CodeType:
        missing.difference_update(names.keys() & set(code.co_names))
        return code.replace(
            co_consts=tuple(map(exchange, code.co_consts)),
            co_names=tuple(names.get(name, name) for name in code.co_names),
        )

    rewritten = rewrite(code)
    if missing:
        raise LookupError(f"its code no longer has {', '.join(sorted(map(repr, missing)))}")
    return rewritten
