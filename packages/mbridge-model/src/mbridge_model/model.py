"""From a HuggingFace directory to a Megatron model, and back."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mbridge_model.bridge import Bridge, import_bridge
from mbridge_model.directory import HFDirectory, open_directory
from mbridge_model.families import GENERIC, Family, find_family
from mbridge_model.fidelity import check_rotary, config_fields
from mbridge_model.parallel import Parallel, initialize_parallel
from mbridge_model.provider import Backend, configure_provider, resolve_backend

logger = logging.getLogger("mbridge_model")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelHandle:
    """What belongs to a loaded model and is needed to train or export it.

    Attributes:
        directory: the HuggingFace directory it came from.
        family: whose rules were applied.
        backend: "te" or "torch".
        parallel: the layout it was built for.
        provider: the finalized Megatron configuration that built it.
        bridge: the weight conversion.
    """

    directory: HFDirectory
    family: Family
    backend: str
    parallel: Parallel
    provider: Any
    bridge: Bridge

    @property
    def vocab_size(self) -> int:
        """True size of the vocabulary: the rows beyond it are padding and no token."""
        return self.directory.vocab_size

    @property
    def config(self) -> Any:
        """The Megatron `TransformerConfig` (the provider itself)."""
        return self.provider


def load(
    hf_path: str | Path,
    parallel: Parallel | None = None,
    overrides: Mapping[str, Any] | None = None,
    backend: Backend = "auto",
    *,
    dtype: torch.dtype = torch.float32,
    weights: bool = True,
    seed: int = 1234,
    trust_remote_code: bool = False,
) -> tuple[list[nn.Module], ModelHandle]:
    """Build this rank's part of a Megatron model from a HuggingFace directory. Collective over all ranks.

    Without an initialised torch.distributed the process becomes a world of one; without Megatron's process groups
    they are made for `parallel`.

    Args:
        hf_path: directory with config.json and safetensors weights.
        parallel: the layout; one rank by default.
        overrides: fields of the Megatron provider to set, by name.
        backend: "torch", "te" (Transformer Engine), or "auto": the latter where it imports and a GPU is there.
        dtype: of parameters and activations.
        weights: copy the weights; without, the parameters have Megatron's random initialisation.
        seed: of Megatron's random streams, where they are not seeded yet.
        trust_remote_code: let transformers run Python files that lie in the directory.

    Returns:
        The model chunks of this rank (one, without virtual pipeline stages), in training mode and not wrapped for
        data parallelism, and the handle that `export` and `save_hf` take.

    Raises:
        ModelError: the directory, the layout or a setting is wrong; the message says what, why and the fix.
    """
    parallel = parallel or Parallel()
    directory = open_directory(hf_path, needs_weights=weights)
    import_bridge()
    initialize_parallel(parallel, seed)
    family = find_family(directory.architecture)
    resolved = resolve_backend(backend, dtype)
    bridge = Bridge(directory.path, trust_remote_code=trust_remote_code)
    provider = bridge.provider()
    logger.info("%s: family %s, %s backend", directory.path, family.name, resolved)
    if family is GENERIC:
        logger.warning(
            "%s has no family file here: compare its logits with transformers before you trust it",
            directory.architecture,
        )
    configure_provider(
        provider,
        family=family,
        parallel=parallel,
        dtype=dtype,
        backend=resolved,
        config_fields=config_fields(bridge.hf_config, provider),
        overrides=overrides or {},
    )
    if weights:
        provider.perform_initialization = False
    model = bridge.build(provider)
    check_rotary(bridge.hf_config, model)
    if weights:
        bridge.check_coverage(model)
        bridge.load_weights(model)
    handle = ModelHandle(
        directory=directory, family=family, backend=resolved, parallel=parallel, provider=provider, bridge=bridge
    )
    return model, handle


def export_recipe(model: list[nn.Module], handle: ModelHandle) -> list[dict[str, Any]] | None:
    """How each HuggingFace tensor is a part of one Megatron parameter, for exporting without Megatron later.

    Collective over all ranks. Each entry has `name` (HuggingFace), `parameter` (Megatron's, layers numbered over the
    whole model) and `part`: "whole"; "query", "key" or "value" of a fused weight or bias, with `heads`, `groups` and
    `head_dim`; "gate" or "up" of a gated `linear_fc1`. `rows` are the real tokens of a padded vocabulary.

    Returns:
        None for a model with a tensor that is not such a part (a permuted or computed one).
    """
    return handle.bridge.recipe(model, handle.provider, handle.vocab_size)


def export(model: list[nn.Module], handle: ModelHandle) -> Iterator[tuple[str, Tensor]]:
    """Stream the weights under their HuggingFace names, gathered from all ranks, one tensor at a time.

    Collective: every rank must run the iterator to its end, and every rank gets every tensor, on the model's device
    and in its dtype. At most one HuggingFace tensor and the shards it is made from exist beside the model. Padding
    rows of the vocabulary are cut off; tied embeddings come once, as they lie in the source directory.

    Args:
        model: the chunks that `load` returned, bare or wrapped (data parallel, half precision).
        handle: as `load` returned it.
    """
    with torch.no_grad():
        yield from handle.bridge.stream_weights(model, handle.vocab_size)
