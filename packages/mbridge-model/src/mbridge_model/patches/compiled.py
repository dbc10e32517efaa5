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

from mbridge_model.patches.patch import Patch, PatchTable

logger = logging.getLogger("mbridge_model")

MANY_VARIANTS = PatchTable(
    "compile a function for many shapes",
    Patch(
        target="torch._dynamo.config:recompile_limit",
        reason="a function has a variant per dtype, memory layout, gradient mode and number of sequences; beyond "
        "torch's limit of eight it would run uncompiled",
        wrapper=lambda limit: max(64, limit),
    ),
)
UNCOMPILED = PatchTable(
    "run without a C compiler",
    Patch(
        target="torch._dynamo.config:disable",
        reason="Triton builds its launchers with a C compiler, and torch would fail in the first step",
        replacement=True,
    ),
)


def compiled_on_gpu[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` at its first call whose first argument is a CUDA tensor."""

    @cache
    def kernel() -> Callable[P, R]:
        MANY_VARIANTS.apply()
        return torch.compile(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        return kernel()(*args, **kwargs) if isinstance(first, Tensor) and first.is_cuda else function(*args, **kwargs)

    return call


def run_uncompiled_without_compiler() -> None:
    """Disable compiling, Megatron-Core's functions included, and log it, where Triton cannot build its launchers.

    That needs a C compiler and Python's header files, which slim images lack.
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
    UNCOMPILED.apply()
    logger.warning("kernels are not fused, which is slower and takes more memory: torch.compile needs %s", missing)
