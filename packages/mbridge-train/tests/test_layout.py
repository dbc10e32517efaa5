"""The layout of ranks against the order in which Megatron-Core numbers them."""

from typing import Any

from mbridge_ckpt import Layout

from testing.gang import Gang


def layout_of(sizes: dict[str, int], experts: int | None = None, chunks: int = 1) -> dict[str, Any]:
    """Return the layout that a rank sees, for a model of `experts` and `chunks` under the given Megatron-Core sizes."""
    from mbridge_train.layout import RankLayout
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch import distributed

    parallel_state.initialize_model_parallel(**sizes)
    try:
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, num_moe_experts=experts)
        layout = RankLayout.of_model(config, chunks=chunks)
        axes = ("tensor", "pipeline", "data", "context", "data_context", "expert", "expert_tensor")
        gathered: list[Any] = [None] * layout.data.size
        distributed.all_gather_object(gathered, distributed.get_rank(), group=layout.data_gloo)
        return {
            "axes": {name: (getattr(layout, name).rank, getattr(layout, name).size) for name in axes},
            "stages": (layout.is_first_stage, layout.is_last_stage),
            "last": layout.pipeline.last_rank,
            "data": gathered,
            "checkpoint": layout.checkpoint,
        }
    finally:
        parallel_state.destroy_model_parallel()


def test_tensor_and_pipeline_axes(gang4: Gang) -> None:
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    for rank, found in enumerate(gang4.run(layout_of, sizes, chunks=2)):
        # Tensor-parallel ranks are neighbors, pipeline stages lie furthest apart.
        assert found["axes"]["tensor"] == (rank % 2, 2)
        assert found["axes"]["pipeline"] == (rank // 2, 2)
        assert found["axes"]["data"] == found["axes"]["context"] == (0, 1)
        assert found["stages"] == (rank < 2, rank >= 2)
        assert found["last"] == 2 + rank % 2
        assert found["data"] == [rank]
        assert found["checkpoint"] == Layout(tensor=2, pipeline=2, virtual_pipeline=2)


def test_context_expert_and_data_axes(gang4: Gang) -> None:
    sizes = {
        "context_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    }
    for rank, found in enumerate(gang4.run(layout_of, sizes, experts=2)):
        assert found["axes"]["context"] == (rank % 2, 2)
        assert found["axes"]["data"] == (rank // 2, 2)
        assert found["axes"]["data_context"] == (rank, 4)
        assert found["axes"]["expert"] == (rank % 2, 2)
        assert found["stages"] == (True, True)
        assert found["data"] == [rank % 2, rank % 2 + 2]
        assert found["checkpoint"] == Layout(data=2, context=2, expert=2)


def test_tensor_ranks_share_an_expert(gang2: Gang) -> None:
    for found in gang2.run(layout_of, {"tensor_model_parallel_size": 2}, experts=2):
        assert found["checkpoint"] == Layout(tensor=2, expert_tensor=2)
