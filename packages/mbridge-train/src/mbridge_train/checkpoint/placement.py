"""What one rank of a run holds: its place among the ranks, its tensors by name, and where they stand in the model."""

from mbridge_ckpt import Layout, ParameterPlacement, place_parameter
from torch import Tensor, nn

from mbridge_train.engine.engine import Engine


def current_layout(engine: Engine) -> Layout:
    """Sizes of the process groups of this run."""
    return engine.layout.checkpoint


def model_parallel_ranks(engine: Engine) -> dict[str, int]:
    """This rank's place, as the functions of `mbridge_ckpt` that name files take it."""
    return {"tensor_rank": engine.layout.tensor.rank, "pipeline_rank": engine.layout.pipeline.rank}


def is_first_data_rank(engine: Engine) -> bool:
    """Whether this is the data-parallel rank that writes what all of them hold alike."""
    return engine.layout.data.is_first


def model_state(engine: Engine) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name: live tensors. Transformer Engine's fp8 metadata is left out."""
    state = unwrapped(engine).state_dict(keep_vars=False)
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and "_extra_state" not in name}


def parameter_names(engine: Engine) -> dict[nn.Parameter, str]:
    """The trainable parameters of this rank and their names."""
    return {parameter: name for name, parameter in unwrapped(engine).named_parameters() if parameter.requires_grad}


def placements(engine: Engine) -> list[ParameterPlacement]:
    """Where each parameter of this rank stands in the whole model, for reading it under another layout."""
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    offset = get_transformer_layer_offset(engine.config)
    tied = engine.config.share_embeddings_and_output_weights
    gated = engine.config.gated_linear_unit
    vision = engine.handle.family.vision
    found = []
    for name, parameter in unwrapped(engine).named_parameters():
        in_tower = vision is not None and name.startswith(f"{vision.tower}.")
        is_embedding = name.endswith("embedding.word_embeddings.weight")
        output_name = name.replace("embedding.word_embeddings", "output_layer")
        found.append(
            place_parameter(
                name,
                parameter,
                stage="first" if in_tower or is_embedding else "last",
                layer_offset=offset,
                # Megatron-Core does not mark the fused gate and up projection on every path.
                partition_stride=2 if ".linear_fc1." in name and not in_tower and gated else None,
                vocabulary_rows=engine.handle.vocab_size
                if is_embedding or name.endswith("output_layer.weight")
                else None,
                last_stage_copy=output_name if tied and is_embedding else None,
            )
        )
    return found


def unwrapped(engine: Engine) -> nn.Module:
    """The bare Megatron model of this rank, inside data-parallel and half-precision wrappers."""
    return engine.chunks[0]
