"""The gang fixture: answers by rank, and what is shown when ranks fail, hang or vanish."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from testing.gang import Gang, GangError, WorkerPool


@dataclass
class Point:
    x: int
    y: torch.Tensor


def sum_of_ranks(point: Point, *, scale: int = 1) -> Point:
    total = torch.tensor([dist.get_rank() + 1])
    dist.all_reduce(total)
    return Point(x=point.x + dist.get_rank() * scale, y=total + point.y)


def process_id() -> tuple[int, int]:
    return os.getpid(), thread_count()


def thread_count() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def make_groups(count: int) -> int:
    for _ in range(count):
        group = dist.new_group()
    value = torch.ones(1)
    dist.all_reduce(value, group=group)
    return thread_count()


def raise_on(rank: int) -> None:
    print(f"about to fail on {rank}, here is {dist.get_rank()}")
    if dist.get_rank() == rank:
        raise ValueError(f"no good on {rank}")
    dist.barrier()


def wait_on(rank: int) -> None:
    if dist.get_rank() != rank:
        return
    time.sleep(1000)


def hang_in_collective() -> None:
    if dist.get_rank() != 0:
        dist.all_reduce(torch.ones(1))
    else:
        time.sleep(1000)


def vanish(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def not_picklable() -> object:
    return lambda: None


def change_environment() -> str | None:
    before = os.environ.get("LEFT_BEHIND")
    os.environ["LEFT_BEHIND"] = "yes"
    return before


def write_and_return(text: str) -> None:
    print(text)


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    """Not the session's workers: the cases here kill theirs."""
    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def two(pool: WorkerPool) -> Gang:
    return Gang(2, pool)


@pytest.fixture(scope="module")
def three(pool: WorkerPool) -> Gang:
    return Gang(3, pool)


def test_results_come_back_by_rank(two: Gang, three: Gang) -> None:
    for gang in (two, three):
        points = gang.run(sum_of_ranks, Point(x=5, y=torch.tensor([100])), scale=10)
        assert [point.x for point in points] == [5 + 10 * rank for rank in range(gang.world_size)]
        assert {int(point.y) for point in points} == {100 + sum(range(1, gang.world_size + 1))}


def test_workers_are_kept_and_shared_by_gangs_of_all_sizes(two: Gang, three: Gang) -> None:
    first = [pid for pid, _ in two.run(process_id)]
    assert [pid for pid, _ in three.run(process_id)][:2] == first
    assert [pid for pid, _ in two.run(process_id)] == first


def test_process_groups_do_not_pile_up(two: Gang) -> None:
    threads_with_groups = two.run(make_groups, 8)
    for _ in range(3):
        two.run(make_groups, 8)
    threads = [count for _, count in two.run(process_id)]
    assert max(threads) < min(threads_with_groups)


def test_environment_is_restored(two: Gang) -> None:
    assert two.run(change_environment) == [None, None]
    assert two.run(change_environment) == [None, None]


def test_raising_rank_is_shown_and_the_gang_recovers(three: Gang) -> None:
    start = time.monotonic()
    with pytest.raises(GangError) as caught:
        three.run(raise_on, 1)
    assert time.monotonic() - start < 30
    text = str(caught.value)
    assert text.startswith("raise_on on 3 ranks: rank 1 failed\n")
    _, rank0, rank1, rank2 = text.split("=====\n")
    assert "ValueError: no good on 1" in rank1
    assert "ValueError" not in rank0
    assert "in raise_on" in rank1
    assert "gang_worker.py" not in rank1.split("Traceback")[1]
    assert "about to fail on 1, here is 2" in rank2
    assert [point.x for point in three.run(sum_of_ranks, Point(x=0, y=torch.tensor([0])))] == [0, 1, 2]


def test_ranks_that_all_raise_are_all_shown(two: Gang) -> None:
    with pytest.raises(GangError, match="rank 0, 1 failed") as caught:
        two.run(process_id, no_such_argument=1)
    assert str(caught.value).count("TypeError: process_id() got an unexpected keyword argument") == 2


