"""`AsyncSaver` writes the same bytes as `begin_save`, of the moment of the call, and reports what becomes of them."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed
from mbridge_ckpt import AsyncSaver, CheckpointError, Layout, SaveError, begin_save, open_checkpoint, write_hf
from mbridge_ckpt.background.staging import STEP, StagingBuffer, map_staging
from mbridge_ckpt.files.hashing import BLOCK, HashingReader
from mbridge_ckpt.formats.torch_zip import LazyTensor
from xxhash import xxh3_128

MODEL_FILE = "actor/iter_0000001/mp_rank_00/model_optim_rng.pt"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    large = torch.randn(STEP // 4 + 13, generator=generator)  # more than a step of the staging buffer
    return {
        "large": large,
        "half": torch.randn(31, 17, generator=generator).bfloat16(),
        "transposed": torch.randn(5, 9, generator=generator).t(),
        "view": large[100:207:3],
        "parameter": torch.nn.Parameter(torch.randn(3, generator=generator)),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
    }


def write(begin, directory: Path, value: dict, step: int = 1, **options) -> Path:
    with begin(directory, step=step, layout=Layout(), **options) as save:
        lazy = LazyTensor((2, 2), "int64", lambda: torch.arange(4).view(2, 2))
        save.write_torch(MODEL_FILE, {"model": value, "lazy": lazy, "iteration": step})
        save.write_rank_state({"position": 5})
        save.write_json("state/loop.json", {"epoch": 3})
        write_hf(save, value.items(), None, max_shard_size=1000)
        return save.commit({"metrics": {"reward": 0.5}}, writer={"program": "test"})


def test_files_are_those_of_a_synchronous_save(tmp_path):
    value = tensors()
    expected = open_checkpoint(write(begin_save, tmp_path / "sync", value))
    with AsyncSaver() as saver:
        for step in (1, 2):  # fresh memory, and memory that held something else
            path = write(saver.begin_save, tmp_path / "async", value if step == 1 else tensors(), step)
            assert saver.busy and saver.wait() == path
    found = open_checkpoint(tmp_path / "async" / "global_step_1")
    assert found.manifest.files == expected.manifest.files and len(found.manifest.files) == 8
    assert found.metadata == expected.metadata and found.manifest.writer == expected.manifest.writer
    loaded = open_checkpoint(tmp_path / "async").load_torch(MODEL_FILE)["model"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in value.items())


def test_what_is_saved_is_what_was_there_at_the_call(tmp_path):
    value = {"weight": torch.full((1000, 301), 3.0)}
    with AsyncSaver() as saver:
        os.kill(saver.process_id, signal.SIGSTOP)
        with saver.begin_save(tmp_path, step=1, layout=Layout()) as save:
            save.write_torch(MODEL_FILE, value)
            value["weight"].zero_()
            reused = torch.empty(11)
            write_hf(save, ((f"w{n}", reused.fill_(n)) for n in range(3)), None)
            path = save.commit()
        reused.fill_(-1)
        os.kill(saver.process_id, signal.SIGCONT)
        saver.wait()
    assert open_checkpoint(path).load_torch(MODEL_FILE)["weight"].eq(3.0).all()
    from safetensors.torch import load_file

    exported = load_file(path / "actor/hf_model/model.safetensors")
    assert [exported[f"w{n}"].unique().tolist() for n in range(3)] == [[0.0], [1.0], [2.0]]


def test_a_second_save_waits_or_is_refused(tmp_path):
    value = {"weight": torch.ones(7)}
    for when_busy in ("wait", "refuse"):
        with AsyncSaver(when_busy=when_busy) as saver:
            os.kill(saver.process_id, signal.SIGSTOP)
            first = write(saver.begin_save, tmp_path / when_busy, value)
            assert saver.check() is None
            resume = threading.Timer(0.3, os.kill, (saver.process_id, signal.SIGCONT))
            resume.start()
            if when_busy == "refuse":
                with pytest.raises(
                    SaveError, match="global_step_2 was not begun: .*global_step_1 is still being writt"
                ):
                    saver.begin_save(tmp_path, step=2, layout=Layout())
                assert saver.wait() == first and saver.check() is None
            begin = time.monotonic()
            second = write(saver.begin_save, tmp_path / when_busy, value, 2)
            assert when_busy == "refuse" or time.monotonic() - begin > 0.2
            assert first.is_dir() and saver.wait() == second
            resume.join()


def test_a_failure_is_told_once_and_the_saver_goes_on(tmp_path):
    value = {"weight": torch.ones(7)}
    with AsyncSaver() as saver:
        write(saver.begin_save, tmp_path, value)
        write(saver.begin_save, tmp_path, value, existing="refuse")
        with pytest.raises(SaveError, match=r"rank 0 \(.*global_step_1 exists"):
            saver.wait()
        assert saver.wait() is None
        with pytest.raises(ZeroDivisionError), saver.begin_save(tmp_path, step=2, layout=Layout()) as save:
            save.write_torch(MODEL_FILE, {"weight": torch.ones(1 // 0)})
        with pytest.raises(SaveError, match="global_step_2 was not saved: .*ZeroDivisionError"):
            saver.wait()
        with pytest.raises(ValueError, match="JSON"), saver.begin_save(tmp_path, step=3, layout=Layout()) as save:
            save.commit({"loss": float("nan")})
        with pytest.raises(SaveError, match="global_step_4 was not begun: .*global_step_3 was not saved"):
            write(saver.begin_save, tmp_path, value, 4)
        write(saver.begin_save, tmp_path, value, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step_1", "global_step_5", "latest"]


def test_a_dead_writer_is_told_wherever_the_saver_is_used(tmp_path):
    for use in (AsyncSaver.check, AsyncSaver.wait, AsyncSaver.close):
        saver = AsyncSaver()
        os.kill(saver.process_id, signal.SIGKILL)
        os.waitid(os.P_PID, saver.process_id, os.WEXITED | os.WNOWAIT)
        with pytest.raises(SaveError, match=r"rank 0 \(.*killed by SIGKILL"):
            use(saver)
        for _ in range(2 * (use is not AsyncSaver.close)):
            with pytest.raises(SaveError, match="no save can follow in this run; start it again"):
                saver.begin_save(tmp_path, step=1, layout=Layout())
        saver.close()
    with pytest.raises(RuntimeError, match="closed"):
        saver.begin_save(tmp_path, step=1, layout=Layout())


def test_signals_to_the_job_do_not_end_the_writer(tmp_path):
    with AsyncSaver() as saver:
        write(saver.begin_save, tmp_path, {"weight": torch.ones(7)})
        saver.wait()
        assert os.getsid(saver.process_id) == saver.process_id  # so a terminal's Ctrl-C does not reach it
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(saver.process_id, number)
        assert write(saver.begin_save, tmp_path, {"weight": torch.ones(7)}, 2) == saver.wait()


def test_close_waits_and_gives_everything_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    saver = AsyncSaver()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")  # relative to where the rank is now, not to where the writer began
    path = write(saver.begin_save, Path("here"), {"weight": torch.ones(1000)})
    process = saver.process_id
    saver.close()
    assert path.is_dir() and path.parent == tmp_path / "other" / "here"
    assert len(os.listdir("/proc/self/fd")) == before and not Path(f"/proc/{process}").exists()
    saver.close()


def test_memory_is_reused_and_its_end_is_an_error(tmp_path):
    value = tensors()
    with AsyncSaver() as saver:
        write(saver.begin_save, tmp_path, value)
        taken = saver._staging.taken
        write(saver.begin_save, tmp_path, value, 2)
        size = sum(path.stat().st_size for path in (tmp_path / "global_step_1").rglob("*.*"))
        assert size < saver._staging.taken == taken < size + 2 * STEP
        saver._staging.capacity = taken
        with pytest.raises(CheckpointError, match="no memory for a copy"):
            write(saver.begin_save, tmp_path, value | {"more": torch.ones(2 * STEP)}, 3)
        with pytest.raises(SaveError, match="no memory for a copy"):
            saver.wait()


def test_staging_buffer_is_the_same_memory_on_both_sides():
    staging = StagingBuffer()
    first = staging.store(b"abc")
    tensor = staging.store_tensor(torch.arange(5, dtype=torch.int16))
    whole = memoryview(tensor.numpy()).cast("B")
    extent = staging.store(whole)
    used = staging.taken
    reader = map_staging(staging.descriptor)
    assert reader[first] == b"abc" and extent.start == 64 and reader[extent] == whole
    tensor[1] = 500
    assert reader[extent][2:4] == b"\xf4\x01" and staging.taken == used == STEP


def test_reading_in_any_order_gives_content_and_checksum(tmp_path):
    data = os.urandom(3 * BLOCK + 777)
    (tmp_path / "file").write_bytes(data)
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        with HashingReader(tmp_path / "file") as reader:
            for _ in range(12):
                position, size = (int(torch.randint(len(data), (), generator=generator)) for _ in range(2))
                size = min(size, int(10 ** (7 * torch.rand((), generator=generator))))
                if torch.rand((), generator=generator) < 0.5:
                    position = reader.seek(max(reader._hashed - position % 3000 + 1500, 0))
                reader.seek(position)
                assert reader.read(size) == data[position : position + size]
            assert reader.digest() == xxh3_128(data).hexdigest()


def test_loading_reads_each_byte_once(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(write(begin_save, tmp_path, tensors()))
    counted, real = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: counted.append(count := real(*arguments)) or count)
    checkpoint.load_torch(MODEL_FILE)
    size = checkpoint.manifest.file(MODEL_FILE).bytes
    assert size <= sum(counted) < size + 20_000
    damaged = checkpoint.path / MODEL_FILE
    damaged.write_bytes(damaged.read_bytes()[:-70_000] + b"\1" * 70_000)
    with pytest.raises(CheckpointError, match="its content changed since it was written"):
        checkpoint.load_torch(MODEL_FILE)


def on_two_ranks(directory: str) -> list[str]:
    value, rank = {"weight": torch.ones(7)}, torch.distributed.get_rank()
    said = []
    with AsyncSaver(when_busy="refuse") as saver:
        path = write_alone_or_together(saver, Path(directory), value, 1)
        said.append(str(saver.wait() == path))
        if rank == 1:
            os.kill(saver.process_id, signal.SIGSTOP)
        write_alone_or_together(saver, Path(directory), value, 2)
        for _ in range(2):
            try:
                saver.begin_save(directory, step=3, layout=Layout(tensor=2))
            except SaveError as error:
                said.append(str(error).split(";")[0])
        if rank == 1:
            os.kill(saver.process_id, signal.SIGCONT)
        saver.wait()
    return said


def write_alone_or_together(saver: AsyncSaver, directory: Path, value: dict, step: int) -> Path:
    with saver.begin_save(directory, step=step, layout=Layout(tensor=2)) as save:
        save.write_torch(f"actor/{torch.distributed.get_rank()}.pt", value)
        save.write_rank_state({"position": 1})
        if save.is_first:
            save.write_json("state/loop.json", step)
        return save.commit()


def test_two_ranks_save_and_refuse_alike(gang2, tmp_path):
    first, second = gang2.run(on_two_ranks, str(tmp_path))
    assert first == second and first[0] == "True" and len(first) == 3
    assert "global_step_3 was not begun" in first[1] and "global_step_2 is still being written" in first[1]
    found = open_checkpoint(tmp_path)
    assert found.step == 2 and {file.path for file in found.manifest.files} == {
        "actor/0.pt", "actor/1.pt", "state/loop.json", "state/rank_00000.pt", "state/rank_00001.pt"
    }  # fmt: skip


def on_two_ranks_with_a_writer_killed_at_its_first_save(directory: str) -> tuple[str, float]:
    with AsyncSaver() as saver:
        begin = time.monotonic()
        if torch.distributed.get_rank() == 1:
            os.kill(saver.process_id, signal.SIGSTOP)
            threading.Timer(0.5, os.kill, (saver.process_id, signal.SIGKILL)).start()
        with pytest.raises(SaveError) as caught:
            saver.begin_save(directory, step=1, layout=Layout(tensor=2))
    return str(caught.value), time.monotonic() - begin


def test_a_writer_killed_at_the_first_save_is_told_on_every_rank_at_once(gang2, tmp_path):
    (first, seconds), (second, _) = gang2.run(on_two_ranks_with_a_writer_killed_at_its_first_save, str(tmp_path))
    assert first == second and "global_step_1 was not begun: rank 1 (" in first and "killed by SIGKILL" in first
    assert seconds < 20 and not list(tmp_path.iterdir())
