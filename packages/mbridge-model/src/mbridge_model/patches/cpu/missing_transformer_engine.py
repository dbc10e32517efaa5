"""Import megatron.bridge where Transformer Engine is not installed.

Two modules of megatron.bridge import `transformer_engine` without asking whether it is there: the LoRA layers, which
every import of megatron.bridge reaches, and a layer made of Transformer Engine alone. Only they are shown a
placeholder, through an `__import__` of their own while their body runs. `sys.modules` never holds it, so each
`try: import transformer_engine` elsewhere, in what those modules import too, still finds that there is none.
"""

import builtins
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping, MutableSequence, Sequence
from types import ModuleType
from typing import Any

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


class _PlaceholderType(type):
    """Type of the classes of the placeholder. `isinstance(x, te.Linear)` is False, as it is without the library."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise MissingTransformerEngineError(f"{cls.__module__}.{cls.__qualname__}.{name}")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise MissingTransformerEngineError(f"{cls.__module__}.{cls.__qualname__}")


class _PlaceholderModule(ModuleType):
    """A module of which every attribute is a placeholder: a class where the name is a class's, else a module."""

    __path__: MutableSequence[str] = []  # noqa: RUF012 - a package, and nothing is found in it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any
        if name[0].isupper():
            value = _PlaceholderType(name, (), {"__module__": self.__name__})
        else:
            value = _PlaceholderModule(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise MissingTransformerEngineError(self.__name__)


def allow_missing_transformer_engine() -> None:
    """Let megatron.bridge be imported without Transformer Engine; do nothing where that is installed.

    Call it before megatron.bridge is imported. A second call does nothing. Each use of what is missing (calling a
    function, making an object of a class or of a subclass) raises `MissingTransformerEngineError`.
    """
    if importlib.util.find_spec(PACKAGE) is not None:
        return
    if not any(isinstance(finder, _ServingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ServingFinder())


class _ServingFinder(importlib.abc.MetaPathFinder):
    """Finds the served modules where they lie, and loads them with the placeholder in sight."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in SERVED_MODULES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ServingLoader(spec.loader)
        return spec


class _ServingLoader(importlib.abc.Loader):
    """Runs a module's body with an `__import__` that serves the placeholder, and ends that with the body."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        placeholder = _PlaceholderModule(PACKAGE)
        body_runs = True

        def import_or_placeholder(
            name: str,
            globals: Mapping[str, object] | None = None,
            locals: Mapping[str, object] | None = None,
            fromlist: Sequence[str] | None = (),
            level: int = 0,
        ) -> ModuleType:
            package, _, rest = name.partition(".")
            if not body_runs or level != 0 or package != PACKAGE:
                return builtins.__import__(name, globals, locals, fromlist or (), level)
            if not fromlist:  # `import a.b as c` asks for a, and takes b of it
                return placeholder
            found: ModuleType = placeholder
            for part in filter(None, rest.split(".")):
                found = getattr(found, part)
            return found

        # Python looks `__import__` up in the builtins of the importing module: no other module sees this one.
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": import_or_placeholder}
        try:
            self._loader.exec_module(module)
        finally:
            body_runs = False  # functions of the module keep these builtins
            module.__dict__["__builtins__"] = builtins
