"""Only one run at a time uses a directory; the lock ends with the process, however it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from mbridge_train.run.run_directory import RunLock

HOLDER = """
import sys, time
from pathlib import Path
from mbridge_train.run.run_directory import RunLock
lock = RunLock(Path(sys.argv[1]))
print(lock.take(), flush=True)
time.sleep(60)
"""


def test_one_run_a_directory(tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "mine"
    command = [sys.executable, "-c", HOLDER, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "None\n"
        lock = RunLock(directory)
        reason = lock.take()
        assert reason is not None and f"in use by another run (process {holder.pid} on " in reason
        os.kill(holder.pid, signal.SIGKILL)
    assert lock.take() is None
    assert RunLock(directory).take() is not None


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    reason = RunLock(tmp_path / "file" / "run").take()
    assert reason is not None and "cannot be written: Not a directory" in reason
