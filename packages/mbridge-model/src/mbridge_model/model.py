"""From a HuggingFace directory to a Megatron model, and back."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mbridge_model.bridge.bridge import Bridge, import_bridge
from mbridge_model.bridge.checks import check_mrope, check_rotary, config_fields
from mbridge_model.bridge.hf_views import join_blocks
from mbridge_model.bridge.provider import Backend, configure_provider, resolve_backend
from mbridge_model.directory import HFDirectory, open_directory
from mbridge_model.families import GENERIC, Family, find_family
from mbridge_model.parallel import Parallel, initialize_parallel
from mbridge_model.vision import Freeze, VisionInputs

logger = logging.getLogger("mbridge_model")

# Maps logits [sequence, batch, padded vocabulary / TP] in the model's dtype to anything.
Head = Callable[[Tensor], Any]


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
    freeze: Freeze | None = None,
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
    resolved = resolve_backend(backend, dtype)
    bridge = Bridge(directory.path, trust_remote_code=trust_remote_code)
    provider = bridge.provider()
    logger.info("%s: family %s, %s backend", directory.path, family.name, resolved)
    if family is GENERIC:
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
        from mbridge_model.vision.model import bind

        bind(provider, family.vision, resolved)
    model = bridge.build(provider)
    check_rotary(bridge.hf_config, model)
    if provider.gradient_accumulation_fusion:
        from mbridge_model.patches.gradient_accumulation import mark_tied_embeddings

        mark_tied_embeddings(model)
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


def forward(
    model: nn.Module,
    *,
    tokens: Tensor,
    position_ids: Tensor,
    packed_seq_params: Any = None,
    vision: VisionInputs | None = None,
    head: Head | None = None,
) -> Any:
    """Run one model chunk on one micro-batch, as a pipeline schedule's forward step does.

    Args:
        model: a chunk that `load` returned, bare or wrapped (data parallel, half precision).
        tokens: int64 [batch, sequence]; [1, total] for a packed batch.
        position_ids: int64 [batch, sequence], counted within each sequence; for a vision-language model
            [3, batch, sequence] from `mrope_position_ids` (positions of padding do not matter). On every stage.
        packed_seq_params: Megatron-Core's `PackedSeqParams` of a packed batch. On every stage.
        vision: the images and videos whose placeholders are in `tokens`. Only the first stage reads them, so the
            others may pass None.
        head: what to make of the logits, which it gets in Megatron-Core's order, without the copy of so large a tensor
            into the other one.

    Returns:
        On the last pipeline stage what `head` returns, without one logits [batch, sequence, padded vocabulary / TP] in
        the model's dtype; on the others what the schedule sends on.

    Raises:
        ModelError: the placeholders in `tokens` are not as many as the features of `vision`.
    """
    arguments: dict[str, Any] = {} if vision is None else {"vision": vision}
    if getattr(model, "config").params_dtype.itemsize == 2:  # noqa: B009 - the class declares no such attribute
        # The half-precision wrapper would copy the logits to fp32; a loss reads them so piece by piece.
        arguments["fp32_output"] = False
    if head is not None:
        arguments["output_processor"] = partial(_apply_head, head)
    return model(tokens, position_ids, attention_mask=None, packed_seq_params=packed_seq_params, **arguments)


def _apply_head(
    head: Head,
    *,
    hidden_states: Tensor,
    output_layer: nn.Module,
    output_weight: Tensor | None,
    scale_logits: Callable[[Tensor], Tensor],
    **_: Any,
) -> Any:
    """Megatron-Core's `output_processor`."""
    logits, _bias = output_layer(hidden_states, weight=output_weight)
    return head(scale_logits(logits))


def export(model: list[nn.Module], handle: ModelHandle) -> Iterator[tuple[str, Tensor]]:
    """Stream the weights under their HuggingFace names, gathered from all ranks, one tensor at a time.

    Collective: every rank must run the iterator to its end, and every rank gets every tensor, on the model's device
    and in its dtype. At most one HuggingFace tensor and the shards it is made from exist beside the model. Padding
    rows of the vocabulary are cut off; tied embeddings come once, as they lie in the source directory. A tensor may be
    a view of a parameter, which changes with it: copy what is kept.

    Args:
        model: the chunks that `load` returned, bare or wrapped (data parallel, half precision).
        handle: as `load` returned it.

    Raises:
        ModelError: the memory of the weights has been freed.
    """
    for name, blocks in export_blocks(model, handle):
        yield name, join_blocks(blocks)


def export_blocks(model: list[nn.Module], handle: ModelHandle) -> Iterator[tuple[str, list[Tensor]]]:
    """The same, each tensor as blocks of its rows, in order.

    Without model parallelism these are views of parameters but for what Megatron-Bridge must convert, even of a fused
    attention, which has queries, keys and values of a group next to each other: a block for each group.
    """
    with torch.no_grad():
        yield from handle.bridge.stream_blocks(model, handle.vocab_size)
