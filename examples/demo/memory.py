"""Whether the engines fit into memory side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PROCESS_BYTES = 1 << 30
"""Python, PyTorch, vLLM and compiled code of one engine."""


def engines_bytes(model: str, inspection: dict[str, Any], kv_cache_bytes: int, num_sirius: int) -> int:
    """Memory of vLLM alone and the engines of Sirius together.

    Args:
        model: Path or hub name.
        inspection: What `vllm-sirius doctor` says about it.
        kv_cache_bytes: KV cache of one engine.
        num_sirius: Engines of Sirius, each of which holds its FFN weights twice (neuron rows).

    Returns:
        An estimate.
    """
    files = Path(model).glob("*.safetensors") if Path(model).is_dir() else ()
    weights = max(inspection["step_bytes"], sum(file.stat().st_size for file in files))
    rows = inspection["step_bytes"] * inspection["ffn_share"]
    return int((1 + num_sirius) * (weights + kv_cache_bytes + PROCESS_BYTES) + num_sirius * rows)


def available_bytes() -> int:
    """Memory that new processes can have: what the machine has left, or the control group if that is less."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return available
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    used = int((group / "memory.current").read_text()) - int(statistics["inactive_file"])
    return min(available, int(limit.read_text()) - used)
