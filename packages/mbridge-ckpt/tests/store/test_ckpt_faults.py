"""Kill, starve and break saves at every point; every checkpoint committed before or meanwhile must load unchanged."""

import errno
import os
import random
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest
from mbridge_ckpt import Layout, Retention, begin_save, find_resume, open_checkpoint, prune, verify

from testing.checkpoint_faults import WORKER, assert_newest_is_whole, content, forget_step_2


def test_killed_at_200_random_moments(worker, directory):
    durations = []
    for _ in range(4):
        begin = time.monotonic()
        assert worker.save(directory, 0)[0]["error"] is None
        durations.append(time.monotonic() - begin)
    seconds = sorted(durations)[1]  # neither the first, which waits for the worker to start, nor a lucky one
    newest, committed, killed = 0, 0, 0
    random_moments = random.Random(20)
    for step in range(1, 201):
        result = worker.save(directory, step, kill_after=random_moments.uniform(0, 1.1 * seconds))
        killed += result[0] is None
        found = assert_newest_is_whole(directory, newest)
        committed += found == step
        newest = found
        assert result[0] is None or found == step
        # The machine gets slower and faster; kills are to stay within the saves, the latest ones after the commit.
        seconds *= 1.02 if result[0] is None else 0.97
        if step % 8 == 0:
            prune(directory, Retention(last=1))
            assert open_checkpoint(directory / "latest").step <= newest
            assert_newest_is_whole(directory, newest)
    assert killed >= 50 and committed >= 10, "the kills did not fall into the saves"


@pytest.mark.parametrize("replaces", [False, True])
def test_killed_before_and_after_every_system_call(worker, directory, replaces):
    step = 1 if replaces else 2
    assert worker.save(directory, 1)[0]["error"] is None
    committed = []
    # After a call is before the next one, so of the even positions only; every third where the end alone differs.
    for position in count(step=6 if replaces else 2):
        results = worker.save(directory, step, kill_at=position)
        if results[0] is not None:
            break
        committed.append(assert_newest_is_whole(directory, 1) == step)
        if not replaces and committed[-1]:
            forget_step_2(directory)
    assert results[0]["error"] is None and ("exchange" in results[0]["trace"]) == replaces
    assert results[0]["calls"] > 40
    assert replaces or (not committed[0] and committed[-1] and committed == sorted(committed))


def test_one_rank_or_all_ranks_killed(worker, directory):
    results = worker.save(directory, 0, world=2)
    assert [result["error"] for result in results] == [None, None]
    calls = [result["calls"] for result in results]
    newest = 0
    for step in range(1, 17):
        victim = step % 2
        position = 2 * calls[victim] * step // 17 if step < 16 else "rename"
        results = worker.save(directory, step, world=2, victim=victim, kill_at=position)
        assert results[victim] is None
        other = results[1 - victim]
        newest = assert_newest_is_whole(directory, newest, world=2)
        if other["error"] is not None:
            assert other["kind"] == "RanksLostError" and ": a rank is gone" in other["error"]
            assert f"global_step_{step} " in other["error"] and ("was not saved" not in other["error"] or newest < step)
    # Killed after the rename, so the other must not say that the checkpoint is not there.
    assert newest == 16 and "may or may not have been saved" in other["error"]
    for step in range(17, 22):
        worker.save(directory, step, world=2, victim="all", kill_after=0.02 * (step - 16))
        newest = assert_newest_is_whole(directory, newest, world=2)


def test_every_system_call_fails_in_turn(worker, directory):
    assert worker.save(directory, 1)[0]["error"] is None
    rehearsal = worker.save(directory / "rehearsal", 1)[0]
    for call, name in enumerate(rehearsal["trace"]):
        number = (errno.ENOSPC, errno.EIO)[call % 2]
        result = worker.save(directory, 2, fail_at=call, errno=number)[0]
        found = assert_newest_is_whole(directory, 1)
        if result["error"] is None:
            assert found == 2, (call, name)
        else:
            assert found == 1 and result["kind"] == "SaveError", (call, name, result)
            assert "global_step_2" in result["error"] and not list(directory.glob(".*")), (call, name, result)
            assert os.strerror(number) in result["error"]
        if found == 2:
            forget_step_2(directory)


@pytest.mark.parametrize("limit", [0, 5, 3000, 20_000, 33_000])
def test_file_size_limit_names_the_file_and_leaves_nothing(worker, tmp_path, limit):
    assert worker.save(tmp_path, 1)[0]["error"] is None
    error = worker.save(tmp_path, 2, file_limit=limit)[0]["error"]
    assert "global_step_2/" in error and "File too large" in error
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["global_step_1", "latest"]
    assert assert_newest_is_whole(tmp_path, 1) == 1


