"""Starting ranks, with real processes: results, every way to fail, and that nothing is left running."""

import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest
from mbridge_train.errors import TrainError
from mbridge_train.run.launch import launch, outside_group

from testing.launched_ranks import PROGRAM, TESTS, assert_gone, run, start, started_ranks


@pytest.mark.parametrize("count", [None, 3])
def test_every_rank_runs_the_entry(tmp_path: Path, count: int | None) -> None:
    code, _, errors = run("sum_ranks", tmp_path, 10, count=count)
    assert (code, errors) == (0, "")
    world_size = count or 1
    results = [path.read_text().split() for path in sorted(tmp_path.glob("result_*"))]
    total = str(sum(range(10, 10 + world_size)))
    assert [result[:4] for result in results] == [[str(r), str(world_size), str(r), total] for r in range(world_size)]
    assert len({result[4] for result in results}) == world_size


def test_one_rank_runs_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.syspath_prepend(str(TESTS))
    assert launch("launch_entries:sum_ranks", (tmp_path, 4)) == 0
    assert (tmp_path / "result_0").read_text() == f"0 1 0 4 {os.getpid()}"
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} & set(os.environ)


@pytest.mark.parametrize(("count", "ranks"), [(1, ()), (2, ()), (2, (1,))])
def test_user_error_is_one_line_and_exit_code_2(count: int, ranks: tuple[int, ...]) -> None:
    code, output, errors = run("user_error", *ranks, count=count)
    assert (code, output, errors) == (2, "", "error: train.jsonl, line 3: not JSON. Mend the line.\n")


def test_crash_of_a_rank_is_the_last_thing_shown() -> None:
    start_time = time.monotonic()
    code, output, errors = run("crash", 1, count=2)
    assert time.monotonic() - start_time < 60
    assert (code, output) == (1, "rank 0 waits\n")
    assert errors.startswith("rank 1 of 2 failed:\nTraceback (most recent call last):\n")
    assert errors.endswith("\nZeroDivisionError: the crash itself\n")
    assert "torch/distributed" not in errors
    assert "launch_rank" not in errors


def test_crash_of_the_only_rank() -> None:
    code, _, errors = run("crash", 0, count=1)
    assert code == 1
    assert errors.startswith("Traceback (most recent call last):\n")
    assert errors.endswith("\nZeroDivisionError: the crash itself\n")


def test_rank_ended_by_a_signal_is_named() -> None:
    code, _, errors = run("killed", 1, count=2)
    assert code == 1
    assert errors.endswith("error: rank 1 of 2 was ended by SIGKILL. The kernel does this when memory runs out.\n")


def test_exit_code_of_a_rank_is_passed_on() -> None:
    assert run("leave", 5, count=2)[::2] == (5, "error: rank 1 of 2 ended with exit code 5.\n")


@pytest.mark.parametrize(("count", "to_all"), [(1, False), (2, False), (2, True)])
def test_ctrl_c_ends_all_ranks(tmp_path: Path, count: int, to_all: bool) -> None:
    process = start("wait", tmp_path, count=count)
    ranks = started_ranks(tmp_path, count, process)
    start_time = time.monotonic()
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - start_time < 20
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert_gone(*ranks)


def test_termination_ends_all_ranks(tmp_path: Path) -> None:
    process = start("wait", tmp_path, count=2)
    ranks = started_ranks(tmp_path, 2, process)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, "ended by SIGTERM\n")
    assert_gone(*ranks)


def test_killed_launcher_leaves_no_rank(tmp_path: Path) -> None:
    process = start("wait", tmp_path, count=2)
    ranks = started_ranks(tmp_path, 2, process)
    process.kill()
    process.communicate(timeout=60)
    assert_gone(*ranks)


def test_the_directory_of_a_killed_launcher_is_removed_by_the_next(tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("temporary", "killed", "alive")}
    for place in places.values():
        place.mkdir()
    environment = {"TMPDIR": str(places["temporary"])}
    left = []
    for name in ("killed", "alive"):
        process = start("wait", places[name], count=2, environment=environment)
        ranks = started_ranks(places[name], 2, process)
        left.append({path.name for path in places["temporary"].iterdir()})
        if name == "killed":
            process.kill()
            process.communicate(timeout=60)
            assert_gone(*ranks)
    assert run("leave", 0, count=2, environment=environment)[0] == 0
    left.append({path.name for path in places["temporary"].iterdir()})
    process.terminate()
    process.communicate(timeout=60)
    assert_gone(*ranks)
    assert list(map(len, left)) == [1, 1, 1]
    assert left[0] != left[1] == left[2]


def test_ranks_of_torchrun_are_joined(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program))
    assert run("sum_ranks", tmp_path, 1, count=2, command=torchrun)[0] == 0
    assert [path.read_text()[:7] for path in sorted(tmp_path.glob("result_*"))] == ["0 2 0 3", "1 2 1 3"]
    code, _, errors = run("user_error", count=None, command=torchrun)
    assert code == 1  # torchrun's own
    assert errors.count("error: train.jsonl, line 3: not JSON. Mend the line.\n") == 1
    assert "traceback : train.jsonl, line 3: not JSON. Mend the line.\n" in errors  # torchrun's summary


def test_ranks_of_slurm_are_joined(tmp_path: Path) -> None:
    port = str(20000 + os.getpid() % 10000)
    shared = {"SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        start(
            "sum_ranks", tmp_path, 1, count=None, environment=shared | {"SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)}
        )
        for r in range(2)
    ]
    try:
        assert [process.communicate(timeout=120) for process in processes] == [("", "")] * 2
    finally:
        for process in processes:
            process.kill()
    assert [path.read_text()[:7] for path in sorted(tmp_path.glob("result_*"))] == ["0 2 0 3", "1 2 1 3"]


def test_rank_count_must_fit_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    group = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (group | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainError, match="nproc_per_node is 3, but torchrun started 2 ranks on this node"):
        launch("launch_entries:sum_ranks", (), nproc_per_node=3)


def test_incomplete_group_says_what_is_missing() -> None:
    with pytest.raises(TrainError, match="say that SLURM started .* MASTER_ADDR and MASTER_PORT not set"):
        outside_group({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"})
    with pytest.raises(TrainError, match="LOCAL_RANK not set"):
        outside_group({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"})
    assert outside_group({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) is None
    assert outside_group({}) is None


def test_rank_count_must_fit_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TrainError, match="nproc_per_node is 3, but this machine has 2 GPUs"):
        launch("launch_entries:sum_ranks", (), nproc_per_node=3)
    with pytest.raises(TrainError, match="nproc_per_node is 0"):
        launch("launch_entries:sum_ranks", (), nproc_per_node=0)
