"""Modules that the workers of gangs have loaded when they are forked; only the fork server imports this file."""

import gc
import warnings

import torch

# On import Megatron warns a dozen times that Transformer Engine is missing, which would hide a failure.
warnings.filterwarnings("ignore", module=r"megatron\.")

from mbridge_model.bridge.bridge import import_bridge  # noqa: E402

import_bridge()
# Megatron-Core replaces the function that unpickles tensors. Under torch's name, a test that receives a tensor from a
# worker need not import Megatron.
reader = torch.storage._load_from_bytes
reader.__module__, reader.__qualname__, reader.__name__ = "torch.storage", "_load_from_bytes", "_load_from_bytes"
gc.freeze()  # a million objects that workers need not traverse
