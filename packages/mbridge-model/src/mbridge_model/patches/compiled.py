"""Elementwise functions as single GPU kernels.

On a GPU torch.compile fuses a rotation or a softmax into one kernel; on a CPU that would need a C++ compiler and
minutes. `TORCHDYNAMO_DISABLE=1`, torch's own switch, makes the functions run uncompiled on a GPU, too.
"""

import logging
import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path

import torch
import torch._dynamo.config
from torch import Tensor

logger = logging.getLogger("mbridge_model")

VARIANTS = 64
"""Limit on the compiled variants of one function: a variant per dtype, memory layout, gradient mode and number of
sequences. Beyond torch's default limit of eight the function would run uncompiled."""


def compiled_on_gpu[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` at its first call whose first argument is a CUDA tensor."""

    @cache
    def kernel() -> Callable[P, R]:
        torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
        return torch.compile(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        return kernel()(*args, **kwargs) if isinstance(first, Tensor) and first.is_cuda else function(*args, **kwargs)

    return call


def runs_kernels(tensor: Tensor) -> bool:
    """Return whether Triton's kernels can run on the tensor: on a GPU, unless compiling is disabled."""
    return tensor.is_cuda and not torch._dynamo.config.disable


def run_uncompiled_without_compiler() -> None:
    """Disable compiling, Megatron-Core's functions included, and log it, where Triton cannot build its launchers.

    That needs a C compiler and Python's header files, which slim images lack; torch would fail in the first step.
    """
    if torch._dynamo.config.disable:
        return
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        missing = "a C compiler (gcc or clang, or CC in the environment)"
    elif not headers.is_file():
        missing = str(headers)
    else:
        return
    torch._dynamo.config.disable = True
    logger.warning("kernels are not fused, which is slower and takes more memory: torch.compile needs %s", missing)
