"""List the kinds of runs and their schemas."""

from collections.abc import Mapping
from typing import Any

from mbridge_config.schema.reasoning import ReasoningConfig
from mbridge_config.schema.sft import SFTConfig

RunConfig = ReasoningConfig | SFTConfig

SCHEMAS: Mapping[str, type[RunConfig]] = {"reasoning": ReasoningConfig, "sft": SFTConfig}


def schema_of(tree: Mapping[Any, Any]) -> type[RunConfig]:
    """Return the schema that `runner.task_type` of a composed tree asks for; without it, that of a reasoning run."""
    runner = tree.get("runner")
    task = runner.get("task_type") if isinstance(runner, Mapping) else None
    return SCHEMAS.get(str(task).lower(), ReasoningConfig)
