"""Tell whether a safetensors file is complete, from its header alone.

The packages that read tensors have parsers of their own (`safetensors`, mbridge-ckpt). This package depends on neither,
as it must import in 0.3 s without numpy or torch, and needs nothing of the header but where the last tensor ends.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, little endian; a JSON header; the data).
"""

import json
import struct
from pathlib import Path

_LARGEST_HEADER = 100 * 2**20  # the format's own limit, in bytes


def fault(file: Path) -> str | None:
    """Return what is wrong with the length or the header of `file`, or None. The data is not read."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(_LARGEST_HEADER, size - 8):
                return f"{file.name} is not a whole safetensors file ({size} bytes)"
            header = json.loads(stream.read(length))
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return f"{file.name} has no valid safetensors header"
    described = 8 + length + max(ends, default=0)
    if size == described:
        return None
    word = "truncated" if size < described else "too long"
    return f"{file.name} is {word}: its header describes {described} bytes, the file has {size}"
