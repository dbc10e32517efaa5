"""What a rank needs besides weights to resume exactly: its random number generators and the state of its loop."""

import random
import sys
from typing import Any

from mbridge_ckpt.errors import CheckpointError, CorruptCheckpointError

RANK_STATE_VERSION = 1


def capture_random_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's legacy global, torch's CPU and this process's current CUDA generator.

    Generators a program makes itself (numpy.random.Generator, torch.Generator, Megatron's tensor-parallel tracker)
    are the program's to store.
    """
    import torch

    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "torch": torch.get_rng_state(),
    }
    if "numpy" in sys.modules:
        kind, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state(legacy=True)
        keys = torch.tensor(keys.tolist(), dtype=torch.int64)
        state["numpy"] = {"kind": kind, "keys": keys, "position": position, "has_gauss": has_gauss, "cached": cached}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore the generators to a state of `capture_random_state`; those that it does not hold are left alone.

    Raises CheckpointError when a state was captured from other versions of the generators.
    """
    import torch

    try:
        python = state["python"]
        random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
        torch.set_rng_state(state["torch"])
        if "numpy" in state:
            import numpy

            saved = state["numpy"]
            keys = numpy.array(saved["keys"].tolist(), dtype=numpy.uint32)
            legacy = (saved["kind"], keys, saved["position"], saved["has_gauss"], saved["cached"])
            numpy.random.set_state(legacy)
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"random state does not fit this Python, NumPy or torch ({error}); resume with the versions in the manifest"
        ) from None


def unwrap_rank_state(value: Any, rank: int, where: object) -> dict[str, Any]:
    """Return the state inside; raises CorruptCheckpointError, or CheckpointError for a later version."""
    match value:
        case {"version": int(version), **_others} if version > RANK_STATE_VERSION:
            raise CheckpointError(f"{where}: rank state of version {version}; install a later mbridge-ckpt")
        case {"version": 1, "rank": int(stored), "state": dict(state)} if stored == rank:
            return state
    raise CorruptCheckpointError(f"{where}: not the state of rank {rank}")
