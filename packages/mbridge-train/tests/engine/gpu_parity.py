"""Log probabilities on one GPU against transformers on the same GPU, on plain torch layers and Transformer Engine's.

    PYTHONPATH=. python packages/mbridge-train/tests/engine/gpu_parity.py

Run from the repository's root. Prints a line for each model, dtype, backend and batching: the largest absolute
difference, and whether the exported weights are those of the directory to the bit. Without Transformer Engine only
plain torch runs.
"""

import tempfile
from pathlib import Path
from typing import Any

import test_engine_vision
import torch
from mbridge_model import ModelError, export, load
from mbridge_train import Engine, MicroBatching, Sample
from torch import Tensor
from transformers import PreTrainedModel

from testing.tiny_models import VOCAB_SIZE, make_model, make_vision_model

LENGTHS = (1, 17, 64, 33)
SIZES = {"num_attention_heads": 8, "hidden_size": 256, "num_key_value_heads": 4}


def main() -> None:
    text = [torch.randint(VOCAB_SIZE, (length,)) for length in LENGTHS]
    for family, tied in (
        ("llama", False),
        ("qwen2", True),
        ("qwen3", False),
        ("qwen2_5_vl", True),
        ("qwen3_vl", False),
    ):
        directory = Path(tempfile.mkdtemp()) / family
        if family.endswith("vl"):
            reference = make_vision_model(family, tied, directory).cuda()
            raw = test_engine_vision.samples(family, 0)
            inputs = [test_engine_vision.reference_inputs(family, sample) for sample in raw]
            batch = test_engine_vision.make_batch(directory, 0)
        else:
            reference = make_model(family, tied, directory, **SIZES).cuda()
            inputs = [{"input_ids": tokens[None]} for tokens in text]
            batch = [Sample(tokens=tokens, weights=torch.zeros(len(tokens))) for tokens in text]
        for dtype in (torch.float32, torch.bfloat16):
            reference = reference.to(dtype)
            expected = [logprobs(reference, arguments) for arguments in inputs]
            for backend in ("torch", "te"):
                for batching in (MicroBatching(micro_batch_size=4), MicroBatching(token_budget=128)):
                    kind = "dense" if batching.token_budget is None else "packed"
                    print(family, dtype, backend, kind, compare(directory, dtype, backend, batching, batch, expected))
            reference = reference.float()


def logprobs(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """float32 [length] on the CPU; entry 0 is 0."""
    on_gpu = {name: value.cuda() for name, value in inputs.items()}
    tokens = on_gpu["input_ids"][0]
    with torch.no_grad():
        distribution = model(**on_gpu).logits[0].float().log_softmax(-1)
    return torch.cat([torch.zeros(1), distribution[:-1].gather(1, tokens[1:, None])[:, 0].cpu()])


def compare(
    directory: Path,
    dtype: torch.dtype,
    backend: str,
    batching: MicroBatching,
    batch: list[Sample],
    expected: list[Tensor],
) -> str:
    try:
        model, handle = load(directory, None, {"calculate_per_token_loss": True}, backend, dtype=dtype)
        engine = Engine(model, handle, micro_batching=batching)
        ours = engine.logprobs(batch)
    except (ModelError, ValueError) as error:  # Transformer Engine is not there, or has no kernel for this
        return f"not run: {str(error).splitlines()[0]}"
    worst = max((one - other).abs().max().item() for one, other in zip(ours, expected, strict=True))
    again, second = load(directory, None, None, "torch", dtype=dtype)
    exact = all(
        torch.equal(tensor, other)
        for (_, tensor), (_, other) in zip(export(model, handle), export(again, second), strict=True)
    )
    return f"max abs {worst:.1e}, exported weights {'equal' if exact else 'DIFFER'}"


if __name__ == "__main__":
    main()
