"""transformers under torch's `fully_shard` as a side of a benchmark."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from one_side import BETAS, CLIP_GRAD, EPSILON, LEARNING_RATE, WEIGHT_DECAY, Example
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

# Inputs of a micro-batch in pinned memory, and its share of the trained tokens in the global batch.
MicroBatches = list[tuple[dict[str, Tensor], float]]


def load_model(auto: Any, settings: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """Return the model of `settings["directory"]` in `dtype`, with its weights or with new random ones."""
    if settings.get("lengths") != "fixed":
        # Torch's first choice on Hopper, which plans each new length for 0.15 s, longer than such a micro-batch takes.
        torch.backends.cuda.enable_cudnn_sdp(False)
    options = {"dtype": dtype, "attn_implementation": settings["attention"]}
    if settings["same_weights"]:
        model = auto.from_pretrained(settings["directory"], **options).to(device)
    else:
        with device:
            torch.manual_seed(0)
            model = auto.from_config(transformers.AutoConfig.from_pretrained(settings["directory"]), **options)
    model.config.use_cache = False
    return model


class Fsdp2Trainer:
    """Shard fp32 weights block by block, compute in `settings["dtype"]`, and optimize with fused AdamW.

    Args:
        model: a model of transformers with fp32 parameters.
        blocks: the lists of layers in `model`.
    """

    def __init__(
        self, model: Any, blocks: Iterable[torch.nn.ModuleList], settings: dict[str, Any], device: torch.device
    ) -> None:
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        self.model, self.device, self.keep_gathered = model.train(), device, settings["keep_gathered"]
        # Gradients are reduced and accumulated in fp32.
        sharding: dict[str, Any] = {
            "mesh": torch.distributed.device_mesh.init_device_mesh(device.type, (1,)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=settings["dtype"], reduce_dtype=torch.float32),
            "reshard_after_forward": not self.keep_gathered,
        }
        for layers in blocks:
            for number, block in enumerate(layers):
                # Inside the sharded module, as torch recommends; transformers' switch would gather weights once more.
                layers[number] = checkpoint_wrapper(block, preserve_rng_state=False) if settings["recompute"] else block
                fully_shard(layers[number], **sharding)
        fully_shard(model, **sharding)
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
                {"params": [p for p in self.parameters if p.dim() == 1], "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE,
            betas=BETAS,
            eps=EPSILON,
            fused=True,
        )

    def step(self, micro_batches: MicroBatches) -> tuple[float, float]:
        """Run an optimizer step over the mean of all trained tokens, and return its loss and gradient norm."""
        total = torch.zeros((), device=self.device)
        for number, (inputs, weight) in enumerate(micro_batches):
            # Gradients are accumulated locally and reduced once, in the last backward pass.
            self.model.set_requires_gradient_sync(not self.keep_gathered or number == len(micro_batches) - 1)
            moved = {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}
            loss = self.model(**moved, use_cache=False).loss * weight
            loss.backward()
            total += loss.detach()
        grad_norm: Any = torch.nn.utils.clip_grad_norm_(self.parameters, CLIP_GRAD)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total.item(), grad_norm.full_tensor().item()


def make_micro_batches(
    size: int, collate: Callable[[list[Any]], dict[str, Tensor]], device: torch.device, batch: list[Any]
) -> MicroBatches:
    """Return micro-batches of `size` samples in pinned memory, as a DataLoader would.

    Samples of similar length share a micro-batch, as with the Trainer's `group_by_length`.
    """
    ordered = sorted(batch, key=lambda example: -len(example.tokens))
    parts = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    trained = sum(int(example.trained.sum()) for example in batch)
    return [
        (
            {name: pin(value, device) for name, value in collate(part).items()},
            sum(int(example.trained.sum()) for example in part) / trained,
        )
        for part in parts
    ]


def collate_tokens(part: list[Example]) -> dict[str, Tensor]:
    """Return tokens, labels and mask, padded to the longest, without the mask if nothing is padded."""
    pad = torch.nn.utils.rnn.pad_sequence
    labels = [example.tokens.where(example.trained, -100) for example in part]
    mask = pad([torch.ones_like(example.tokens) for example in part], batch_first=True)
    inputs = {
        "input_ids": pad([example.tokens for example in part], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }
    return inputs if bool(mask.all()) else inputs | {"attention_mask": mask}


def pin(value: Tensor, device: torch.device) -> Tensor:
    return value.pin_memory() if device.type == "cuda" else value
