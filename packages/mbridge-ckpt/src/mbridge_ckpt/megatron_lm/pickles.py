"""The classes of Megatron and NumPy that the pickles in a Megatron-LM checkpoint name, and what stands in for them.

Besides tensors and plain containers, these torch.save files hold the run's arguments (an argparse.Namespace with
enumerations), NumPy's random state, Transformer Engine's byte streams, and tensors with attributes. Each stand-in is
inert, and any other name is refused. Nothing named in a file is imported or called.
"""

from typing import Any

from mbridge_ckpt.errors import UnsafeCheckpointError
from mbridge_ckpt.formats.torch_pickle import Call, StandIns, StoredTensor


class RunArguments:
    """Stand-in for an argparse.Namespace, with the arguments of the run as attributes."""


class _Opaque:
    """Stand-in for an object that is not needed: accepts any arguments and state, and drops them."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _rebuild_typed(function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    """Rebuild a tensor that has Python attributes without them."""
    return function(*arguments)


def _rebuild_parameter(tensor: Any, *_: Any) -> StoredTensor:
    if not isinstance(tensor, StoredTensor):
        raise UnsafeCheckpointError("its pickle makes a parameter of something that is not a tensor")
    return tensor


def _fresh(kind: type) -> Any:
    """Return a maker of new subclasses, since a pickle may set attributes of the class that it is given."""
    return lambda: type(kind.__name__, (kind,), {})


_OPAQUE = (
    "_codecs.encode", "_io.BytesIO", "io.BytesIO", "numpy.ndarray", "numpy.dtype", "numpy.dtypes.UInt32DType",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar", "pathlib.PosixPath", "pathlib._local.PosixPath", "signal.Signals", "torch.device",
    "torch.Tensor", "torch.nn.parameter.Parameter", "torch._C.Generator", "types.SimpleNamespace",
    "megatron.core.enums.ModelType", "megatron.model.enums.ModelType", "megatron.legacy.model.enums.ModelType",
    "megatron.core.optimizer.OptimizerConfig", "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.rerun_state_machine.RerunDiagnostic", "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState", "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.AttnMaskType", "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.CudaGraphScope", "megatron.core.transformer.enums.InferenceCudaGraphScope",
)  # fmt: skip

STAND_INS: StandIns = {
    ("argparse", "Namespace"): _fresh(RunArguments),
    ("torch._tensor", "_rebuild_from_type_v2"): lambda: Call(_rebuild_typed),
    ("torch._utils", "_rebuild_parameter"): lambda: Call(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): lambda: Call(_rebuild_parameter),
    **{(name.rpartition(".")[0], name.rpartition(".")[2]): _fresh(_Opaque) for name in _OPAQUE},
}


def argument(arguments: Any, name: str, kind: type) -> Any:
    """Return an argument of the run if it is present and of this type, else None."""
    value = getattr(arguments, "__dict__", {}).get(name) if isinstance(arguments, RunArguments) else None
    return value if type(value) is kind else None
