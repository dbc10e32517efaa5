"""Rotary positions in one kernel, for packed sequences too.

Where Transformer Engine's kernel does not apply, Megatron-Core's functions launch ten kernels per layer, and for packed
sequences run a loop that waits for the GPU. These two replace them, with the same formula and arguments.
"""

from typing import Any

from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor

from mbridge_model.kernels.self_attention import gathered_angles
from mbridge_model.patches.compiled import compiled_on_gpu
from mbridge_model.patches.patch import Patch, PatchTable

_rotate = compiled_on_gpu(rope_utils._apply_rotary_pos_emb_bshd)
_rotate_packed_with_context_parallelism = rope_utils._apply_rotary_pos_emb_thd


def rotate_packed(t: Tensor, cu_seqlens: Tensor, freqs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """[tokens, heads, channels] in and out; `freqs` [positions, 1, 1, channels], of each token or of each position.

    The arguments are those of Megatron-Core's function, which still runs under context parallelism.
    """
    if kwargs.get("cp_group") is None or kwargs["cp_group"].size() > 1:
        return _rotate_packed_with_context_parallelism(t, cu_seqlens, freqs, *args, **kwargs)
    del kwargs["cp_group"]
    if len(freqs) != len(t):  # Megatron-Core's rule, without asking the GPU for the last of `cu_seqlens`
        freqs = gathered_angles(cu_seqlens, freqs, len(t))
    return _rotate(t.unsqueeze(1), freqs, *args, **kwargs).squeeze(1)


_ROPE_UTILS = "megatron.core.models.common.embeddings.rope_utils"
ROTARY = PatchTable(
    "rotate queries and keys in one kernel",
    Patch(
        target=f"{_ROPE_UTILS}:_apply_rotary_pos_emb_bshd",
        reason="it launches ten kernels a layer",
        replacement=_rotate,
    ),
    Patch(
        target=f"{_ROPE_UTILS}:_apply_rotary_pos_emb_thd",
        reason="it loops over the packed sequences and waits for the GPU",
        replacement=rotate_packed,
    ),
)
"""Apply it before a module imports the functions by name."""
