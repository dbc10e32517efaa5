"""Each table of patches applies, refuses and undoes as one; the command lists them all."""

import logging
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mbridge_model.patches import Patch, PatchError, PatchTable
from mbridge_model.patches.quiet import quiet

from testing.gang import Gang, WorkerPool
from testing.patch_tables import check_table
from testing.tiny_models import VOCAB_SIZE, make_vision_model

MODULES = {
    "CPU": "mbridge_model.patches.cpu",
    "DIVERTED_LOGS": "mbridge_model.patches.quiet",
    "EMBEDDING_GRADIENTS": "mbridge_model.patches.gradient_accumulation",
    "MISTRAL_YARN": "mbridge_model.bridge.bridge",
    "MANY_VARIANTS": "mbridge_model.patches.compiled",
    "PLACEHOLDER": "mbridge_model.patches.cpu.missing_transformer_engine",
    "ROTARY": "mbridge_model.patches.rotary",
    "SWIGLU": "mbridge_model.patches.swiglu",
    "UNCOMPILED": "mbridge_model.patches.compiled",
    "WEIGHT_GRADIENTS": "mbridge_model.patches.gradient_accumulation",
}


def check_tables() -> None:
    """Runs in a worker."""
    from importlib import import_module

    from mbridge_model.bridge.bridge import import_bridge

    import_bridge()
    for name, module in MODULES.items():
        check_table(getattr(import_module(module), name))


def test_every_table(worker_pool: WorkerPool) -> None:
    Gang(1, worker_pool).run(check_tables, timeout=200)


def test_the_command_lists_every_table() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mbridge_model.patches"], capture_output=True, text=True, timeout=200, check=True
    )
    listed = [line for line in done.stdout.splitlines() if line.startswith("To ")]
    assert len(listed) == len(MODULES) + 1  # and MERGER_ACTIVATION, which is applied to objects
    assert "  torch.cuda:synchronize: it raises where there is no GPU" in done.stdout


def test_a_table_of_one_object() -> None:
    table = PatchTable("add", Patch(target="inner.add", reason="test", wrapper=lambda add: lambda: add() + 1))
    one, other = (SimpleNamespace(inner=SimpleNamespace(add=lambda: 1)) for _ in range(2))
    with table.on(one):
        assert (one.inner.add(), other.inner.add()) == (2, 1)
    assert one.inner.add() == 1
    with pytest.raises(PatchError, match="cannot add on .* inner.add: there is no 'inner' in SimpleNamespace"):
        table.on(SimpleNamespace()).apply()


def test_what_a_class_defines_is_found_again() -> None:
    class Base:
        def name(self) -> str:
            return "base"

    class Derived(Base):
        pass

    table = PatchTable("test", Patch(target="name", reason="test", replacement=lambda self: "new"), owner=Derived)
    with table, table:  # the inner one neither applies nor undoes
        assert Derived().name() == "new"
        with table:
            pass
        assert Derived().name() == "new"
    assert Derived().name() == "base" and "name" not in vars(Derived)


def patched_while_loading(directory: Path) -> tuple[list[int], set[str]]:
    """Runs in a worker: rows of a padded embedding as Megatron-Bridge reads it, before, while and after; what stays."""
    from mbridge_model import load
    from mbridge_model.bridge.conversion_tasks import has_vocabulary, hf_names, load_only

    model, handle = load(directory)
    upstream = handle.bridge._bridge
    bridge, state = upstream._model_bridge, upstream.hf_pretrained.state
    (task, *_) = (task for task in upstream.get_conversion_tasks(model) if has_vocabulary(task))
    task = replace(task, param_weight=torch.empty(VOCAB_SIZE + 3, 1))

    def rows() -> int:
        return len(bridge.maybe_modify_loaded_hf_weight(hf_names(task)[0], state))

    found = [rows()]
    with load_only(bridge, [task]):
        found.append(rows())
        assert bridge.build_conversion_tasks(None, None) == [task]
    return [*found, rows()], {"maybe_modify_loaded_hf_weight", "build_conversion_tasks"} & set(vars(bridge))


def test_padding_the_vocabulary_ends_with_loading(worker_pool: WorkerPool, tmp_path: Path) -> None:
    make_vision_model("qwen3_vl", True, tmp_path)
    found = Gang(1, worker_pool).run(patched_while_loading, tmp_path, timeout=200)
    assert found == [([VOCAB_SIZE, VOCAB_SIZE + 3, VOCAB_SIZE], set())]


def test_upstream_speaks_to_our_log(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    upstream = logging.getLogger("megatron.core.test_quiet")
    upstream.setLevel(logging.INFO)
    with caplog.at_level(logging.DEBUG, "mbridge_model"), quiet(), quiet():
        print("a print")
        upstream.warning("a record of %d", 1)
        for _ in range(2):
            warnings.warn("a warning", FutureWarning, stacklevel=1)
        upstream.error("an error")
        logging.getLogger("mbridge_model").warning("ours")
    found = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert found == [
        ("mbridge_model", "DEBUG", "megatron.core.test_quiet: a record of 1"),
        ("megatron.core.test_quiet", "ERROR", "an error"),
        ("mbridge_model", "WARNING", "ours"),
        ("mbridge_model", "DEBUG", "upstream printed: a print"),
        ("mbridge_model", "DEBUG", "upstream warned: FutureWarning: a warning"),
    ]
    assert capsys.readouterr().out == ""
