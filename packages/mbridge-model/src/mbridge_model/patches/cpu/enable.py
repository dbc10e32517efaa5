"""`enable_cpu`: the switch that applies the table of patches, once, where no GPU exists."""

import threading

import torch

from mbridge_model.patches.cpu.patch import apply_patches
from mbridge_model.patches.quiet import quiet

_lock = threading.Lock()
_enabled = False


def enable_cpu() -> None:
    """Make Megatron-Core run on the CPU of this process; do nothing where `torch.cuda.is_available()`.

    Call it before or after megatron is imported, but before a model or an optimizer is built. It imports
    megatron.core, since what it changes lies there. A second call does nothing. Process groups must be gloo's.

    Functions that Megatron-Core hands to `torch.compile` run eagerly, in this process all others too: compiling them
    on a CPU needs a C++ compiler and takes longer than the small models that one trains there.

    Raises:
        PatchError: something that must be changed is no longer there, so this version of torch or megatron-core is
            not supported; nothing has been changed then. The message names every such target and the versions.
    """
    global _enabled
    with _lock:
        if _enabled or torch.cuda.is_available():
            return
        with quiet():
            import megatron.core  # noqa: F401
        from mbridge_model.patches.cpu.table import PATCHES

        apply_patches(PATCHES)
        torch.compiler.set_stance("force_eager")
        _enabled = True
