"""The only module that imports megatron.bridge.

Upstream has announced that Megatron-Bridge moves into Megatron-LM, so what we use of it is kept in one place: open a
HuggingFace directory, get its Megatron provider, load weights, stream them back. The import takes seconds and
happens when a model is built, not before.
"""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from mbridge_model.cpu import allow_missing_transformer_engine, enable_cpu
from mbridge_model.errors import ModelError

logger = logging.getLogger("mbridge_model")

INSTALL_LINE = "pip install --no-deps megatron-bridge==0.6.2"


def import_bridge() -> Any:
    """Import megatron.bridge where no GPU and no Transformer Engine need be, and return its `AutoBridge` class.

    Raises:
        ModelError: megatron-bridge is not installed; the message has the line that installs it.
    """
    enable_cpu()
    allow_missing_transformer_engine()
    try:
        with _quiet():
            from megatron.bridge import AutoBridge
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("megatron.bridge"):
            raise ModelError(f"megatron-bridge is not installed; run: {INSTALL_LINE}") from None
        raise
    return AutoBridge


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep upstream's prints, progress bars and warnings of missing GPU libraries off the terminal, but in the log."""
    printed = io.StringIO()
    loggers = [logging.getLogger(name) for name in ("megatron.bridge", "megatron.core")]
    levels = [upstream.level for upstream in loggers]
    for upstream in loggers:
        upstream.setLevel(logging.ERROR)
    try:
        with redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for upstream, level in zip(loggers, levels, strict=True):
            upstream.setLevel(level)
        if text := printed.getvalue().strip():
            logger.debug("upstream printed: %s", text)


class Bridge:
    """One HuggingFace directory as Megatron-Bridge sees it.

    Args:
        path: a directory that `open_directory` has checked.
        trust_remote_code: let transformers run Python files that lie in the directory.

    Raises:
        ModelError: Megatron-Bridge has no conversion for the architecture, or cannot read the directory.
    """

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        auto_bridge = import_bridge()
        try:
            with _quiet():
                self._bridge = auto_bridge.from_hf_pretrained(str(path), trust_remote_code=trust_remote_code)
        except ValueError as error:
            first_line = str(error).strip().splitlines()[0]
            raise ModelError(f"Megatron-Bridge cannot convert {path}: {first_line}") from error

    def provider(self) -> Any:
        """A fresh provider (a Megatron `TransformerConfig` that builds the model), without weights."""
        with _quiet():
            return self._bridge.to_megatron_provider(load_weights=False)

    def build(self, provider: Any) -> list[torch.nn.Module]:
        """The model chunks of this rank, not yet wrapped for data parallelism; half precision is wrapped."""
        with _quiet():
            return provider.provide_distributed_model(wrap_with_ddp=False)

    def load_weights(self, model: list[torch.nn.Module]) -> None:
        """Copy the directory's weights into the model, in place. Collective over all ranks."""
        with _quiet():
            self._bridge.load_hf_weights(model)

    def stream_weights(self, model: list[torch.nn.Module], vocab_size: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (HuggingFace name, whole tensor) one by one on every rank. Collective: all ranks must iterate.

        Tensors with a row per token are cut to `vocab_size` rows, which Megatron-Bridge leaves padded.
        """
        with _quiet():
            tasks = self._bridge.get_conversion_tasks(model)
        vocabulary = {"lm_head.weight"}
        for task in tasks:
            if task is not None and task.global_param_name.endswith(_VOCABULARY_PARAMETERS):
                vocabulary.update(_hf_names(task))
        for name, tensor in self._bridge.export_hf_weights(model, cpu=False, show_progress=False):
            yield name, tensor[:vocab_size] if name in vocabulary else tensor

    def check_coverage(self, model: list[torch.nn.Module]) -> None:
        """Check that each weight of the directory has a place in the model, and each parameter a weight.

        Megatron-Bridge only warns of either, and would train with a randomly initialised or a lost tensor.

        Raises:
            ModelError: naming the first tensors that have no counterpart.
        """
        from megatron.core.utils import get_model_config

        expected: set[str] = set()
        with _quiet():
            tasks = self._bridge.get_conversion_tasks(model)
        for task in tasks:
            if task is not None:
                expected.update(_hf_names(task))
        present = set(self._bridge.hf_pretrained.state.source.get_all_keys())
        missing = sorted(expected - present)
        ignored = {"lm_head.weight"} if get_model_config(model[0]).share_embeddings_and_output_weights else set()
        unused = sorted(name for name in present - expected - ignored if not name.endswith("rotary_emb.inv_freq"))
        if missing:
            raise ModelError(
                f"the checkpoint lacks {len(missing)} tensor(s) that the model needs, first {missing[0]!r}; "
                "is the download complete, and does config.json belong to these weights?"
            )
        if unused:
            raise ModelError(
                f"{len(unused)} tensor(s) of the checkpoint have no place in the Megatron model, first {unused[0]!r}; "
                "training without them would change the model. Megatron-Bridge does not know this variant"
            )


# Megatron pads these to a multiple of the tensor-parallel size.
_VOCABULARY_PARAMETERS = ("embedding.word_embeddings.weight", "output_layer.weight")


def _hf_names(task: Any) -> list[str]:
    """The HuggingFace tensors that one Megatron parameter is made of: one, or several such as q, k and v."""
    names = task.mapping.hf_param
    return [names] if isinstance(names, str) else list(names.values())
