"""Read the directory tree that Megatron-LM writes with `--ckpt-format torch`, and infer the layout that wrote it.

SRC/latest_checkpointed_iteration.txt names SRC/iter_NNNNNNN or SRC/release; which holds mp_rank_TT[_PPP][_EEE] for
each tensor, pipeline and expert rank, with model_optim_rng.pt and, with the distributed optimizer, distrib_optim.pt.
Here a stage is a model chunk: with virtual pipelining (`model0`, `model1`, …) each pipeline rank has several, and the
layers of the whole model run through chunk 0 of all pipeline ranks, then through chunk 1 of all.
"""

import re
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Self

from mbridge_ckpt.errors import CorruptCheckpointError, IncompleteCheckpointError, LayoutError
from mbridge_ckpt.formats.torch_pickle import StoredTensor
from mbridge_ckpt.formats.torch_reader import TorchFileReader
from mbridge_ckpt.megatron_lm.names import EMBEDDING, NamedParameter, parse_name
from mbridge_ckpt.megatron_lm.pickles import STAND_INS, argument

TRACKER, MODEL_FILE, OPTIMIZER_FILE = "latest_checkpointed_iteration.txt", "model_optim_rng.pt", "distrib_optim.pt"
_RANK = re.compile(r"mp_rank_([0-9]{2,})(?:_([0-9]{3,}))?(?:_([0-9]{3,}))?")
_ITERATION = re.compile(r"iter_([0-9]{7,})")

Rank = tuple[int, int, int]
"""Tensor, pipeline and expert rank."""


@dataclass(frozen=True, slots=True)
class ModelStage:
    """A piece of the model between two cuts of pipelining.

    `key` leads to its weights in the files of `pipeline_rank`; `parameters` have the order of these files, the same on
    each tensor and expert rank; `layer_offset` is the global number of its first layer.
    """

    pipeline_rank: int
    key: str
    parameters: tuple[NamedParameter, ...]
    layer_offset: int


