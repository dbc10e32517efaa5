"""SwiGLU as one kernel each way, in the place of Megatron-Core's compiled function."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from mbridge_model.patches.patch import Patch, PatchTable


def with_kernel(original: Any) -> SimpleNamespace:
    """Wrap `SwiGLUFunction`, which still serves activations that are stored in fp8 or on the host."""

    def apply(inputs: Tensor, fp8_input_store: bool, cpu_offload_input: bool) -> Tensor:
        from mbridge_model.kernels.swiglu import SwiGLU

        if fp8_input_store or cpu_offload_input:
            output: Tensor = original.apply(inputs, fp8_input_store, cpu_offload_input)
            return output
        return SwiGLU.apply(inputs)

    return SimpleNamespace(apply=apply)


SWIGLU = PatchTable(
    "compute SwiGLU in one kernel",
    Patch(
        target="megatron.core.fusions.fused_bias_swiglu:SwiGLUFunction",
        reason="its compiled kernels reach a third of the memory's bandwidth where lengths change",
        wrapper=with_kernel,
    ),
)
