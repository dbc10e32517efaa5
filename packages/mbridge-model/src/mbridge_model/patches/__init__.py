"""Changes to libraries while they run: tables of patches, each with its reason.

In: an installed torch, Megatron-Core and Megatron-Bridge. Out: the same libraries on a CPU, with faster kernels, and
silent. `python -m mbridge_model.patches` lists every patch.

Uses: `errors`, `kernels`.
"""

from mbridge_model.patches.patch import Patch, PatchError, PatchTable

__all__ = ["Patch", "PatchError", "PatchTable"]
