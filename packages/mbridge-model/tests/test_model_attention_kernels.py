"""Which attention kernel torch tries first. What each costs is measured on GPUs alone (docs/performance-log.md)."""

import pytest
import torch
from mbridge_model.attention_kernels import attention_kernels
from torch.nn.attention import SDPBackend, sdpa_kernel

CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION


def order() -> list[int]:
    return list(torch._C._get_sdp_priority_order())


@pytest.mark.parametrize(("plans", "first"), [(True, CUDNN), (False, FLASH)])
def test_what_comes_first_whatever_torch_prefers(plans: bool, first: SDPBackend) -> None:
    for preferred in ([CUDNN, FLASH], [FLASH, CUDNN]):  # as on Hopper and later, and before
        with sdpa_kernel(preferred, set_priority=True):
            before = order()
            with attention_kernels(plans=plans):
                assert order()[0] == int(first)
                # Math can do everything, so nothing behind it is ever taken.
                assert order().index(int(CUDNN)) < order().index(int(SDPBackend.MATH))
            assert order() == before
