"""Which attention kernel torch may take. What each costs is measured on GPUs alone (docs/performance-log.md)."""

from contextlib import suppress

import pytest
import torch
from mbridge_model.kernels.attention import cudnn_attention_first, no_cudnn_attention
from torch.nn.attention import SDPBackend


@pytest.mark.parametrize("before", [True, False])
def test_without_cudnn(before: bool) -> None:
    was = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with suppress(KeyError), no_cudnn_attention():
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            raise KeyError
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was)


def test_cudnn_first() -> None:
    before = torch._C._get_sdp_priority_order()
    with cudnn_attention_first():
        assert torch._C._get_sdp_priority_order()[0] == int(SDPBackend.CUDNN_ATTENTION)
        assert torch.backends.cuda.cudnn_sdp_enabled()
    assert torch._C._get_sdp_priority_order() == before
