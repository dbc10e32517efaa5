"""The table of patches: everything in it exists, is applied once, and a target that has gone is an error by name."""

import subprocess
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from mbridge_model.patches import Patch, PatchError, PatchTable
from mbridge_model.patches.cpu import enable_cpu
from mbridge_model.patches.cpu import torch_equivalents as equivalents
from mbridge_model.patches.patch import rewrite_code

from testing.gang import Gang, WorkerPool


@pytest.fixture
def victim() -> Iterator[types.ModuleType]:
    """A module to patch."""
    module = types.ModuleType("patch_victim")
    source = """
class Thing:
    def device(self, name="x"):
        return [(lambda: "cuda")(), name in ["cuda", "cpu2"], "cuda:0", True]

def plain():
    return 1
"""
    exec(source, vars(module))
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def test_constants_are_rewritten_wherever_the_function_is_held(victim: types.ModuleType) -> None:
    held = victim.Thing.device
    patch = Patch(target="patch_victim:Thing.device", reason="test", constants={"cuda": "cpu"})
    PatchTable("run without a GPU", patch).apply()
    # In a nested function and in a list, but neither inside another text nor a constant of another type.
    assert held(None) == ["cpu", False, "cuda:0", True]
    assert held(None, "cpu") == ["cpu", True, "cuda:0", True]
    with pytest.raises(PatchError, match="patch_victim:Thing.device: its code no longer has 'cuda'"):
        PatchTable("run without a GPU", patch).apply()


def test_constants_of_another_type_stay() -> None:
    code = rewrite_code((lambda: (1, True, 1.0)).__code__, {True: False}, {})
    assert repr(types.FunctionType(code, {})()) == "(1, False, 1.0)"


def test_whatever_has_gone_is_named_and_nothing_is_applied(victim: types.ModuleType) -> None:
    patches = (
        Patch(target="patch_victim:plain", reason="fine", replacement=lambda: 2),
        Patch(target="patch_victim:Thing.gone", reason="why one", replacement=1),
        Patch(target="patch_victim:Gone.device", reason="why two", wrapper=lambda original: original),
        Patch(target="patch_victim.gone:thing", reason="why three", constants={"cuda": "cpu"}),
        Patch(target="patch_victim:Thing.device", reason="why four", constants={"cuda": "cpu", "xpu": "cpu"}),
        Patch(target="patch_victim:Thing.device", reason="why five", names={"warning": "debug"}),
        Patch(target="patch_victim:Thing", reason="why six", constants={"cuda": "cpu"}),
    )
    with pytest.raises(PatchError) as caught:
        PatchTable("run without a GPU", *patches).apply()
    message = str(caught.value)
    for text in (
        f"torch {torch.__version__.partition('+')[0]}",
        "megatron-core 0.19",
        "patch_victim:Thing.gone: there is no 'gone' in Thing (needed because why one)",
        "patch_victim:Gone.device: there is no 'Gone' in patch_victim (needed because why two)",
        "patch_victim.gone:thing: there is no module patch_victim.gone",
        "patch_victim:Thing.device: its code no longer has 'xpu' (needed because why four)",
        "patch_victim:Thing.device: its code no longer has 'warning' (needed because why five)",
        "patch_victim:Thing: is a type, not a Python function",
    ):
        assert text in message
    assert "fine" not in message
    assert victim.plain() == 1
    assert victim.Thing().device()[0] == "cuda"


@pytest.mark.parametrize("change", [{}, {"replacement": 1, "constants": {1: 2}}])
def test_a_patch_is_one_change(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="json:loads: give one of"):
        Patch(target="json:loads", reason="test", **change)  # type: ignore[arg-type]


