"""What the workers of gangs have loaded when they are forked. Imported by the server that forks them alone."""

import gc
import warnings

import torch

# Megatron's import says a dozen times that Transformer Engine is not there; a failing case should stand out.
warnings.filterwarnings("ignore", module=r"megatron\.")

from mbridge_model.bridge.bridge import import_bridge  # noqa: E402

import_bridge()
# Megatron-Core reads pickled tensors by a function of its own. Under torch's name for it, a test that gets a tensor
# from a worker need not import Megatron for that.
reader = torch.storage._load_from_bytes
reader.__module__, reader.__qualname__, reader.__name__ = "torch.storage", "_load_from_bytes", "_load_from_bytes"
gc.freeze()  # a million objects that no worker needs to look through
