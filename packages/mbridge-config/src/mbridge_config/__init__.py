"""Schema, defaults and rules of mbridge runs, checked before anything is loaded. Imports no torch."""

from mbridge_config.check import Report, check, refuse_short_run
from mbridge_config.cli.arguments import Arguments, parse_arguments
from mbridge_config.compat.keys import key_table
from mbridge_config.facts.directories import hf_directory, tokenizer_directory
from mbridge_config.facts.model import HFFacts
from mbridge_config.load.compose import compose
from mbridge_config.load.values import plain
from mbridge_config.plan.plan import ParallelPlan, make_plan
from mbridge_config.problems import ConfigError, Problem, Severity
from mbridge_config.run.directory import (
    checkpoint_directory,
    refuse_existing_run,
    refuse_unwritable_directory,
    run_directory,
    take_free_name,
)
from mbridge_config.run.steps import RunLength, longest_run, run_length
from mbridge_config.schema.keys import KeyInfo, Status
from mbridge_config.schema.reasoning import ReasoningConfig
from mbridge_config.schema.run_kinds import RunConfig
from mbridge_config.schema.sft import SFTConfig

__all__ = [
    "Arguments",
    "ConfigError",
    "HFFacts",
    "KeyInfo",
    "ParallelPlan",
    "Problem",
    "ReasoningConfig",
    "Report",
    "RunConfig",
    "RunLength",
    "SFTConfig",
    "Severity",
    "Status",
    "check",
    "checkpoint_directory",
    "compose",
    "hf_directory",
    "key_table",
    "longest_run",
    "make_plan",
    "parse_arguments",
    "plain",
    "refuse_existing_run",
    "refuse_short_run",
    "refuse_unwritable_directory",
    "run_directory",
    "run_length",
    "take_free_name",
    "tokenizer_directory",
]
