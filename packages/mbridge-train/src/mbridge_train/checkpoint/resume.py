"""Resume an earlier run: find its checkpoint and load the state into an engine."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mbridge_ckpt import Checkpoint, find_resume, open_checkpoint
from mbridge_config import RunLength

from mbridge_train.checkpoint.load import load_checkpoint
from mbridge_train.engine.engine import Engine
from mbridge_train.errors import TrainError


def find_checkpoint(wanted: str | None, directory: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Find the checkpoint that `runner.resume_dir` names; None starts at step 0.

    Args:
        wanted: a `global_step_<n>` directory; "auto": the newest complete one in `directory`; None: none.
        directory: the run's checkpoints.
        say: prints a line: the checkpoints that "auto" passed over, and why.

    Raises:
        mbridge_ckpt.CheckpointError: `wanted` is not a complete checkpoint.
    """
    if wanted is None:
        return None
    if wanted != "auto":
        return open_checkpoint(Path(wanted).expanduser())
    found = find_resume(directory)
    for item in found.passed_over:
        say(f"not resuming from {item.path}: {item.reason}")
    if found.checkpoint is None:
        say(f"no checkpoint to resume from in {directory}; starting at step 0")
    return found.checkpoint


def restore(engine: Engine, checkpoint: Checkpoint, keys: Iterable[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Load `checkpoint` into `engine` and return the loop's state. Collective over all ranks.

    Prints a line if the checkpoint was written under another layout.

    Args:
        keys: of the loop's state that the run needs.

    Raises:
        TrainError: it lacks such a key: it is of another kind of run, or imported. Also as `load_checkpoint` raises.
    """
    if checkpoint.layout != engine.layout.checkpoint:
        say(f"{checkpoint.path} was written with {checkpoint.layout}; this run has {engine.layout.checkpoint}")
    state = load_checkpoint(engine, checkpoint)
    if missing := [key for key in keys if key not in state]:
        raise TrainError(
            f"{checkpoint.path} cannot be resumed: its loop state lacks {', '.join(missing)}, since it is of "
            "another kind of run or imported; begin a new run with its weights: runner.resume_dir=null "
            f"actor.megatron.use_hf_ckpt=false actor.model.megatron_checkpoint={checkpoint.path}"
        )
    return state


def say_if_finished(length: RunLength, *, step: int, say: Callable[[str], None]) -> None:
    """Print a line if a checkpoint of `step` leaves nothing to do for a run of this length."""
    if step >= length.steps:
        end = f"the run ends with step {length.steps} ({length.reason})"
        say(f"nothing to do: the checkpoint is of step {step}, and {end}; raise that to train on")
