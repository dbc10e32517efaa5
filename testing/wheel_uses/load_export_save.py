"""Load HuggingFace directories into Megatron-Core, stream the weights out again, and save them: mbridge-model alone.

python load_export_save.py OUTPUT MODEL…
torchrun --nproc_per_node=2 load_export_save.py OUTPUT MODEL…    # tensor parallel over both ranks
"""

import os
import sys
from pathlib import Path

import torch
from mbridge_model import Parallel, export, load, save_hf
from safetensors.torch import load_file

output, *directories = map(Path, sys.argv[1:])
parallel = Parallel(tensor=int(os.environ.get("WORLD_SIZE", "1")))
for directory in directories:
    model, handle = load(directory, parallel)
    original = load_file(directory / "model.safetensors")
    for name, tensor in export(model, handle):  # whole tensors, on every rank
        assert torch.equal(tensor.cpu(), original[name]), f"{directory}: {name} differs"
    save_hf(model, handle, output / directory.name)
    saved = load_file(output / directory.name / "model.safetensors")
    assert all(torch.equal(saved[name], original[name]) for name in saved.keys() | original.keys())
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    print(f"rank {rank} of {ranks}: {directory.name}, {len(saved)} tensors, bit for bit", flush=True)
torch.distributed.destroy_process_group()
