"""Each rank reads its own share of the safetensors file under tensor parallelism, and its own layers under pipeline
parallelism. `test_parity` shows that the weights loaded in this way are right, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_model import Parallel
from mbridge_model.bridge.read_slices import SlicedReader
from safetensors.torch import save_file

from testing.gang import Gang
from testing.tiny_models import VOCAB_SIZE, make_model


def bytes_read(directory: Path, parallel: Parallel) -> tuple[int, int, int]:
    """(bytes of slices, bytes of whole tensors, bytes of the rank's parameters without padding of the vocabulary)."""
    import safetensors
    from mbridge_model import load
    from mbridge_model.bridge import read_slices
    from mbridge_model.bridge.bridge import import_bridge

    import_bridge()  # it makes the next line possible without a GPU
    from megatron.bridge.models.hf_pretrained import state

    counted = {"slices": 0, "whole": 0}

    class CountingSlice:
        def __init__(self, found: Any) -> None:
            self.get_shape, self._found = found.get_shape, found

        def __getitem__(self, index: Any) -> Any:
            tensor = self._found[index]
            counted["slices"] += tensor.nbytes
            return tensor

    class CountingFile:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._file = safetensors.safe_open(*arguments, **options)

        def get_slice(self, name: str) -> CountingSlice:
            return CountingSlice(self._file.get_slice(name))

    load_tensors = state.SafeTensorsStateSource.load_tensors

    def counting_load(self: Any, names: list[str]) -> Any:
        tensors = load_tensors(self, names)
        counted["whole"] += sum(tensor.nbytes for tensor in tensors.values())
        return tensors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_slices, "safe_open", CountingFile)
        patch.setattr(state.SafeTensorsStateSource, "load_tensors", counting_load)
        model, _ = load(directory, parallel)
    own = 0
    for name, parameter in model[0].named_parameters():
        is_vocabulary = name.endswith(("word_embeddings.weight", "output_layer.weight"))
        own += parameter.nbytes if not is_vocabulary else parameter[0].nbytes * min(len(parameter), VOCAB_SIZE)
    return counted["slices"], counted["whole"], own


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_tensor_parallel_rank_reads_its_share(gang2: Gang, tmp_path: Path, family: str) -> None:
    model = make_model(family, False, tmp_path)
    for rank, (slices, whole, own) in enumerate(gang2.run(bytes_read, tmp_path, Parallel(tensor=2))):
        assert whole == 0
        # The vocabulary is padded: the last rank has rows that are in no file.
        assert own - 2 * 64 * 4 * 128 * rank <= slices <= own
        assert slices < 0.6 * sum(parameter.nbytes for parameter in model.parameters())


def test_a_pipeline_stage_reads_its_layers(gang2: Gang, tmp_path: Path) -> None:
    make_model("qwen2", False, tmp_path)
    for slices, whole, own in gang2.run(bytes_read, tmp_path, Parallel(pipeline=2)):
        assert whole == 0 and slices == own


@pytest.mark.parametrize("shape", [(8,), (2, 4, 1), (3, 4)])
def test_a_parameter_of_another_shape_is_left_to_megatron_bridge(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_file({"weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    reader = SlicedReader({"weight": tmp_path / "model.safetensors"}, rank=0, size=2)
    parameter = torch.zeros(shape)
    assert not reader.fill(parameter, {"whole": "weight"}, queries=1, groups=1, pads_rows=False)
    assert not parameter.any()
