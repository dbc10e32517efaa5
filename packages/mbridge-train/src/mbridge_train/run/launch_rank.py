"""One rank of a run: call the entry, and leave word of a failure in the error file of torch's elastic agent.

The file is that of `torch.distributed.elastic.multiprocessing.errors.record`, so torchrun's summary shows the failure
as well. `record` itself does not do, for four reasons: it stamps failures with whole seconds, so that the peer whose
connection broke is as likely to be named as the rank that crashed; its file can be cut off when the agent ends the
rank; Ctrl-C and `sys.exit` leave no word; and the exception goes on to the interpreter, which prints the traceback of a
user error on every rank and ends with exit code 1.
"""

import ctypes
import importlib
import json
import logging
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

USER_ERROR = 2
RESUMABLE = 75
"""Exit code of a run that was preempted and saved: EX_TEMPFAIL of sysexits.h. 143, the code of any process that SIGTERM
ends, could not tell a run that has saved from one that has not."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
PREEMPTIBLE_FILE = "preemptible"
"""Beside the error file, while the rank handles preemption: its process id."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(slots=True, frozen=True)
class Failure:
    """Why an entry failed. `text` is the message of a user error, else a traceback; `time` is in seconds."""

    exit_code: int
    text: str
    rank: int = field(default_factory=lambda: int(os.environ.get("RANK", "0")))
    time: float = field(default_factory=time.time)

    def show(self, *, world_size: int) -> None:
        """Print the failure to standard error."""
        sys.stdout.flush()
        if self.exit_code == USER_ERROR:
            print(f"error: {self.text}", file=sys.stderr)
        elif self.text:
            where = f"rank {self.rank} of {world_size} failed:\n" if world_size > 1 else ""
            print(f"{where}{self.text.rstrip()}", file=sys.stderr)
        sys.stderr.flush()

    def record(self) -> None:
        """Write the error file that the elastic agent asked for, if an agent started this process."""
        if not self.text or ERROR_FILE not in os.environ:
            return
        path = Path(os.environ[ERROR_FILE])
        extra = {"py_callstack": self.text, "timestamp": str(int(self.time)), "failure": asdict(self)}
        last_line = self.text.rstrip().rpartition("\n")[2]
        # In one step, since the agent may end this process at any time.
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"message": {"message": last_line, "extraInfo": extra}}), encoding="utf-8")
        part.rename(path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the failure that `record` wrote to the error file `path`."""
        return cls(**json.loads(path.read_text(encoding="utf-8"))["message"]["extraInfo"]["failure"])


def run_entry(entry: str, args: tuple[Any, ...]) -> Failure | None:
    """Call ``"module:function"`` with `args` and return why it failed, or None."""
    module_name, separator, function_name = entry.partition(":")
    if not separator:
        raise ValueError(f"entry {entry!r} is not of the form 'module:function'")
    # Upstream warns of optional GPU libraries that are missing, and of the way in which Megatron-Core calls torch.
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed\.checkpoint")
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        getattr(importlib.import_module(module_name), function_name)(*args)
    except KeyboardInterrupt:
        return Failure(128 + signal.SIGINT, "interrupted")
    except SystemExit as error:
        if error.code is None or error.code == 0:
            return None
        return Failure(error.code, "") if isinstance(error.code, int) else Failure(1, str(error.code))
    except BaseException as error:  # noqa: BLE001 - reported with its traceback
        if getattr(error, "exit_code", None) == USER_ERROR:
            return Failure(USER_ERROR, str(error))
        # Without the frames above the entry.
        frames = error.__traceback__.tb_next if error.__traceback__ is not None else None
        return Failure(1, "".join(traceback.format_exception(error.with_traceback(frames or error.__traceback__))))
    return None


def main() -> None:
    """Run a rank that `launch` started; ``sys.argv[1]`` is the launcher's directory."""
    job = Path(sys.argv[1]) / "job"
    search_path, entry, pickled_args, launcher_pid = pickle.loads(job.read_bytes())
    _end_with(launcher_pid)
    sys.path[:] = search_path
    sys.argv[1:] = []
    failure = run_entry(entry, pickle.loads(pickled_args))
    sys.stdout.flush()
    if failure is None:
        return
    failure.record()
    # Not sys.exit: an interpreter whose peers hang in a collective can hang during its shutdown as well.
    sys.stderr.flush()
    os._exit(failure.exit_code)


def _end_with(launcher_pid: int) -> None:
    """Have the kernel end this process when the launcher ends, however it ends. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher_pid:
        os._exit(1)
