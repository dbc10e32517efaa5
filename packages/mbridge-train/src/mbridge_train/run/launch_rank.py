"""One rank of `mbridge_train.run.launch`: runs the entry and leaves word of a failure for the launcher."""

import ctypes
import importlib
import logging
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

USER_ERROR = 2
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(kw_only=True, slots=True, frozen=True)
class Failure:
    """Why an entry failed. `text` is the message of a user error, else a traceback; `time` is in seconds."""

    rank: int
    exit_code: int
    text: str
    time: float

    def show(self, *, rank: int, world_size: int) -> None:
        sys.stdout.flush()
        if self.exit_code == USER_ERROR:
            print(f"error: {self.text}", file=sys.stderr)
        elif self.text:
            where = f"rank {rank} of {world_size} failed:\n" if world_size > 1 else ""
            print(f"{where}{self.text.rstrip()}", file=sys.stderr)
        sys.stderr.flush()

    def write(self, path: Path) -> None:
        """Complete under its name or not there at all: the launcher may end this process at any time."""
        path.with_suffix(".part").write_bytes(pickle.dumps((self.rank, self.exit_code, self.text, self.time)))
        path.with_suffix(".part").rename(path)

    @classmethod
    def read(cls, path: Path) -> "Failure":
        rank, exit_code, text, when = pickle.loads(path.read_bytes())
        return cls(rank=rank, exit_code=exit_code, text=text, time=when)


def run_entry(entry: str, args: tuple[Any, ...]) -> Failure | None:
    """Call ``"module:function"``; return None, or why it failed."""
    module_name, separator, function_name = entry.partition(":")
    if not separator:
        raise ValueError(f"entry {entry!r} is not of the form 'module:function'")
    _quiet_upstream()
    try:
        getattr(importlib.import_module(module_name), function_name)(*args)
    except KeyboardInterrupt:
        return _failure(128 + signal.SIGINT, "interrupted")
    except SystemExit as error:
        if error.code is None or error.code == 0:
            return None
        return _failure(error.code, "") if isinstance(error.code, int) else _failure(1, str(error.code))
    except BaseException as error:  # noqa: BLE001 - reported with its traceback
        if getattr(error, "exit_code", None) == USER_ERROR:
            return _failure(USER_ERROR, str(error))
        # Without the frames above the entry's own.
        frames = error.__traceback__.tb_next if error.__traceback__ is not None else None
        return _failure(1, "".join(traceback.format_exception(error.with_traceback(frames or error.__traceback__))))
    return None


def _quiet_upstream() -> None:
    """Megatron-Core's import says a dozen times which optional GPU libraries are missing; torch's checkpoints, how
    Megatron-Core should have called them. That is no news to a user.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed\.checkpoint")
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def _failure(exit_code: int, text: str) -> Failure:
    return Failure(rank=int(os.environ.get("RANK", "0")), exit_code=exit_code, text=text, time=time.time())


def main() -> None:
    """The program of a rank that `launch` started; ``sys.argv[1]`` is the launcher's directory."""
    directory = Path(sys.argv[1])
    search_path, entry, pickled_args, launcher_pid = pickle.loads((directory / "job").read_bytes())
    _end_with(launcher_pid)
    sys.path[:] = search_path
    sys.argv[1:] = []
    failure = run_entry(entry, pickle.loads(pickled_args))
    sys.stdout.flush()
    if failure is None:
        return
    if failure.text:
        failure.write(directory / f"rank_{failure.rank}.failure")
    # Not sys.exit: the shutdown of an interpreter whose peers hang in a collective can hang as well.
    sys.stderr.flush()
    os._exit(failure.exit_code)


def _end_with(launcher_pid: int) -> None:
    """Have the kernel end this process when the launcher ends, however it ends. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher_pid:
        os._exit(1)
