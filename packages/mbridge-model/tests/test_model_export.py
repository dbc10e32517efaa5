"""Exported weights are views of the parameters, found once: they follow the parameters wherever those go."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_model import Parallel

from testing.gang import Gang
from testing.tiny_models import make_model


def export_after_moves(directory: Path) -> Any:
    """The weights; with each parameter doubled in place; in other memory, tripled; and the error without memory."""
    from mbridge_model import ModelError, export, load
    from megatron.core import parallel_state

    model, handle = load(directory, Parallel())
    found = []

    def exported() -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in export(model, handle)}

    try:
        found.append(exported())
        with torch.no_grad():
            for parameter in model[0].parameters():
                parameter.mul_(2)
        found.append(exported())
        for parameter in model[0].parameters():
            parameter.data = parameter.data * 1.5
        found.append(exported())
        parameter.untyped_storage().resize_(0)
        with pytest.raises(ModelError) as error:
            exported()
        return found, str(error.value)
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("tied", [True, False])
def test_exported_weights_follow_their_parameters(gang2: Gang, tmp_path: Path, tied: bool) -> None:
    make_model("qwen2", tied, tmp_path)
    (first, doubled, tripled), message = gang2.run(export_after_moves, tmp_path)[0]
    for name, tensor in first.items():
        assert torch.equal(doubled[name], tensor * 2), name
        assert torch.equal(tripled[name], tensor * 2 * 1.5), name
    assert "has been freed (offloaded)" in message
