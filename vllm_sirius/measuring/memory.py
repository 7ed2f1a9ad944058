"""Whether engines fit into memory side by side."""

from __future__ import annotations

from pathlib import Path

from vllm_sirius.measuring.inspection import Inspection

PROCESS_BYTES = 1 << 30
"""Python, PyTorch and vLLM of one engine."""

COMPILER_BYTES = 1 << 30
"""What compiling leaves behind in an engine that compiles the model."""


def weight_file_bytes(model: str) -> int:
    """Size of a model's weight files.

    Args:
        model: Path or hub name.

    Returns:
        Bytes; 0 where the model is no folder of safetensors files.
    """
    folder = Path(model)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0


def engine_bytes(model: str, step_bytes: int, kv_cache_bytes: int, extra_bytes: int = 0, compiled: bool = False) -> int:
    """Memory of one engine.

    Args:
        model: Path or hub name.
        step_bytes: Weight bytes of a decoding step, as `vllm-sirius doctor` says.
        kv_cache_bytes: Its KV cache.
        extra_bytes: What it holds beside the model: copies of weights, a draft model.
        compiled: Whether it compiles the model.

    Returns:
        An estimate.
    """
    process = PROCESS_BYTES + (COMPILER_BYTES if compiled else 0)
    return max(step_bytes, weight_file_bytes(model)) + kv_cache_bytes + process + extra_bytes


def engines_bytes(model: str, inspection: Inspection, kv_cache_bytes: int, num_sirius: int) -> int:
    """Memory of vLLM alone and the engines of Sirius together.

    Args:
        model: Path or hub name.
        inspection: What is known of it.
        kv_cache_bytes: KV cache of one engine.
        num_sirius: Engines of Sirius; their copies of weights are taken to be as large as the FFNs (neuron rows).

    Returns:
        An estimate.
    """
    step_bytes = inspection.step_bytes
    rows = int(step_bytes * inspection.ffn_share)
    sirius = num_sirius * engine_bytes(model, step_bytes, kv_cache_bytes, rows)
    return engine_bytes(model, step_bytes, kv_cache_bytes) + sirius


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
