"""From a HuggingFace directory to a Megatron model."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mbridge_model.bridge.bridge import Bridge, import_bridge
from mbridge_model.directory import HFDirectory, check_tied_output, open_directory
from mbridge_model.families import GENERIC, TORCH_ARCHITECTURES, Family, check_architecture, find_family
from mbridge_model.parallel import Parallel, initialize_parallel
from mbridge_model.provider.config_checks import check_mrope, check_rotary, config_fields, limit_dynamic_rotary
from mbridge_model.provider.configure import Backend, configure_provider, resolve_backend
from mbridge_model.vision import Freeze

logger = logging.getLogger("mbridge_model")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelHandle:
    """Everything beside the model itself that training or exporting it needs.

    Attributes:
        directory: the HuggingFace directory that it was loaded from.
        family: the family whose rules were applied.
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
        """Size of the vocabulary; rows of the embedding beyond it are padding."""
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
    freeze: Freeze | None = None,
) -> tuple[list[nn.Module], ModelHandle]:
    """Build this rank's part of a Megatron model from a HuggingFace directory. Collective over all ranks.

    Without an initialized torch.distributed the process joins the group that torchrun's variables describe, or without
    them becomes a world of one; without Megatron's process groups they are made for `parallel`.

    Args:
        hf_path: directory with config.json and safetensors weights.
        parallel: the layout; one rank by default.
        overrides: fields of the Megatron provider to set, by name.
        backend: "torch", "te" (Transformer Engine), or "auto": "te" where it can be imported and there is a GPU, or the
            architecture has no plain torch layers, else "torch".
        dtype: of parameters and activations.
        weights: copy the weights; if False, the parameters keep Megatron's random initialization.
        seed: seed of Megatron's random streams, unless they have been seeded.
        trust_remote_code: let transformers run Python files of the directory.
        freeze: parts of a vision-language model that are not trained; none by default.

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
    has_torch_layers = directory.architecture in TORCH_ARCHITECTURES
    resolved = resolve_backend(backend, dtype, has_torch_layers=has_torch_layers)
    bridge = Bridge(directory, trust_remote_code=trust_remote_code)
    check_architecture(directory.config, resolved)
    provider = bridge.provider()
    if provider.share_embeddings_and_output_weights:
        check_tied_output(directory)
    logger.info("%s: family %s, %s backend", directory.path, family.name, resolved)
    if family is GENERIC and directory.architecture not in GENERIC.architectures:
        logger.warning(
            "%s has no family file here: compare its logits with transformers before you trust it",
            directory.architecture,
        )
    text_config = bridge.hf_config.get_text_config()
    if family.vision is not None:
        check_mrope(text_config)
    configure_provider(
        provider,
        family=family,
        parallel=parallel,
        dtype=dtype,
        backend=resolved,
        config_fields=config_fields(text_config, provider),
        overrides=overrides or {},
        freeze=freeze,
    )
    if weights:
        provider.perform_initialization = False
    if family.vision is not None:
        from mbridge_model.vision.model import provide

        provider.provide = partial(provide, provider, family.vision, resolved)
    model = bridge.build(provider)
    check_rotary(bridge.hf_config, model)
    limit_dynamic_rotary(bridge.hf_config, model)
    if provider.gradient_accumulation_fusion:
        from mbridge_model.patches.gradient_accumulation import mark_tied_embeddings

        mark_tied_embeddings(model)
    if weights:
        bridge.check_coverage(model)
        bridge.load_weights(model)
        bridge.check_finite(model)
    return model, ModelHandle(
        directory=directory, family=family, backend=resolved, parallel=parallel, provider=provider, bridge=bridge
    )
