"""megatron.bridge is imported without Transformer Engine; whoever uses what is missing is told so."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
from mbridge_model.patches.cpu import MissingTransformerEngineError, allow_missing_transformer_engine
from mbridge_model.patches.cpu import missing_transformer_engine as placeholder

from testing.gang import Gang, WorkerPool

if importlib.util.find_spec("transformer_engine") is not None:
    pytest.skip("Transformer Engine is installed here", allow_module_level=True)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose module `layers` needs Transformer Engine, and whose module `core` can do without."""
    path = tmp_path / "placeholder_case"
    path.mkdir()
    (path / "__init__.py").touch()
    (path / "core.py").write_text(
        "try:\n    import transformer_engine\n    FOUND = True\nexcept ModuleNotFoundError:\n    FOUND = False\n"
    )
    (path / "layers.py").write_text(
        "import transformer_engine.pytorch as te\n"
        "from transformer_engine.pytorch import TransformerLayer\n"
        "from transformer_engine.pytorch.ops import Linear as Operation\n"
        "import os.path\n"
        "from . import core\n"
        "class Layer(TransformerLayer):\n"
        "    def forward(self, x: te.ops.Sequential | None) -> 'tuple[te.ops.Sequential, int]': ...\n"
        "def import_later():\n"
        "    import transformer_engine\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(placeholder, "SERVED_MODULES", frozenset({"placeholder_case.layers"}))
    yield path
    placeholder.PLACEHOLDER.undo()
    for name in [name for name in sys.modules if name.startswith("placeholder_case")]:
        del sys.modules[name]


def test_only_the_body_of_a_served_module_sees_it(package: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match="transformer_engine"):
        importlib.import_module("placeholder_case.layers")
    allow_missing_transformer_engine()
    layers = importlib.import_module("placeholder_case.layers")
    assert not layers.core.FOUND  # imported by the body of `layers`, yet not shown the placeholder
    assert not any(name.startswith("transformer_engine") for name in sys.modules)
    with pytest.raises(ModuleNotFoundError, match="transformer_engine"):
        layers.import_later()
    assert layers.os.path.join("a", "b") == "a/b"


def test_every_use_says_what_is_missing(package: Path) -> None:
    allow_missing_transformer_engine()
    layers = importlib.import_module("placeholder_case.layers")
    assert not isinstance(3, layers.te.Linear)
    for use, name in {
        lambda: layers.te.Linear(2, 3): "transformer_engine.pytorch.Linear",
        lambda: layers.te.fp8_autocast(enabled=False): "transformer_engine.pytorch.fp8_autocast",
        lambda: layers.te.ops.Sequential(): "transformer_engine.pytorch.ops.Sequential",
        lambda: layers.Operation(): "transformer_engine.pytorch.ops.Linear",
        lambda: layers.te.Linear.something: "transformer_engine.pytorch.Linear.something",
        lambda: layers.Layer(4): "placeholder_case.layers.Layer",
    }.items():
        with pytest.raises(MissingTransformerEngineError, match=f"^{name} is used, .*pip install .*transformer_engine"):
            use()


def test_a_second_call_and_an_installed_library_change_nothing(package: Path) -> None:
    placeholder.PLACEHOLDER.undo()
    installed = package.parent / "transformer_engine"
    installed.mkdir()
    (installed / "__init__.py").touch()
    importlib.invalidate_caches()
    allow_missing_transformer_engine()
    assert not placeholder.PLACEHOLDER.is_applied
    (installed / "__init__.py").unlink()
    installed.rmdir()
    importlib.invalidate_caches()
    allow_missing_transformer_engine()
    allow_missing_transformer_engine()
    assert placeholder.PLACEHOLDER.is_applied


def import_megatron_bridge() -> tuple[bool, bool, str]:
    """Runs in a worker."""
    from mbridge_model.bridge.bridge import import_bridge

    import_bridge()
    core = importlib.import_module("megatron.core.extensions.transformer_engine")
    layers = importlib.import_module("megatron.bridge.peft.lora_layers")
    whole_layer = importlib.import_module("megatron.bridge.models.gpt_full_te_layer_autocast_spec")
    try:
        whole_layer.AutocastTransformerLayer(1, 2, 3)
    except MissingTransformerEngineError as error:
        return core.HAVE_TE, "transformer_engine" in sys.modules, f"{layers.te.__name__}: {error}"
    raise AssertionError("a layer of Transformer Engine was made without it")


def test_megatron_bridge(worker_pool: WorkerPool) -> None:
    ((core_has_it, is_imported, error),) = Gang(1, worker_pool).run(import_megatron_bridge, timeout=300)
    assert not core_has_it
    assert not is_imported
    assert "transformer_engine is not installed" in error
