"""The parallel layout, and the names of directories and files inside a checkpoint.

checkpoints/
  latest -> global_step_10
  global_step_10/
    manifest.json
    actor/latest_checkpointed_iteration.txt
    actor/iter_0000010/mp_rank_00/{model_optim_rng.pt,distrib_optim.pt}
    actor/hf_model/...
    state/rank_00000.pt
"""

import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mbridge_ckpt.errors import CheckpointError, LayoutError

MANIFEST_FILE = "manifest.json"
LATEST_LINK = "latest"
TRACKER_FILE = "actor/latest_checkpointed_iteration.txt"
HF_DIRECTORY = "actor/hf_model"
_STEP_DIRECTORY = re.compile(r"global_step_(0|[1-9][0-9]{0,17})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Sizes of the parallel groups that wrote a checkpoint.

    `virtual_pipeline` is the number of model chunks on each pipeline stage (1: no interleaving);
    `expert_tensor` the tensor-parallel size inside an expert.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            size = getattr(self, field.name)
            if type(size) is not int or size < 1:
                raise LayoutError(f"layout: {field.name} is {size!r}; it must be an integer of at least 1")

    def __str__(self) -> str:
        """Return `TP 2, PP 1, DP 4` and the other sizes that are not 1."""
        always = f"TP {self.tensor}, PP {self.pipeline}, DP {self.data}"
        others = {"VPP": self.virtual_pipeline, "CP": self.context, "EP": self.expert, "expert TP": self.expert_tensor}
        return always + "".join(f", {name} {size}" for name, size in others.items() if size > 1)

    def to_json(self) -> dict[str, int]:
        """Return the sizes by name, all of them."""
        return asdict(self)


def step_directory(step: int) -> str:
    """Return the name of a committed checkpoint, `global_step_10`."""
    if type(step) is not int or step < 0:
        raise ValueError(f"step must be a non-negative integer, not {step!r}")
    return f"global_step_{step}"


def step_of(name: str) -> int | None:
    """Return the step of a committed checkpoint's name; None for any other name, leading zeros included."""
    match = _STEP_DIRECTORY.fullmatch(name)
    return int(match.group(1)) if match else None


def mp_rank_directory(layout: Layout, *, tensor_rank: int, pipeline_rank: int = 0, expert_rank: int = 0) -> str:
    """Return Megatron-LM's name for a model-parallel rank: mp_rank_TT, mp_rank_TT_PPP or mp_rank_TT[_PPP]_EEE.

    The pipeline and expert parts appear only where that kind of parallelism is used.
    """
    name = f"mp_rank_{tensor_rank:02d}"
    if layout.pipeline > 1:
        name += f"_{pipeline_rank:03d}"
    if layout.expert > 1:
        name += f"_{expert_rank:03d}"
    return name


def iteration_directory(step: int) -> str:
    """Return the relative path of the Megatron part of a checkpoint."""
    return f"actor/iter_{step:07d}"


def model_file(step: int, layout: Layout, *, tensor_rank: int, pipeline_rank: int = 0, expert_rank: int = 0) -> str:
    """Return the relative path of a model-parallel rank's weights and iteration."""
    rank = mp_rank_directory(layout, tensor_rank=tensor_rank, pipeline_rank=pipeline_rank, expert_rank=expert_rank)
    return f"{iteration_directory(step)}/{rank}/model_optim_rng.pt"


def optimizer_file(step: int, layout: Layout, *, tensor_rank: int, pipeline_rank: int = 0, expert_rank: int = 0) -> str:
    """Return the relative path of a model-parallel rank's optimizer state by parameter name."""
    rank = mp_rank_directory(layout, tensor_rank=tensor_rank, pipeline_rank=pipeline_rank, expert_rank=expert_rank)
    return f"{iteration_directory(step)}/{rank}/distrib_optim.pt"


def rank_state_file(rank: int) -> str:
    """Return the relative path of the state that one rank of the job needs to go on, such as its random streams."""
    return f"state/rank_{rank:05d}.pt"


def refuse_inside_checkpoint(path: Path) -> None:
    """Raise CheckpointError if a new file or directory `path` would lie in a committed checkpoint."""
    real = Path(os.path.realpath(path))
    for place in (real, *real.parents):
        if step_of(place.name) is not None and (place / MANIFEST_FILE).exists():
            raise CheckpointError(f"{path} lies inside the checkpoint {place}; give a directory outside of it")
