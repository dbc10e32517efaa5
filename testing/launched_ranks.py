"""Start ranks with `mbridge_train.run.launch` in processes of their own, and look for processes that are left."""

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

TESTS = Path(__file__).parents[1] / "packages/mbridge-train/tests/run"
"""Directory of launch_entries.py, whose functions the ranks run."""
NO_GROUP = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_")) and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
}
PROGRAM = """
import pickle, sys
from mbridge_train.run.launch import launch
entry, args, count = pickle.loads(bytes.fromhex(sys.argv[1]))
if __name__ == "__main__":
    sys.exit(launch(f"launch_entries:{entry}", args, count))
"""


def start(
    entry: str,
    *args: Any,
    count: int | None,
    command: tuple[str, ...] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    job = pickle.dumps((entry, args, count)).hex()
    return subprocess.Popen(
        [*(command or (sys.executable, "-c", PROGRAM)), job],
        # A CPU run, wherever the tests run.
        env={**NO_GROUP, "PYTHONPATH": str(TESTS), "CUDA_VISIBLE_DEVICES": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(entry: str, *args: Any, count: int | None, **options: Any) -> tuple[int, str, str]:
    process = start(entry, *args, count=count, **options)
    output, errors = process.communicate(timeout=120)
    assert_gone(process.pid)
    return process.returncode, output, errors


def started_ranks(directory: Path, count: int, process: Any) -> list[int]:
    deadline = time.monotonic() + 90
    while len(paths := list(directory.glob("*.pid"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(path.read_text()) for path in paths]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_gone(*pids: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(is_running(pid) for pid in pids):
        time.sleep(0.05)
    assert not [pid for pid in pids if is_running(pid)]
