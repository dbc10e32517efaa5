"""Real Megatron-Core trains a GPT on gloo and CPUs: every layout takes the steps that one process takes."""

import hashlib
import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from testing.gang import Gang, WorkerPool

VOCABULARY, SEQUENCE, LAYERS, MICRO_BATCHES, STEPS = 64, 13, 4, 4, 3


@dataclass(kw_only=True, slots=True)
class Case:
    """A layout and a precision, as Megatron's own configurations name them."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    virtual: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Steps:
    """The log of a run: the same on every rank, whatever the layout."""

    losses: list[float]
    gradient_norms: list[float]
    zeros: list[int | None]


DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 3000}
MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_token_dispatcher_type": "alltoall", "add_bias_linear": False}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
DROPOUT = {"attention_dropout": 0.1, "hidden_dropout": 0.1}


def train(case: Case) -> Steps:
    """Train on this process group: `MICRO_BATCHES` micro-batches of 2 a step, split over the data-parallel ranks."""
    from mbridge_model.patches.cpu import enable_cpu

    enable_cpu()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=case.tensor,
        pipeline_model_parallel_size=case.pipeline,
        virtual_pipeline_model_parallel_size=case.virtual,
        expert_model_parallel_size=case.expert,
        expert_tensor_parallel_size=1,
    )
    try:
        model_parallel_cuda_manual_seed(7)
        return _train(case)
    finally:
        parallel_state.destroy_model_parallel()


def _train(case: Case) -> Steps:
    from megatron.core import parallel_state
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    chunks = build(case)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            **{
                "optimizer": "adam",
                "lr": 1e-2,
                "weight_decay": 0.1,
                "clip_grad": 1.0,
                "log_num_zeros_in_grad": True,
                "use_distributed_optimizer": case.data.get("use_distributed_optimizer", False),
                "overlap_param_gather": case.data.get("overlap_param_gather", False),
            }
            | case.optimizer
        ),
        chunks,
    )
    config = chunks[0].config
    config.grad_scale_func = optimizer.scale_loss
    forward_backward = get_forward_backward_func()
    local_micro_batches = MICRO_BATCHES // parallel_state.get_data_parallel_world_size()
    steps = Steps(losses=[], gradient_norms=[], zeros=[])
    for step in range(STEPS):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        first = parallel_state.get_data_parallel_rank() * local_micro_batches
        micro_batches = [micro_batch(step, first + index) for index in range(local_micro_batches)]
        losses = forward_backward(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in chunks],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=local_micro_batches,
            seq_length=SEQUENCE,
            micro_batch_size=2,
            decoder_seq_length=SEQUENCE,
        )
        successful, gradient_norm, zeros = optimizer.step()
        assert successful
        steps.losses.append(mean_loss(losses))
        steps.gradient_norms.append(float(gradient_norm))
        steps.zeros.append(None if zeros is None else int(zeros))
    return steps


def build(case: Case) -> list[Any]:
    """Model chunks of this rank, wrapped for data parallelism, with weights that no layout changes."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    config = TransformerConfig(
        **{
            "num_layers": LAYERS,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "ffn_hidden_size": 48,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "tensor_model_parallel_size": case.tensor,
            "pipeline_model_parallel_size": case.pipeline,
            "virtual_pipeline_model_parallel_size": case.virtual,
            "expert_model_parallel_size": case.expert,
            "expert_tensor_parallel_size": 1,
            "pipeline_dtype": torch.float32,
            "attention_backend": None,
            "gradient_accumulation_fusion": False,
            "bias_dropout_fusion": True,  # one of the functions that Megatron-Core hands to torch.compile
            "finalize_model_grads_func": finalize_model_grads,
            "deallocate_pipeline_outputs": True,
        }
        | case.model
    )
    chunks = []
    for stage in range(case.virtual or 1):
        virtual_stage = stage if case.virtual else None
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual_stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual_stage)
        spec = get_gpt_layer_local_spec(config.num_moe_experts, config.moe_grouped_gemm, normalization="LayerNorm")
        chunk: Any = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=VOCABULARY,
            max_sequence_length=SEQUENCE,
            pre_process=first,
            post_process=last,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=True,
            vp_stage=virtual_stage,
        )
        fill(chunk, case)
        if config.bf16 or config.fp16:
            chunk = Float16Module(config, chunk)
        chunks.append(
            DistributedDataParallel(
                config=config,
                ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True, **case.data),
                module=chunk,
                disable_bucketing=stage > 0,
            )
        )
    config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    for chunk in chunks:
        chunk.broadcast_params()
    return chunks


def fill(chunk: Any, case: Case) -> None:
    """Give each parameter the part that this rank holds of a tensor that depends on the parameter's name alone."""
    from megatron.core import parallel_state

    layers = {f"decoder.layers.{index}.": layer.layer_number for index, layer in enumerate(chunk.decoder.layers)}
    for name, parameter in chunk.named_parameters():
        for prefix, number in layers.items():
            if name.startswith(prefix):
                name = f"layer {number}: {name.removeprefix(prefix)}"
        expert = ".local_experts." in name
        if expert:
            before, index, rest = name.partition(".local_experts.")[0], *name.split(".local_experts.")[1].split(".", 1)
            local_experts = 4 // parallel_state.get_expert_model_parallel_world_size()
            number = parallel_state.get_expert_model_parallel_rank() * local_experts + int(index)
            name = f"{before}: expert {number}: {rest}"
        if name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        parts = 1
        if getattr(parameter, "tensor_model_parallel", False) and not expert:
            parts = case.tensor
        dimension = parameter.partition_dim if parts > 1 else 0
        shape = list(parameter.shape)
        shape[dimension] *= parts
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6])
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1
        if "layernorm" in name and name.endswith("weight"):
            whole += 1.0
        rank = parallel_state.get_tensor_model_parallel_rank() if parts > 1 else 0
        parameter.data.copy_(whole.chunk(parts, dim=dimension)[rank])


