"""The plan that a config's check prints is how the model is built: the two packages do not import each other."""

import itertools

from mbridge_config.plan.stages import stage_sizes
from mbridge_model.vision.stages import deepstack_stage_sizes

from testing.gang import Gang

GIVEN = list(itertools.product(range(1, 11), range(2, 6), (None, 1, 2, 5), (None, 1, 3)))


def test_stages_of_the_plan_are_those_of_the_model() -> None:
    uneven = 0
    for layers, stages, deepstack in itertools.product(range(1, 20), range(1, 7), range(4)):
        if deepstack > layers:
            continue  # refused by both
        built = deepstack_stage_sizes(layers, stages, deepstack)
        if built is None:  # Megatron-Core's own split, which must be even
            even = None if layers % stages else (layers // stages,) * stages
            assert stage_sizes(layers, stages, deepstack) == even
        else:
            assert stage_sizes(layers, stages, deepstack) == tuple(built)
            uneven += len(set(built)) > 1
    assert uneven > 20


def megatron_sizes() -> list[tuple[int, ...] | None]:
    """Layers of each stage that Megatron-Core builds for each of `GIVEN`; None where it refuses."""
    import torch
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig

    found: list[tuple[int, ...] | None] = []
    for layers, stages, first, last in GIVEN:
        try:
            config = TransformerConfig(
                num_layers=layers,
                hidden_size=8,
                num_attention_heads=2,
                pipeline_model_parallel_size=stages,
                pipeline_dtype=torch.float32,
                num_layers_in_first_pipeline_stage=first,
                num_layers_in_last_pipeline_stage=last,
            )
            found.append(tuple(get_num_layers_to_build(config, pp_rank=rank) for rank in range(stages)))
        except (AssertionError, ValueError):
            found.append(None)
    return found


def test_stages_whose_ends_are_given_are_those_of_megatron(gang2: Gang) -> None:
    built, _ = gang2.run(megatron_sizes)
    for (layers, stages, first, last), sizes in zip(GIVEN, built, strict=True):
        if sizes is not None and (min(sizes) < 1 or sum(sizes) != layers):
            sizes = None  # it builds another model then, and says nothing
        assert stage_sizes(layers, stages, first=first, last=last) == sizes
    assert 50 < sum(sizes is not None for sizes in built) < len(built)
