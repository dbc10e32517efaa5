"""Elementwise functions as single GPU kernels.

A rotation or a softmax written in plain torch reads and writes its tensors once an operation. On a GPU torch.compile
makes one kernel of it; on a CPU it would need a C++ compiler and minutes, so there the function runs as it is written.
`TORCHDYNAMO_DISABLE=1`, torch's own switch, leaves it so on a GPU, too.
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
"""Kernels of one function: for each number format, layout in memory, with and without gradients, for one sequence and
for several. Behind torch's own limit of eight a function runs as it is written."""


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
    """Whether Triton's kernels can take the tensor: on a GPU, unless compiling is switched off."""
    return tensor.is_cuda and not torch._dynamo.config.disable


def run_uncompiled_without_compiler() -> None:
    """Where Triton cannot build its launchers, switch compiling off, Megatron-Core's functions included, and say so.

    It takes a C compiler and Python's header files, which slim images lack; torch would fail in the first step.
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
