"""How much memory a device has free."""

import sys
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Free bytes of a device; on a CPU what Linux calls available, and no bound on other systems."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        known = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return sys.maxsize
    return int(known.split("MemAvailable:")[1].split()[0]) * 1024