def micro_batch(step: int, index: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + index)
    tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE + 1), generator=generator)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}


def forward_step(data_iterator: Any, model: Any) -> tuple[Tensor, Any]:
    from megatron.core.transformer.utils import get_default_causal_mask

    batch = next(data_iterator)
    positions = torch.arange(SEQUENCE).expand_as(batch["tokens"])
    mask = get_default_causal_mask(SEQUENCE)
    return model(batch["tokens"], positions, mask, labels=batch["labels"]), partial(mean_over_tokens)


def mean_over_tokens(token_losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = token_losses.float().mean()
    return loss, {"loss": loss.detach().clone()}  # the schedule divides `loss` in place


def mean_loss(losses: list[dict[str, Tensor]]) -> float:
    """Mean over the micro-batches of all ranks; only last pipeline stages have any."""
    from megatron.core import parallel_state

    sums = torch.tensor([sum(float(loss["loss"]) for loss in losses), float(len(losses))])
    torch.distributed.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    return float(sums[0] / sums[1])


def assert_equal_steps(found: list[Steps], expected: Steps, tolerance: float = 1e-5) -> None:
    for steps in found:
        assert steps.losses == pytest.approx(expected.losses, abs=tolerance)
        assert steps.gradient_norms == pytest.approx(expected.gradient_norms, abs=tolerance)
        assert steps.zeros == expected.zeros


@pytest.fixture(scope="module")
def gang1(worker_pool: WorkerPool) -> Gang:
    return Gang(1, worker_pool)


@pytest.fixture(scope="module")
def one_process(gang1: Gang) -> Steps:
    return gang1.run(train, Case())[0]


def test_one_process_learns(one_process: Steps) -> None:
    # An untrained model is as good as chance, ln 64; the gradient is far from zero, so that norms can be compared.
    assert one_process.losses[0] == pytest.approx(torch.tensor(float(VOCABULARY)).log().item(), abs=0.5)
    assert min(one_process.gradient_norms) > 0.1


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(tensor=2), id="tensor"),
        pytest.param(Case(pipeline=2), id="pipeline"),
        pytest.param(
            Case(pipeline=2, model={"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}),
            id="pipeline-variable-lengths",
        ),
        pytest.param(
            Case(pipeline=2, virtual=2, model={"overlap_p2p_comm": True, "batch_p2p_comm": False}),
            id="interleaved-pipeline",
        ),
        pytest.param(Case(), id="data"),
        pytest.param(Case(data=DISTRIBUTED), id="distributed-optimizer"),
        pytest.param(Case(data=DISTRIBUTED | OVERLAP), id="distributed-optimizer-overlap"),
        pytest.param(Case(tensor=2, model=RECOMPUTE), id="tensor-recompute"),
    ],
)
def test_two_ranks_take_the_steps_of_one(gang2: Gang, one_process: Steps, case: Case) -> None:
    assert_equal_steps(gang2.run(train, case), one_process)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(tensor=2, pipeline=2), id="tensor-pipeline"),
        pytest.param(Case(tensor=2, data=DISTRIBUTED | OVERLAP), id="tensor-data"),
        pytest.param(Case(pipeline=2, data=DISTRIBUTED), id="pipeline-data"),
    ],
)
def test_four_ranks_take_the_steps_of_one(gang4: Gang, one_process: Steps, case: Case) -> None:
    assert_equal_steps(gang4.run(train, case), one_process)


def train_and_log(case: Case) -> tuple[Steps, list[str]]:
    """Also returns what Megatron's random-number tracker warned of."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.addHandler(handler)
    try:
        return train(case), records
    finally:
        logger.removeHandler(handler)


def test_dropout_is_the_same_when_recomputed(gang2: Gang, one_process: Steps) -> None:
    plain = gang2.run(train_and_log, Case(tensor=2, model=DROPOUT))
    recomputed = gang2.run(train_and_log, Case(tensor=2, model=DROPOUT | RECOMPUTE))
    assert plain == recomputed  # to the bit: the same kernels on the same numbers
    assert [warnings for _, warnings in plain] == [[], []]
    assert plain[0][0].losses != pytest.approx(one_process.losses, abs=1e-3)


@pytest.mark.parametrize("data", [{}, DISTRIBUTED, DISTRIBUTED | OVERLAP], ids=["replicated", "sharded", "overlapped"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(gang2: Gang, one_process: Steps, precision: str, data: dict[str, Any]) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    half = {precision: True, "params_dtype": dtype}
    case = Case(data=data, model=half | {"pipeline_dtype": dtype}, optimizer=half | {"initial_loss_scale": 2.0**10})
    found = gang2.run(train, case)
    for steps in found:
        assert steps.losses == pytest.approx(one_process.losses, rel=5e-3)
        assert steps.gradient_norms == pytest.approx(one_process.gradient_norms, rel=5e-2)


def test_experts_on_two_ranks(gang1: Gang, gang2: Gang) -> None:
    expected = gang1.run(train, Case(model=MOE))[0]
    assert_equal_steps(gang2.run(train, Case(expert=2, model=MOE, data=DISTRIBUTED)), expected)