class MegatronTree:
    """An open tree; a context manager. Only directories and pickles are read at first, and tensors by `read`.

    Attributes:
        directory: of the iteration.
        iteration: its number; 0 for a release without one.
        tensor, pipeline, virtual_pipeline, expert: sizes of the layout.
        stages: in the model's order, `pipeline * virtual_pipeline` of them.
        arguments: of the run, see `argument`.

    Raises:
        IncompleteCheckpointError: there is no tree, or a rank's file is missing.
        CorruptCheckpointError, UnsafeCheckpointError: a file cannot be read, or would run code.
        LayoutError: a parameter is unknown, or the ranks do not fit together.
    """

    def __init__(self, source: str | Path) -> None:
        self.directory = find_iteration(Path(source))
        self._open = ExitStack()
        self._readers: dict[Path, TorchFileReader] = {}
        try:
            self._paths = self._ranks()
            self.tensor, self.pipeline, self.expert = (1 + max(rank[i] for rank in self._paths) for i in range(3))
            self._check_ranks()
            first = self.content((0, 0, 0))
            self.arguments: Any = first.get("args")
            self.iteration = self._iteration(first.get("iteration"))
            self.virtual_pipeline = max(1, sum(re.fullmatch(r"model[0-9]+", str(key)) is not None for key in first))
            self.stages = self._stages()
            self._check_arguments()
        except BaseException:
            self._open.close()
            raise

    def path(self, rank: Rank) -> Path:
        """Return a rank's file of weights; that of its optimizer, if any, lies beside it."""
        return self._paths[rank] / MODEL_FILE

    def reader(self, path: Path) -> TorchFileReader:
        """Return the open file."""
        if path not in self._readers:
            if path.exists() and not path.is_file():  # opening a pipe would wait forever
                raise CorruptCheckpointError(f"{path}: is no regular file; copy the tree again")
            try:
                self._readers[path] = self._open.enter_context(TorchFileReader(path, STAND_INS))
            except FileNotFoundError:
                raise IncompleteCheckpointError(f"{path}: the file is missing; copy the whole tree") from None
        return self._readers[path]

    def content(self, rank: Rank) -> dict[str, Any]:
        """Return the content of a rank's file, with a StoredTensor in place of each tensor."""
        path = self.path(rank)
        value = self.reader(path).value
        if not isinstance(value, dict):
            raise CorruptCheckpointError(f"{path}: holds a {type(value).__name__}, not a dict of Megatron-LM")
        return value

    def weights(self, stage: ModelStage, tensor_rank: int, expert_rank: int = 0) -> dict[str, StoredTensor]:
        """Return parameters and buffers of a stage by their names in the file."""
        return self._weights((tensor_rank, stage.pipeline_rank, expert_rank), stage.key)

    def read(self, stage: ModelStage, name: str, tensor_rank: int, expert_rank: int = 0) -> Any:
        """Read a tensor of `weights` into CPU memory."""
        reader = self.reader(self.path((tensor_rank, stage.pipeline_rank, expert_rank)))
        return reader.read(self.weights(stage, tensor_rank, expert_rank)[name])

    def _ranks(self) -> dict[Rank, Path]:
        """Find the directories of the ranks.

        Of two numbers the second is a pipeline rank, unless the first file holds a whole model.
        """
        found = {}
        names = [(match, path) for path in sorted(self.directory.iterdir()) if (match := _RANK.fullmatch(path.name))]
        if not names:
            hint = "; torch_dist directories are another format" if (self.directory / ".metadata").exists() else ""
            raise IncompleteCheckpointError(
                f"{self.directory} has no mp_rank_TT directories; give a tree of Megatron-LM's torch format{hint}"
            )
        kinds = {tuple(group is not None for group in match.groups()) for match, _ in names}
        if len(kinds) > 1:
            raise LayoutError(f"{self.directory} mixes mp_rank_TT, mp_rank_TT_PPP and mp_rank_TT_PPP_EEE directories")
        expert_second = kinds == {(True, True, False)} and self._holds_whole_model(names[0][1])
        for match, path in names:
            numbers = [int(group or 0) for group in match.groups()]
            found[(numbers[0], 0, numbers[1]) if expert_second else (numbers[0], numbers[1], numbers[2])] = path
        return found

    def _holds_whole_model(self, path: Path) -> bool:
        value = self.reader(path / MODEL_FILE).value
        model = value.get("model") if isinstance(value, dict) else None
        return isinstance(model, dict) and EMBEDDING in model and any("decoder.final_" in str(name) for name in model)

    def _check_ranks(self) -> None:
        for rank in product(range(self.tensor), range(self.pipeline), range(self.expert)):
            if rank not in self._paths:
                raise IncompleteCheckpointError(
                    f"{self.directory} has no directory of tensor rank {rank[0]}, pipeline rank {rank[1]}, expert rank"
                    f" {rank[2]}; copy the whole tree (an expert-tensor size other than the tensor size is not read)"
                )

    def _iteration(self, stored: Any) -> int:
        number = stored if type(stored) is int and stored >= 0 else None
        match = _ITERATION.fullmatch(self.directory.name)
        if match and number is not None and int(match[1]) != number:
            raise CorruptCheckpointError(f"{self.path((0, 0, 0))}: iteration {number} in {self.directory.name}")
        return int(match[1]) if match else number or 0

    def _weights(self, rank: Rank, key: str) -> dict[str, StoredTensor]:
        model = self.content(rank).get(key)
        where = f"{self.path(rank)}: {key!r}"
        if not isinstance(model, dict):
            raise CorruptCheckpointError(f"{where} is missing, or no dict of parameters")
        tensors = {}
        for name, tensor in model.items():
            if str(name).endswith("_extra_state"):
                continue  # Transformer Engine's scales of fp8
            if not isinstance(tensor, StoredTensor):
                raise LayoutError(
                    f"{where}: {name} is a {type(tensor).__name__}, not a tensor; only models of Megatron-Core are"
                    " read (convert those of --use-legacy-models with Megatron-LM's tools first)"
                )
            tensors[str(name)] = tensor
        return tensors

    def _stages(self) -> tuple[ModelStage, ...]:
        stages, offset = [], 0
        chunked = "model0" in self.content((0, 0, 0))
        keys = [f"model{chunk}" for chunk in range(self.virtual_pipeline)] if chunked else ["model"]
        for key, pipeline_rank in product(keys, range(self.pipeline)):
            path = self.path((0, pipeline_rank, 0))
            parameters = []
            for name in self._weights((0, pipeline_rank, 0), key):
                parameter = parse_name(name)
                if parameter is None:
                    raise LayoutError(
                        f"{path}: {name} is no known parameter of Megatron-Core's GPT models, so it is unknown how"
                        " tensor parallelism cuts it; models with other parts cannot be imported"
                    )
                parameters.append(parameter)
            layers = sorted({parameter.layer for parameter in parameters if parameter.layer is not None})
            if layers != list(range(len(layers))):
                raise LayoutError(f"{path}: {key!r} has layers {layers}, with gaps")
            stages.append(ModelStage(pipeline_rank, key, tuple(parameters), offset))
            offset += len(layers)
        self.layers = offset
        return tuple(stages)

    def _check_arguments(self) -> None:
        sizes = {
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
            "expert_model_parallel_size": self.expert,
            "num_layers": self.layers,
        }
        for name, found in sizes.items():
            said = argument(self.arguments, name, int)
            if said is not None and said != found:
                raise IncompleteCheckpointError(
                    f"{self.directory}: the run had {name}={said}, the tree holds {found}; copy the whole tree"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


def find_iteration(source: Path) -> Path:
    """Return the iteration's directory that the tracker file in `source` names, or `source` without such a file."""
    if not source.is_dir():
        raise IncompleteCheckpointError(f"{source} is not a directory; give a checkpoint tree of Megatron-LM")
    tracker = source / TRACKER
    if not tracker.is_file():
        return source
    try:
        text = tracker.read_bytes()[:100].decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptCheckpointError(f"{tracker}: cannot be read: {error}") from None
    if text != "release" and not re.fullmatch(r"[0-9]{1,18}", text):
        raise CorruptCheckpointError(f"{tracker}: {text!r} is neither a number nor 'release'")
    directory = source / (text if text == "release" else f"iter_{int(text):07d}")
    if not directory.is_dir():
        raise IncompleteCheckpointError(f"{directory}, which {TRACKER} names, is missing; give another one of {source}")
    return directory
