"""The tensors that one rank saves and loads: their names, and where they stand in the whole model."""

from collections.abc import Iterator

from mbridge_ckpt import ParameterPlacement, place_parameter
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from mbridge_train.engine.engine import Engine


def model_parallel_ranks(engine: Engine) -> dict[str, int]:
    """Return this rank's place, as the functions of `mbridge_ckpt` that name files take it."""
    return {"tensor_rank": engine.layout.tensor.rank, "pipeline_rank": engine.layout.pipeline.rank}


def model_state(engine: Engine) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name: live tensors, without Transformer Engine's fp8 metadata."""
    return {
        prefix + name: value
        for prefix, chunk in named_chunks(engine)
        for name, value in chunk.state_dict(keep_vars=False).items()
        if isinstance(value, Tensor) and "_extra_state" not in name
    }


def parameter_names(engine: Engine) -> dict[nn.Parameter, str]:
    """Return the trainable parameters of this rank and their names."""
    return {
        parameter: prefix + name
        for prefix, chunk in named_chunks(engine)
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad
    }


def placements(engine: Engine) -> list[ParameterPlacement]:
    """Return where each parameter of this rank stands in the whole model, for reading it under another layout."""
    tied = engine.config.share_embeddings_and_output_weights
    gated = engine.config.gated_linear_unit
    vision = engine.handle.family.vision
    found = []
    for number, (prefix, chunk) in enumerate(named_chunks(engine)):
        stage = number if engine.layout.virtual_pipeline > 1 else None
        offset = get_transformer_layer_offset(engine.config, stage, engine.layout.pipeline.rank)
        for name, parameter in chunk.named_parameters():
            in_tower = vision is not None and name.startswith(f"{vision.tower}.")
            is_embedding = name.endswith("embedding.word_embeddings.weight")
            output_name = name.replace("embedding.word_embeddings", "output_layer")
            has_vocabulary = is_embedding or name.endswith("output_layer.weight")
            found.append(
                place_parameter(
                    name,
                    parameter,
                    prefix=prefix,
                    stage="first" if in_tower or is_embedding else "last",
                    layer_offset=offset,
                    # Megatron-Core does not mark the fused gate and up projection on every path.
                    partition_stride=2 if ".linear_fc1." in name and not in_tower and gated else None,
                    vocabulary_rows=engine.handle.vocab_size if has_vocabulary else None,
                    last_stage_copy=output_name if tied and is_embedding else None,
                )
            )
    return found


def named_chunks(engine: Engine) -> Iterator[tuple[str, nn.Module]]:
    """Yield the model chunks of this rank with the prefix of their names.

    The layers of every chunk are counted from 0, so the chunks of a virtual pipeline need prefixes to differ.
    """
    for number, chunk in enumerate(engine.chunks):
        yield f"chunk{number}." if engine.layout.virtual_pipeline > 1 else "", chunk
