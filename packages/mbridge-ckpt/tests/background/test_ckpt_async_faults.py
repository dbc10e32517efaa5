"""Kill and starve the writer process of `AsyncSaver`: the error reaches the rank, and the old checkpoint stays good."""

import os
import random
import time

import pytest
from mbridge_ckpt import find_resume

from testing.checkpoint_faults import assert_newest_is_whole, forget_step_2


def test_writer_killed_at_random_moments(worker, directory):
    assert worker.save(directory, 0)[0]["error"] is None
    begin = time.monotonic()
    assert worker.save(directory, 1, background=True)[0]["error"] is None
    seconds = min(time.monotonic() - begin, 0.4)  # of a busy machine, the part that matters
    newest, failed = 1, 0
    moments = random.Random(21)
    for step in range(2, 12):
        result = worker.save(directory, step, background=True, kill_writer_after=moments.uniform(0, seconds))[0]
        newest = assert_newest_is_whole(directory, newest)
        if result["error"] is not None:
            failed += 1
            assert result["kind"] == "SaveError" and "rank 0 (" in result["error"] and "SIGKILL" in result["error"]
        else:
            assert newest == step
    assert failed >= 3


def test_writer_killed_at_each_stage(worker, directory):
    assert worker.save(directory, 1)[0]["error"] is None
    calls = worker.save(directory / "rehearsal", 2)[0]["trace"]
    # The stages of a save: its directory, a file's middle and end, the manifest, the rename, the link.
    rename = calls.index("rename")
    positions = [0, 2 * calls.index("write", 3), 2 * calls.index("fsync") + 1, 2 * rename - 30]
    found = []
    for position in (*positions, 2 * rename - 8, 2 * rename + 1):
        result = worker.save(directory, 2, background=True, kill_at=position)[0]
        found.append(assert_newest_is_whole(directory, 1))
        if result["error"] is not None:
            assert "global_step_2 was not saved: rank 0 (" in result["error"] and "SIGKILL" in result["error"]
        if found[-1] == 2:
            forget_step_2(directory)
    assert found[0] == 1 and found == sorted(found)


@pytest.mark.parametrize("fault", [{"file_limit": 3000}, {"fail_at": "write", "errno": 28}, {"fail_at": "rename"}])
def test_writer_that_cannot_write_names_rank_and_reason(worker, directory, fault):
    assert worker.save(directory, 1)[0]["error"] is None
    result = worker.save(directory, 2, background=True, **fault)[0]
    reason = "File too large" if "file_limit" in fault else os.strerror(fault.get("errno", 5))
    assert result["kind"] == "SaveError" and "rank 0 (" in result["error"] and reason in result["error"]
    assert sorted(entry.name for entry in directory.iterdir()) == ["global_step_1", "latest"]
    assert assert_newest_is_whole(directory, 1) == 1


def test_rank_killed_after_handing_over(worker, directory):
    """Its writer dies with it, before or after the commit, and leaves nothing that looks finished."""
    assert worker.save(directory, 1)[0]["error"] is None
    assert worker.save(directory, 2, background=True, kill_after_commit=True) == [None]
    newest = assert_newest_is_whole(directory, 1)
    for step in range(3, 9):
        worker.save(directory, step, background=True, kill_after=0.02 * (step - 2))
        newest = assert_newest_is_whole(directory, newest)


@pytest.mark.parametrize("fault", [{"kill_at": 21}, {"fail_at": "fsync"}, {"raise_at": 1}])
def test_one_of_two_ranks_fails_and_both_know(worker, directory, fault):
    assert worker.save(directory, 1, world=2)[0]["error"] is None
    results = worker.save(directory, 2, world=2, background=True, victim=1, **fault)
    assert find_resume(directory).checkpoint.step == 1
    assert_newest_is_whole(directory, 1, world=2)
    assert all("global_step_2 was not saved" in result["error"] or "raise_at" in fault for result in results)
    if "kill_at" in fault:
        assert "rank 1 (" in results[1]["error"] and "SIGKILL" in results[1]["error"]
        assert results[0]["kind"] == "SaveError" and "a rank is gone" in results[0]["error"]
    elif "fail_at" in fault:
        assert results[0]["error"] == results[1]["error"]
        assert "rank 1 (" in results[0]["error"] and os.strerror(5) in results[0]["error"]
    else:
        assert results[1]["kind"] == "ValueError"
        assert "rank 1 (" in results[0]["error"] and "model is broken" in results[0]["error"]
