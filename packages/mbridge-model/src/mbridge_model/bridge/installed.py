"""Is megatron-bridge installed? Asked before anything heavy is imported, by whoever is about to need it.

It cannot be a dependency of the package: its own requirements (training services, CUDA-only packages, another
megatron-core) would come along, and pip knows no way to leave them out. What the used part of it imports is a
dependency.
"""

import importlib.metadata
import importlib.util
import sys

from mbridge_model.errors import ModelError

MODULE = "megatron.bridge"
VERSION = "0.6.2"
INSTALL_LINE = f"pip install --no-deps megatron-bridge=={VERSION}"


def missing_bridge() -> tuple[str, str] | None:
    """Look for megatron-bridge without importing anything of Megatron, in milliseconds.

    `mbridge-config check` finds this function by the entry point group `mbridge.environment`.

    Returns:
        What is wrong with the installation, and the line that mends it; None if nothing is.
    """
    fix = f"run: {INSTALL_LINE} (with uv: uv {INSTALL_LINE})"
    if not _is_importable():
        return "megatron-bridge is not installed", fix
    try:
        installed = importlib.metadata.version("megatron-bridge")
    except importlib.metadata.PackageNotFoundError:  # from a source tree on the path
        return None
    if installed != VERSION:
        return f"megatron-bridge {installed} is installed, and mbridge-model needs {VERSION}", fix
    return None


def _is_importable() -> bool:
    """Like `importlib.util.find_spec(MODULE)`, which would import the parent package."""
    if MODULE in sys.modules:
        return sys.modules[MODULE] is not None
    parent = importlib.util.find_spec("megatron")
    locations = None if parent is None else parent.submodule_search_locations
    return locations is not None and any(finder.find_spec(MODULE, locations) for finder in sys.meta_path)


def require_bridge() -> None:
    """Raise `ModelError` with both unless megatron-bridge is installed."""
    if (found := missing_bridge()) is not None:
        raise ModelError("; ".join(found))
