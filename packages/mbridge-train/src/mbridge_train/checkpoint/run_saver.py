"""Save a run at its intervals, at once or in the background, and remove the checkpoints that no rule keeps."""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from mbridge_ckpt import AsyncSaver, Checkpoint, Retention, SaverBusyError, prune

from mbridge_train.checkpoint.save import save_checkpoint
from mbridge_train.engine.engine import Engine

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True, frozen=True)
class SaveSettings:
    """How a run saves.

    Attributes:
        interval: steps between saves; at most 0: only the last step is saved.
        hf_export_every: every n-th save and the last include the HuggingFace copy; 0: none does.
        max_shard_size: of the HuggingFace copy, such as "5GB".
        file_format: of the Megatron files, see `save_checkpoint`.
        retention: which checkpoints are kept.
        in_background: training goes on while a process beside each rank writes; see `mbridge_ckpt.AsyncSaver`.
        when_busy: a save that is due while the last one is being written waits for it, or is skipped; the last save
            of a run always waits.
    """

    interval: int = -1
    hf_export_every: int = 1
    max_shard_size: str = "5GB"
    file_format: Literal["torch", "torch_dist"] = "torch"
    retention: Retention = field(default_factory=Retention)
    in_background: bool = False
    when_busy: Literal["wait", "refuse"] = "wait"


def is_due(step: int, interval: int) -> bool:
    """Return whether something done every `interval` steps (at most 0: never) is done after `step`."""
    return interval > 0 and step % interval == 0


class RunSaver:
    """Saves an engine when a save is due, and prunes its checkpoints. Every method is collective over all ranks.

    A context manager: its end waits for a save in the background. `directory` is
    `<output_dir>/<experiment_name>/checkpoints`. `resumed_from` is never removed, so that the run can be started from
    it again.
    """

    def __init__(
        self, engine: Engine, directory: Path, settings: SaveSettings, *, resumed_from: Checkpoint | None = None
    ) -> None:
        self.engine = engine
        self.directory = directory
        self.settings = settings
        self._protected = [] if resumed_from is None else [resumed_from.path]
        self._is_warned = False
        self._background = AsyncSaver(when_busy=settings.when_busy) if settings.in_background else None

    def is_due(self, step: int, *, last: bool) -> bool:
        """Return whether step `step` ends with a checkpoint; the `last` one of a run always does."""
        return last or is_due(step, self.settings.interval)

    def save(
        self, step: int, *, last: bool, loop_state: dict[str, Any], metrics: dict[str, float], preempted: bool = False
    ) -> Path | None:
        """Write `global_step_<step>` and return it; None if `when_busy` skipped it.

        Args:
            last: step of the run.
            preempted: the run ends here, before its last step; `when_busy` then does not matter.
            loop_state, metrics: see `save_checkpoint`; metrics that are not a finite number are left out.

        Raises:
            mbridge_ckpt.SaveError: on every rank, if one rank could not write; no partial checkpoint is left. In the
                background: also if the last save failed.
        """
        if last or preempted:
            self.check(wait=True)
        self._look_for_metric(metrics)
        try:
            path = save_checkpoint(
                self.engine,
                self.directory,
                step=step,
                loop_state=loop_state,
                metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
                export_hf=self._exports(step, last),
                max_shard_size=self.settings.max_shard_size,
                file_format=self.settings.file_format,
                saver=self._background,
            )
        except SaverBusyError as error:
            logger.warning("%s", error)
            return None
        if self._background is None:
            self._prune()
        return path

    def check(self, *, wait: bool = False) -> None:
        """Notice the end of a save in the background, or wait for it; call it once per step.

        Raises `mbridge_ckpt.SaveError` if it failed.
        """
        if self._background is None:
            return
        if (self._background.wait() if wait else self._background.check()) is not None:
            self._prune()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._background is not None:
            self._background.__exit__(kind, error, traceback)
            if error is None:
                self._prune()

    def _look_for_metric(self, metrics: dict[str, float]) -> None:
        """Warn once if the metric that decides which checkpoints are kept is not measured."""
        wanted = self.settings.retention.metric
        if wanted is None or wanted in metrics or self._is_warned or torch.distributed.get_rank():
            return
        self._is_warned = True
        logger.warning(
            "runner.checkpoint.keep_best_metric=%s is not measured with this checkpoint, which cannot be one of the "
            "best; measured are %s",
            wanted,
            ", ".join(sorted(metrics)),
        )

    def _prune(self) -> None:
        if torch.distributed.get_rank() == 0:
            prune(self.directory, self.settings.retention, protect=self._protected)

    def _exports(self, step: int, last: bool) -> bool:
        every, interval = self.settings.hf_export_every, self.settings.interval
        # Counted by the step, so that a resumed run goes on with the same ones.
        return every > 0 and (last or (is_due(step, interval) and (step // interval) % every == 0))
