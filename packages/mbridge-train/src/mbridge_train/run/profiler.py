"""Traces of chosen steps, recorded with torch's profiler.

Each rank writes one file per step for Perfetto or Chrome, and one for TensorBoard's plugin. Above operators and kernels
they show the ranges `step <n>`, the phases of the app, and the engine's `forward_backward`, `optimizer_step` and
`forward`.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mbridge_config.run.steps import is_recorded, is_warmup
from mbridge_config.schema.actor import ProfilerConfig
from torch import distributed
from torch.profiler import ProfilerActivity, profile, record_function

from mbridge_train.errors import TrainError


class StepProfiler:
    """Profiler of the steps that `settings` choose; None: of none.

    The traces go to `directory`, unless `settings.output_dir` names another.
    """

    def __init__(self, settings: ProfilerConfig | None, directory: Path) -> None:
        self.settings = settings
        if settings is None:
            return
        self.directory = Path(settings.output_dir).expanduser() if settings.output_dir else directory
        names = [name for name in settings.activities if name != "cuda" or torch.cuda.is_available()]
        if not names:
            raise TrainError(
                "actor.megatron.profiler.activities=[cuda] has nothing to record: torch sees no GPU; add cpu"
            )
        self.activities = [getattr(ProfilerActivity, name.upper()) for name in names]

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Record the block if step `number` is chosen. A step that fails leaves no trace."""
        settings = self.settings
        if settings is None or not (is_recorded(settings, number) or is_warmup(settings, number)):
            yield
            return
        with (
            profile(
                activities=self.activities,
                record_shapes=settings.record_shapes,
                profile_memory=settings.profile_memory,
                with_stack=settings.with_stack,
                with_flops=settings.with_flops,
                with_modules=settings.with_modules,
                acc_events=True,  # otherwise torch warns about a second cycle, which never comes
            ) as recorded,
            record_function(f"step {number}"),
        ):
            yield
        if is_recorded(settings, number):
            self._write(recorded, number)

    def _write(self, recorded: profile, number: int) -> None:
        """Write the trace once, since torch allows no more, and copy it."""
        assert self.settings is not None
        rank = distributed.get_rank()
        files = []
        if self.settings.export_chrome_trace:
            prefix = self.settings.chrome_filename_prefix
            files.append(self.directory / f"{prefix}_rank{rank}_step{number}.json.gz")
        if self.settings.export_tensorboard:
            # The plugin parses worker and span from the name.
            files.append(self.directory / "tensorboard" / f"rank{rank}.{number}.pt.trace.json.gz")
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(files[0]))
        for file in files[1:]:
            shutil.copyfile(files[0], file)