@pytest.mark.parametrize("background", [False, True])
def test_full_disk(tmp_path, background):
    # A tmpfs of our own in a mount namespace; the script prints what the save said and what was left.
    script = f"""
import sys; sys.path.insert(0, {str(WORKER.parent)!r})
from pathlib import Path; import fault_worker
target = Path({str(tmp_path)!r})
fault_worker.save(target, 1, 1, 0, False)
try:
    fault_worker.save(target, 2, 1, 0, False, {background})
except fault_worker.mbridge_ckpt.SaveError as error:
    print(error)
print(sorted(path.name for path in target.iterdir()), fault_worker.mbridge_ckpt.find_resume(target).checkpoint.step)
"""
    mount = f'mount -t tmpfs -o size=150k tmpfs {tmp_path} && exec {sys.executable} -c "$0"'
    namespace = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here")
    done = subprocess.run([*namespace, "sh", "-c", mount, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "global_step_2/actor" in done.stdout and "No space left on device" in done.stdout
    assert done.stdout.strip().endswith("['global_step_1', 'latest'] 1")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_failing_rank_makes_all_ranks_raise_and_is_named(worker, tmp_path, victim):
    assert worker.save(tmp_path, 1, world=2)[0]["error"] is None
    results = worker.save(tmp_path, 2, world=2, victim=victim, raise_at=1)
    assert results[victim]["kind"] == "ValueError"
    assert results[1 - victim]["kind"] == "SaveError"
    assert f"rank {victim} (" in results[1 - victim]["error"] and "model is broken" in results[1 - victim]["error"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["global_step_1", "latest"]


def test_a_rank_whose_disk_fails_makes_all_ranks_raise_alike(worker, tmp_path):
    results = worker.save(tmp_path, 2, world=2, victim=1, fail_at="write", errno=errno.EDQUOT)
    assert results[0]["error"] == results[1]["error"] and results[0]["kind"] == results[1]["kind"] == "SaveError"
    assert "rank 1 (" in results[0]["error"] and os.strerror(errno.EDQUOT) in results[0]["error"]
    assert "mp_rank_01/model_optim_rng.pt" in results[0]["error"]
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_renamed_before_it_is_on_the_disk(tmp_path, monkeypatch):
    """Replays the order of calls: at the rename, every file and directory under it was synced after its last change."""
    unsynced, opened, renamed = set(), {}, []
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "mkdir", "rename", "replace")}

    def traced_open(path, flags, *rest, **options):
        descriptor = real["open"](path, flags, *rest, **options)
        opened[descriptor] = str(path)
        if flags & os.O_CREAT:
            unsynced.update({str(path), os.path.dirname(path)})
        return descriptor

    def traced_write(descriptor, data):
        unsynced.add(opened[descriptor])
        return real["write"](descriptor, data)

    def traced_fsync(descriptor):
        unsynced.discard(opened[descriptor])
        real["fsync"](descriptor)

    def traced_mkdir(path, *rest, **options):
        real["mkdir"](path, *rest, **options)
        unsynced.update({str(path), os.path.dirname(path)})

    def traced_rename(source, target):
        renamed.append((Path(target).name, {path for path in unsynced if path.startswith(str(source))}))
        real["rename"](source, target)
        unsynced.add(os.path.dirname(target))

    def traced_replace(source, target):
        renamed.append((Path(target).name, {path for path in unsynced if path == os.path.dirname(target)}))
        real["replace"](source, target)

    for name, function in list(locals().items()):
        if name.startswith("traced_"):
            monkeypatch.setattr(os, name.removeprefix("traced_"), function)
    with begin_save(tmp_path, step=3, layout=Layout()) as writing:
        writing.write_torch("actor/iter_0000003/mp_rank_00/model_optim_rng.pt", content(3, 0))
        writing.write_json("a/b/c.json", 1)
        writing.commit()
    writer_mark = {path for _, paths in renamed for path in paths if path.endswith(".writer")}
    assert len(writer_mark) == 1  # removed before the rename, so it need not be on the disk
    assert [(name, paths - writer_mark) for name, paths in renamed] == [("global_step_3", set()), ("latest", set())]


def test_truncation_and_bit_flips_in_every_file(worker, tmp_path):
    for step in (1, 2):
        assert worker.save(tmp_path, step)[0]["error"] is None
    newest = tmp_path / "global_step_2"
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert len(files) == 7
    moments = random.Random(5)
    for path in files:
        whole = path.read_bytes()
        damaged = [whole[:-1], b"", whole[: len(whole) // 2], whole + b"\0", None]
        for _ in range(6):
            bit = moments.randrange(8 * len(whole))
            damaged.append(whole[: bit // 8] + bytes([whole[bit // 8] ^ (1 << bit % 8)]) + whole[bit // 8 + 1 :])
        for data in damaged:
            path.unlink()
            if data is not None:
                path.write_bytes(data)
            resume = find_resume(tmp_path)
            relative = path.relative_to(newest)
            if str(relative).startswith("actor/hf_model/"):
                assert resume.checkpoint.step == 2
                assert str(path) in verify(newest).faults[0].message
            else:
                assert resume.checkpoint.step == 1
                assert relative.name in resume.passed_over[0].reason and "global_step_2" in resume.passed_over[0].reason
            path.write_bytes(whole)
    assert find_resume(tmp_path).checkpoint.step == 2
