"""Operations a second, and their share of a GPU's peak."""

from pathlib import Path

import pytest
import torch
from mbridge_config import HFFacts
from mbridge_config.schema.sft import SFTModelConfig
from mbridge_train.engine.batch import Sample
from mbridge_train.engine.throughput import Throughput, peak_tflops

FACTS = HFFacts(
    directory=Path(),
    architectures=("Qwen2ForCausalLM",),
    model_type="qwen2",
    num_layers=2,
    hidden_size=8,
    num_attention_heads=2,
    num_query_groups=1,
    head_dim=4,
    ffn_hidden_size=12,
    vocab_size=10,
)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("Tesla T4", None),
    ],
)
def test_peak(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_metrics_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    throughput = Throughput(FACTS, SFTModelConfig())
    batch = [Sample(tokens=torch.zeros(n, dtype=torch.int64), weights=torch.zeros(n)) for n in (3, 5)]
    layer = 8 * (8 + 4 + 4 + 8) + 3 * 8 * 12
    operations = 6 * 8 * (2 * layer + 8 * 10) + 6 * 2 * 8 * (9 + 25)
    assert throughput.metrics(batch, 0.5) == {"tflops_per_second": pytest.approx(operations / 0.5 / 2 / 1e12)}
    throughput.peak = 4e-6
    found = throughput.metrics(batch, 0.5)
    assert found["mfu"] == pytest.approx(found["tflops_per_second"] / 4e-6)
