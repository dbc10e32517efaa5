"""One worker of a gang: run the calls that `testing.gang` sends through a pipe until the pipe closes.

Every call gets a fresh default process group, so no call sees groups, threads or sockets of an earlier one. Imported
modules stay imported.
"""

import contextlib
import faulthandler
import gc
import importlib
import importlib.util
import os
import pickle
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(kw_only=True, slots=True)
class Case:
    """A call from the parent. `arguments` is pickled separately, because it may contain classes of the test file."""

    module_name: str
    path: str
    function_name: str
    arguments: bytes
    rank: int
    world_size: int
    store_path: str
    timeout: float
    search_path: list[str]


def main(connection: Connection, lifeline: Connection, log: str) -> None:
    """Run a worker process, which appends its output to `log`."""
    # A separate process group: Ctrl-C reaches only pytest, and the pool can end the children of a worker.
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # The signal handler writes the dump, so it also shows a thread that hangs in native code.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    faulthandler.enable()
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    while True:
        try:
            case: Case = _load(connection.recv_bytes())
        except EOFError:
            return
        try:
            function = _find(case)
            arguments, keywords = pickle.loads(case.arguments)
            connection.send_bytes(pickle.dumps(("started", None)))
            with _process_group(case):
                answer = pickle.dumps(("returned", pickle.dumps(function(*arguments, **keywords))))
        except BaseException as error:  # noqa: BLE001 - also SystemExit and pytest's own outcomes
            answer = pickle.dumps(("raised", "".join(traceback.format_exception(_below_worker(error)))))
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send_bytes(answer)


def _load(message: bytes) -> Case:
    return Case(**pickle.loads(message))


def _end_with_parent(lifeline: Connection) -> None:
    """End this process with its parent, which never writes to the pipe and closes it by ending."""
    lifeline.poll(None)
    os._exit(1)


def _below_worker(error: BaseException) -> BaseException:
    """Remove the frames of this file from the top of the traceback."""
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return error.with_traceback(frames)


def _find(case: Case) -> Callable[..., Any]:
    for entry in case.search_path:
        if entry not in sys.path:
            sys.path.append(entry)
    found: Any = _module(case.module_name, case.path)
    for part in case.function_name.split("."):
        found = getattr(found, part)
    function: Callable[..., Any] = found
    return function


def _module(name: str, path: str) -> ModuleType:
    """Import the module under the parent's name, so that pickled classes of a test file are found on both sides."""
    if name in sys.modules:
        return sys.modules[name]
    with contextlib.suppress(ModuleNotFoundError, ValueError):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and Path(spec.origin).resolve() == Path(path).resolve():
            return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _process_group(case: Case) -> Iterator[None]:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    _share_gloo_device()
    environment, seed = dict(os.environ), 1234
    os.environ.update(RANK=str(case.rank), LOCAL_RANK=str(case.rank), WORLD_SIZE=str(case.world_size))
    os.environ.update(LOCAL_WORLD_SIZE=str(case.world_size))
    random.seed(seed)
    torch.manual_seed(seed)
    # A file store needs no port that another run could take. Gloo's timeout is longer than the parent's, which has the
    # better message.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{case.store_path}",
        rank=case.rank,
        world_size=case.world_size,
        timeout=timedelta(seconds=case.timeout + 60),
    )
    yield
    # Reached only on success, since the parent ends the gang after a failure.
    if not dist.is_initialized():
        raise RuntimeError("the case destroyed the default process group, which belongs to the gang")
    dist.barrier()
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()
        _release_models()
    dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


def _share_gloo_device() -> None:
    """Let all of the process's groups use one gloo device.

    Each device has a thread that wakes up a hundred times per second, and Megatron-Core creates a dozen groups per
    call. With one device per group, torch's default, these threads take as much of two cores as the tests.
    """
    from torch.distributed import distributed_c10d

    module: Any = distributed_c10d
    gloo = module.ProcessGroupGloo
    if gloo.__name__ == "OneDeviceGloo":
        return
    device = gloo.create_device(interface="lo")

    def __init__(self: Any, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options = gloo._Options()
        options._devices, options._timeout = [device], timeout
        gloo.__init__(self, store, rank, size, options)

    module.ProcessGroupGloo = type("OneDeviceGloo", (gloo,), {"__init__": __init__})


def _release_models() -> None:
    """Free the models that a call has created and the process groups that they hold, each with its threads.

    Megatron-Core's gradient hooks tie a model into cycles through autograd, which the garbage collector cannot see.
    """
    from megatron.core.distributed import DistributedDataParallel

    for model in [found for found in gc.get_objects() if type(found) is DistributedDataParallel]:
        model.grad_accs.clear()
        model.config.grad_scale_func = model.config.finalize_model_grads_func = model.config.no_sync_func = None
    gc.collect()
    # Only modules remain, a million objects. Traversing them again would take half a second per call.
    gc.freeze()
