"""Schema, defaults and rules of mbridge runs, checked before anything is loaded. Imports no torch."""

from mbridge_config.arguments import Arguments, parse_arguments
from mbridge_config.compose import compose
from mbridge_config.problems import ConfigError, Problem, Severity
from mbridge_config.schema.reasoning import ReasoningConfig

__all__ = ["Arguments", "ConfigError", "Problem", "ReasoningConfig", "Severity", "compose", "parse_arguments"]
