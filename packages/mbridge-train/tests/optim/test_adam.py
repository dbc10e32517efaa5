"""Adam against torch's, alone and in Megatron-Core's distributed optimizer, where a resumed run must not differ."""

import copy
from typing import Any

import pytest
import torch
from mbridge_train.optim.adam import ADAM, Adam, enable_adam
from torch import Tensor

from testing.gang import Gang
from testing.patch_tables import check_table

SIZES = [(), (1,), (7,), (3, 11), (65, 33), (0,)]
HYPER = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).requires_grad_() for size in SIZES]


def run(optimizer: torch.optim.Optimizer, tensors: list[Tensor], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(1 + step)
        for tensor in tensors:
            tensor.grad = torch.randn(tensor.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("adam_w_mode", [True, False])
def test_five_steps_are_those_of_torch(adam_w_mode: bool) -> None:
    reference_class = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
    mine, fused, plain = parameters(), parameters(), parameters()
    optimizer = Adam(mine, adam_w_mode=adam_w_mode, **HYPER)
    run(optimizer, mine, range(5))
    run(reference_class(fused, fused=True, **HYPER), fused, range(5))
    run(reference_class(plain, foreach=False, **HYPER), plain, range(5))
    for one, other, third in zip(mine, fused, plain, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, third, rtol=0, atol=5e-7)
    assert optimizer.param_groups[0]["step"] == 5
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in optimizer.state.values())


def test_dtypes_and_groups_in_one_step() -> None:
    tensors = parameters()
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in parameters()]
    optimizer = Adam([{"params": tensors + halves, "lr": 1e-2}, {"params": [], "weight_decay": 0.0}])
    for tensor in tensors + halves:
        tensor.grad = torch.ones_like(tensor)
    before = [tensor.detach().clone() for tensor in tensors + halves]
    optimizer.step()
    for tensor, old in zip(tensors + halves, before, strict=True):
        # The first step of Adam is the learning rate, whatever the gradient.
        tolerance = 2e-2 if tensor.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(tensor.float(), old.float() - 1e-2, atol=tolerance, rtol=0)
    assert [group["step"] for group in optimizer.param_groups] == [1, 1]  # also of a group that is empty on this rank
    assert optimizer.state[halves[3]]["exp_avg"].dtype == torch.bfloat16


def test_state_round_trip_continues_to_the_bit() -> None:
    whole, first = parameters(), parameters()
    run(Adam(whole, **HYPER), whole, range(5))
    saved = Adam(first, **HYPER)
    run(saved, first, range(3))
    state = copy.deepcopy(saved.state_dict())
    second = [tensor.detach().clone().requires_grad_() for tensor in first]
    resumed = Adam(second, lr=99.0)
    resumed.load_state_dict(state)
    run(resumed, second, range(3, 5))
    assert all(torch.equal(one, other) for one, other in zip(whole, second, strict=True))


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"lr": -1.0}, "lr is -1.0"), ({"betas": (0.9, 1.0)}, "betas are"), ({"capturable": True}, "capturable is True")],
)
def test_bad_settings(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adam(parameters(), **setting)


def resume(precision: str | None) -> tuple[list[float], list[float], int]:
    """Runs in a worker: loss after each of four steps, the last two of which are taken again by a resumed run."""
    from mbridge_model.patches.cpu import enable_cpu
    from megatron.core import parallel_state

    enable_cpu()
    enable_adam()
    enable_adam()
    parallel_state.initialize_model_parallel()
    try:
        model, optimizer = build(seed=1, precision=precision)
        losses = [step(model, optimizer, index) for index in range(2)]
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), optimizer.get_parameter_state_dp_zero()))
        losses += [step(model, optimizer, index) for index in range(2, 4)]
        fresh_model, fresh_optimizer = build(seed=2, precision=precision)
        fresh_model.load_state_dict(saved[0])
        fresh_optimizer.load_state_dict(saved[1])
        with torch.no_grad():
            fresh_optimizer.load_parameter_state_from_dp_zero(saved[2])
        resumed = [step(fresh_model, fresh_optimizer, index) for index in range(2, 4)]
        steps = {group["step"] for group in saved[1]["optimizer"]["param_groups"]}
        return losses, resumed, steps.pop() if len(steps) == 1 else -1
    finally:
        parallel_state.destroy_model_parallel()


def build(seed: int, precision: str | None) -> tuple[Any, Any]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=12, num_attention_heads=1, bf16=precision == "bf16")
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(12, 37), torch.nn.Tanh(), torch.nn.Linear(37, 5))
    module = module.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config=config, ddp_config=ddp_config, module=module)
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        weight_decay=0.1,
        clip_grad=1.0,
        bf16=config.bf16,
        params_dtype=next(module.parameters()).dtype,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(optimizer_config, [model])
    assert type(optimizer.chained_optimizers[0].optimizer) is Adam
    return model, optimizer.chained_optimizers[0]


def step(model: Any, optimizer: Any, index: int) -> float:
    model.zero_grad_buffer()
    optimizer.zero_grad()
    inputs = torch.randn(6, 12, generator=torch.Generator().manual_seed(index)).to(next(model.parameters()).dtype)
    loss = model(inputs).float().square().mean()
    loss.backward()
    model.finish_grad_sync()
    optimizer.step()
    with torch.no_grad():
        return float(model(inputs).float().square().mean())


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_a_resumed_distributed_optimizer_takes_the_same_steps(gang2: Gang, precision: str | None) -> None:
    for losses, resumed, saved_step in gang2.run(resume, precision, timeout=200):
        assert resumed == losses[2:]
        assert losses[3] < losses[0]
        assert saved_step == 2


def check_the_table() -> None:
    """Runs in a worker: the table as any other, and with an Adam of Apex's."""
    import megatron.core.optimizer as core

    check_table(ADAM)
    was_applied = ADAM.is_applied
    ADAM.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "USING_PYTORCH_OPTIMIZER", False)
        patch.setattr(core.distrib_optimizer, "Adam", dict)
        enable_adam()
        assert core.distrib_optimizer.Adam is dict  # the faster one stays
    if was_applied:
        ADAM.apply()


def test_the_table(gang2: Gang) -> None:
    gang2.run(check_the_table, timeout=200)