def test_timeout_shows_where_every_rank_hangs(two: Gang) -> None:
    start = time.monotonic()
    with pytest.raises(GangError, match="hang_in_collective on 2 ranks: not done in 2 s: rank 0, 1") as caught:
        two.run(hang_in_collective, timeout=2)
    assert time.monotonic() - start < 60
    _, rank0, rank1 = str(caught.value).split("=====\n")
    assert f"line {line_of('time.sleep(1000)', after='def hang_in_collective')} in hang_in_collective" in rank0
    assert f"line {line_of('dist.all_reduce', after='def hang_in_collective')} in hang_in_collective" in rank1
    assert len(two.run(process_id)) == 2


def test_timeout_names_the_ranks_that_are_not_done(two: Gang) -> None:
    with pytest.raises(GangError, match="not done in 1 s: rank"):
        two.run(wait_on, 1, timeout=1)


def test_vanished_rank(two: Gang) -> None:
    with pytest.raises(GangError, match="rank 1 failed|rank 0, 1 failed") as caught:
        two.run(vanish, 1)
    assert "the process ended with code 7" in str(caught.value)


def test_worker_killed_between_calls_is_replaced(two: Gang, pool: WorkerPool) -> None:
    two.run(process_id)
    worker = pool.workers(2)[0]
    worker.process.kill()
    worker.process.join()
    assert two.run(process_id)[0][0] != worker.process.pid


def test_result_that_cannot_be_pickled(two: Gang) -> None:
    with pytest.raises(GangError, match="pickle"):
        two.run(not_picklable)


def test_local_function_is_refused(two: Gang) -> None:
    with pytest.raises(TypeError, match="move it to the top level"):
        two.run(lambda: None)


def test_output_of_workers_is_printed(two: Gang, capfd: pytest.CaptureFixture[str]) -> None:
    two.run(write_and_return, "hello")
    assert capfd.readouterr().out == "[rank 0]\nhello\n[rank 1]\nhello\n"


def test_file_that_does_not_import_is_reported(two: Gang, tmp_path: Path) -> None:
    module = tmp_path / "only_in_parent.py"
    module.write_text("def function(): ...\n")
    sys.path.insert(0, str(tmp_path))
    try:
        import only_in_parent

        module.write_text("raise ImportError('cannot')\n")
        with pytest.raises(GangError, match="ImportError: cannot"):
            two.run(only_in_parent.function)
    finally:
        sys.path.remove(str(tmp_path))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_pytest(how: signal.Signals, tmp_path: Path) -> None:
    """A run that is killed while its workers are inside a case leaves no process behind."""
    (tmp_path / "test_inner.py").write_text(
        textwrap.dedent(
            """
            import os, time
            from pathlib import Path
            from testing.gang import FORK_SERVER
            FORK_SERVER.set_forkserver_preload([])  # no Megatron here
            def sleep(directory):
                Path(directory, f"{os.environ['RANK']}.tmp").write_text(str(os.getpid()))
                Path(directory, f"{os.environ['RANK']}.tmp").rename(Path(directory, f"{os.environ['RANK']}.pid"))
                time.sleep(1000)
            def test_inner(gang2):
                gang2.run(sleep, os.environ["PID_DIRECTORY"])
            """
        )
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(root / "pyproject.toml"), "--rootdir", str(root)]
    process = subprocess.Popen(
        [*command, "-p", "no:cacheprovider", "-p", "conftest", str(tmp_path / "test_inner.py")],
        env=os.environ | {"PID_DIRECTORY": str(tmp_path), "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=root,
    )
    deadline = time.monotonic() + 90
    while len(list(tmp_path.glob("*.pid"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0].decode()
        time.sleep(0.1)
    pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    process.send_signal(how)
    process.wait(timeout=30)
    for pid in pids:
        wait_until_gone(pid)


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} still runs")


def line_of(text: str, after: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(after))
    return next(number for number, line in enumerate(lines, 1) if number > start and text in line)
