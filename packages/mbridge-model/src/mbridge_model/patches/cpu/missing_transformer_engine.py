"""Import megatron.bridge where Transformer Engine is not installed.

Two modules of megatron.bridge import `transformer_engine` unconditionally, and every import of megatron.bridge reaches
one of them. Only they are shown a placeholder, through an `__import__` of their own while their body runs. It is never
in `sys.modules`, so each `try: import transformer_engine` elsewhere still finds that there is none.
"""

import builtins
import functools
import importlib.util
from collections.abc import Callable
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType
from typing import Any

from mbridge_model.patches.patch import Patch, PatchTable

PACKAGE = "transformer_engine"
SERVED_MODULES = frozenset(
    {"megatron.bridge.peft.lora_layers", "megatron.bridge.models.gpt_full_te_layer_autocast_spec"}
)


class MissingTransformerEngineError(ImportError):
    """Something of Transformer Engine is used, and it is not installed."""

    def __init__(self, used: str) -> None:
        super().__init__(
            f"{used} is used, but transformer_engine is not installed. It needs an NVIDIA GPU; install it with: "
            'pip install --no-build-isolation "transformer_engine[pytorch]"',
            name=PACKAGE,
        )


class _Placeholder(type):
    """Stands for a class, function or module. `isinstance(x, te.Linear)` is False, as it is without the library."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if cls.__name__[0].isupper():  # a class, of which nothing is known
            raise MissingTransformerEngineError(f"{_full_name(cls)}.{name}")
        value = _Placeholder(name, (), {"__module__": _full_name(cls)})
        setattr(cls, name, value)
        return value

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise MissingTransformerEngineError(_full_name(cls))


def _full_name(placeholder: type) -> str:
    return f"{placeholder.__module__}.{placeholder.__qualname__}".removeprefix(".")


def _serving(find_spec: Callable[..., ModuleSpec | None]) -> Any:
    """Find the served modules where they lie, and load them with the placeholder in sight."""

    def find(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = find_spec(name, path, target)
        if name in SERVED_MODULES and spec is not None and spec.origin is not None:
            spec.loader = _ServingLoader(name, spec.origin)
        return spec

    return staticmethod(find)


PLACEHOLDER = PatchTable(
    "import megatron.bridge without Transformer Engine",
    Patch(
        target="importlib.machinery:PathFinder.find_spec",
        reason="two modules of megatron.bridge import transformer_engine unconditionally",
        wrapper=_serving,
    ),
)


def allow_missing_transformer_engine() -> None:
    """Let megatron.bridge be imported without Transformer Engine; do nothing where that is installed.

    Call it before megatron.bridge is imported. A second call does nothing. Each use of what is missing (calling a
    function, making an object of a class or of a subclass) raises `MissingTransformerEngineError`.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        PLACEHOLDER.apply()


class _ServingLoader(SourceFileLoader):
    """Runs a module's body with an `__import__` that serves the placeholder, and ends that with the body."""

    def exec_module(self, module: ModuleType) -> None:
        placeholder = _Placeholder(PACKAGE, (), {"__module__": ""})
        body_runs = True

        def import_or_placeholder(
            name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
        ) -> Any:
            package, _, rest = name.partition(".")
            if not body_runs or level != 0 or package != PACKAGE:
                return builtins.__import__(name, globals, locals, fromlist, level)
            if not fromlist:  # `import a.b as c` asks for a, and takes b of it
                return placeholder
            return functools.reduce(getattr, filter(None, rest.split(".")), placeholder)

        # Python looks `__import__` up in the builtins of the importing module: no other module sees this one.
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": import_or_placeholder}
        try:
            super().exec_module(module)
        finally:
            body_runs = False  # functions of the module keep these builtins
            module.__dict__["__builtins__"] = builtins
