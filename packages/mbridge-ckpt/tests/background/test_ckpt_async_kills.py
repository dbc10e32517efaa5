"""Kill writers, ranks and launchers of runs at random moments: all processes end at once, and the next run goes on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from mbridge_ckpt import Layout, find_resume, model_file

WORKER = Path(__file__).with_name("kill_worker.py")
STEPS = 5
# A machine with more running processes than cores needs longer for everything.
LIMIT = 5.0 * max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
ROLES = ("writer", "rank", "launcher")


class Runs:
    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.count = 0
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def start(self, directory: Path, world: int) -> Path:
        """Start a run and return the place of its files."""
        self.count += 1
        place = self.scratch / str(self.count)
        place.mkdir()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"directory": str(directory), "world": world, "place": str(place)}) + "\n")
        self.process.stdin.flush()
        self.process.stdout.readline()
        return place


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("kills"))
    yield runs
    runs.process.stdin.close()
    runs.process.wait(timeout=30)


@pytest.fixture(scope="module")
def unbroken(runs: Runs) -> dict[int, tuple[list[bytes], float]]:
    """The final state of each rank of a run that nobody kills, and the seconds that it takes, by number of ranks."""
    found = {}
    for world in (1, 2):
        seconds = []
        for number in range(2):  # the first run takes longer than any later one
            directory = runs.scratch / f"unbroken_{world}_{number}"
            begin = time.monotonic()
            finish(runs, directory, world)
            seconds.append(time.monotonic() - begin)
        found[world] = final_state(directory, world), min(seconds)
    return found


def processes(place: Path, role: str = "*", rank: int | str = "*") -> list[int]:
    """Return the ids of the processes that run now, and are no zombies."""
    ids = [int(path.name.rsplit("_", 1)[1]) for path in place.glob(f"{role}_{rank}_*")]
    return [process for process in ids if is_running(process)]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def seconds_until_gone(place: Path, limit: float) -> float:
    begin = time.monotonic()
    # In this order: between a look at the processes and one at the launcher's file, a run may have started.
    while not list(place.glob("launcher_*")) or processes(place):
        assert time.monotonic() - begin < limit, sorted(path.name for path in place.iterdir())
        time.sleep(0.01)
    return time.monotonic() - begin


def errors(place: Path) -> dict[int, str]:
    return {int(path.name.rpartition("_")[2]): path.read_text() for path in place.glob("error_*")}


def finish(runs: Runs, directory: Path, world: int) -> None:
    place = runs.start(directory, world)
    seconds_until_gone(place, 120)
    assert errors(place) == {}


def final_state(directory: Path, world: int) -> list[bytes]:
    checkpoint = find_resume(directory).checkpoint
    assert checkpoint is not None and checkpoint.step == STEPS
    files = (model_file(STEPS, Layout(tensor=world), tensor_rank=rank) for rank in range(world))
    states: list[torch.Tensor] = [checkpoint.load_torch(file)["model"]["state"] for file in files]
    return [state.numpy().tobytes() for state in states]


def kill(runs: Runs, directory: Path, world: int, role: str, rank: int, moment: float) -> str:
    """Start a run, kill one of its processes after `moment` seconds, and check what becomes of the others."""
    place = runs.start(directory, world)
    begin = time.monotonic()
    time.sleep(moment)
    while not (victims := processes(place, role, rank)) and (not list(place.glob("rank_*")) or processes(place)):
        assert time.monotonic() - begin < 60
        time.sleep(0.002)
    if not victims:
        seconds_until_gone(place, LIMIT)
        assert errors(place) == {}
        return "finished before"
    with suppress(ProcessLookupError):
        os.kill(victims[0], signal.SIGKILL)
    seconds_until_gone(place, LIMIT)
    found = errors(place)
    if role == "writer" and found:
        assert rank in found and f"rank {rank} (" in found[rank] and "was killed by SIGKILL" in found[rank], found
    # With two ranks, the other one cannot have finished either.
    assert all(found.values()) and (world == 1 or role != "writer" or len(found) in (0, 2)), found
    return "ended" if role == "launcher" or found else "finished"


def check_kills(runs: Runs, unbroken: dict[int, tuple[list[bytes], float]], seed: int, count: int) -> None:
    moments = random.Random(seed)
    outcomes = []
    for number in range(count):
        world, role = 1 + number % 2, ROLES[number // 2 % 3]
        state, seconds = unbroken[world]
        directory = runs.scratch / f"killed_{seed}_{number}"
        rank = 0 if role == "launcher" else moments.randrange(world)
        outcomes.append(kill(runs, directory, world, role, rank, moments.uniform(0, seconds)))
        finish(runs, directory, world)
        assert final_state(directory, world) == state
    assert outcomes.count("ended") >= count / 6, outcomes


def test_kills_at_random_moments(runs: Runs, unbroken: dict[int, tuple[list[bytes], float]]) -> None:
    check_kills(runs, unbroken, seed=5, count=12)


@pytest.mark.slow
def test_hundred_kills_at_random_moments(runs: Runs, unbroken: dict[int, tuple[list[bytes], float]]) -> None:
    check_kills(runs, unbroken, seed=6, count=100)


@pytest.mark.parametrize("rank", [0, 1])
def test_writer_killed_while_it_starts(runs: Runs, tmp_path: Path, rank: int) -> None:
    """Both ranks waited for ten minutes, and so did the writer that was left when they were killed."""
    assert kill(runs, tmp_path, 2, "writer", rank, 0) == "ended"