def test_nothing_happens_where_there_is_a_gpu() -> None:
    # In a process of its own: in this one, another test may have enabled the CPU already.
    program = """
import sys, torch
before = {name: getattr(torch.cuda, name) for name in dir(torch.cuda)}
torch.cuda.is_available = before["is_available"] = lambda: True
from mbridge_model.patches.cpu import enable_cpu
enable_cpu()
assert {name: getattr(torch.cuda, name) for name in before} == before
assert torch.Tensor.cuda is torch._C.TensorBase.cuda
assert not any(name.startswith("megatron") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def describe_enabled_process() -> dict[str, object]:
    """Runs in a worker. Return the state of the patches after two calls, with Megatron imported before."""
    import megatron.core.optimizer.optimizer as imported_before

    by_name = imported_before.get_grad_norm_fp32
    enable_cpu()
    patched = torch.cuda.current_device
    enable_cpu()
    from mbridge_model.patches.cpu import CPU
    from megatron.core.tensor_parallel import random

    copies = [
        f"{module.__name__}.{name}"
        for module in list(sys.modules.values())
        if getattr(module, "__name__", "").startswith("megatron.core")
        for name, value in vars(module).items()
        if isinstance(value, types.FunctionType)
        and value.__module__ == random.__name__
        and value.__name__ in ("_get_cuda_rng_state", "_set_cuda_rng_state")
    ]
    gelu = torch.compile(torch.nn.functional.gelu)
    gelu(torch.ones(2))
    return {
        "same": torch.cuda.current_device is patched,
        "targets": [patch.target for patch in CPU.patches],
        "reasons": [patch.reason for patch in CPU.patches],
        "constants": "cuda" in str(by_name.__code__.co_consts),
        "copies": copies,
        "compiled frames": torch._dynamo.utils.counters["frames"]["total"],
        "available": torch.cuda.is_available(),
    }


def test_enabled_process(worker_pool: WorkerPool) -> None:
    (found,) = Gang(1, worker_pool).run(describe_enabled_process, timeout=200)
    targets = found["targets"]
    assert len(targets) == len(set(targets)) > 40
    assert all(found["reasons"])
    assert found["same"]
    assert not found["constants"], "a function that was imported by name before is not the changed one"
    assert not found["copies"], "a module holds the function that was replaced"
    assert found["compiled frames"] == 0
    assert found["available"] is False  # nobody is told that there is a GPU


def use_random_numbers() -> None:
    """Runs in a worker."""
    enable_cpu()
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("one", 1)
    tracker.add("two", 2)
    torch.cuda.manual_seed(3)
    outside = torch.rand(2)
    with tracker.fork("one"):
        first = torch.rand(3)
        with tracker.fork("two"):
            other = torch.rand(3)
    with tracker.fork("one"):
        second = torch.rand(3)
    outside_after = torch.rand(2)
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(torch.cat([first, second]), torch.cat([torch.rand(3, generator=generator) for _ in "ab"]))
    assert torch.equal(other, torch.rand(3, generator=torch.Generator().manual_seed(2)))
    expected = torch.Generator().manual_seed(3)
    assert torch.equal(outside, torch.rand(2, generator=expected))
    assert torch.equal(outside_after, torch.rand(2, generator=expected))
    states = tracker.get_states()
    restored = CudaRNGStatesTracker()
    restored.set_states(states)
    with restored.fork("one"):
        third = torch.rand(3)
    assert torch.equal(third, torch.rand(3, generator=generator))
    with pytest.raises(NotImplementedError, match="use_cudagraphable_rng"):
        CudaRNGStatesTracker(use_cudagraphable_rng=True).add("graph", 1)


def use_torch_cuda() -> None:
    """Runs in a worker."""
    enable_cpu()
    assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
    tensor = torch.ones(2)
    assert tensor.cuda(torch.cuda.current_device(), non_blocking=True) is tensor
    assert tensor.pin_memory() is tensor
    module = torch.nn.Linear(1, 1)
    assert module.cuda(0) is module
    default = torch.cuda.current_stream()
    side = torch.cuda.Stream(device=torch.cuda.current_device(), priority=torch.cuda.Stream.priority_range()[1])
    with torch.cuda.stream(side):
        assert torch.cuda.current_stream() is side
        side.wait_stream(default)
        event = side.record_event()
        with torch.cuda.stream(None), default:
            assert torch.cuda.current_stream() is default
        assert torch.cuda.current_stream() is side
    assert torch.cuda.current_stream() is default is torch.cuda.default_stream()
    tensor.record_stream(side)
    end = torch.cuda.Event(enable_timing=True)
    with pytest.raises(ValueError, match="recorded"):
        event.elapsed_time(end)
    end.record()
    end.synchronize()
    assert end.query()
    assert 0 < event.elapsed_time(end) < 60_000
    state = torch.cuda.get_rng_state()
    assert torch.equal(state, torch.get_rng_state())
    torch.cuda.set_device(1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.memory_stats()["allocated_bytes.all.current"] == torch.cuda.max_memory_allocated() == 0
    assert torch.cuda.mem_get_info() == (0, 0)
    assert torch.cuda.is_current_stream_capturing() is False
    with pytest.raises(RuntimeError):  # what nobody changed still says that there is no GPU
        torch.zeros(1, device="cuda")


@pytest.mark.parametrize("function", [use_random_numbers, use_torch_cuda])
def test_in_a_worker(worker_pool: WorkerPool, function: object) -> None:
    Gang(1, worker_pool).run(function, timeout=200)  # type: ignore[arg-type]


def test_streams_nest_and_events_measure_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = equivalents.Event(), equivalents.Event()
    times = iter([1.0, 1.25])
    monkeypatch.setattr(equivalents.time, "perf_counter", lambda: next(times))
    first.record()
    second.record()
    assert first.elapsed_time(second) == 250.0
