"""Run-time changes to libraries: tables of patches, each with its reason.

In: an installed torch, Megatron-Core and Megatron-Bridge. Out: the same libraries, which then run on a CPU,
use faster kernels, and send log records below ERROR to our logger. `python -m mbridge_model.patches` lists every patch.

Uses: `errors`, `kernels`.
"""

from mbridge_model.patches.patch import Patch, PatchError, PatchTable

__all__ = ["Patch", "PatchError", "PatchTable"]
