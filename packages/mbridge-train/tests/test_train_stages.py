"""The plan that a config's check prints is how the model is built: the two packages do not import each other."""

import itertools

from mbridge_config.stages import stage_sizes
from mbridge_model.vision.stages import deepstack_stage_sizes


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
