"""Clipping as Megatron-Core calls it, against torch's own."""

import torch
from mbridge_model import enable_cpu

enable_cpu()

from mbridge_train.optim.multi_tensor import MULTI_TENSOR, enable_multi_tensor, l2_norm, scale  # noqa: E402

from testing.patch_tables import check_table  # noqa: E402


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((3, 5), (1,), (0,), (7,))]


def test_clips_as_torch_does() -> None:
    from megatron.core.optimizer import clip_grads

    enable_multi_tensor()
    assert (clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl) == (l2_norm, scale)
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients()]
    for parameter, gradient in zip(parameters, gradients(), strict=True):
        parameter.grad = gradient.clone()
    expected = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    own = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients()]
    for parameter, gradient in zip(own, gradients(), strict=True):
        parameter.grad = gradient
    norm, _ = l2_norm(1, torch.zeros(1), [gradients()], False)
    assert norm.shape == (1,) and float(norm) == float(expected)
    clip_grads.clip_grad_by_total_norm_fp32(own, 0.5, float(norm))
    for parameter, reference in zip(own, parameters, strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-6, atol=0)


def test_a_rank_without_gradients() -> None:
    scale(1, torch.zeros(1), [[], []], 0.5)


def test_the_table() -> None:
    enable_multi_tensor()
    check_table(MULTI_TENSOR)
