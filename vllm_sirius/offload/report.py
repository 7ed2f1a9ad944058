"""What `vllm-sirius doctor` says of a model whose weights would be streamed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sirius.config import SiriusConfig
from vllm_sirius.offload import folder as offload_folder
from vllm_sirius.offload.errors import OffloadError
from vllm_sirius.offload.forecast import ACCEPTANCE_RATES, Forecast, disk_rate, forecast, memory_rate
from vllm_sirius.offload.plan import GB, MemoryPlan


@dataclass(frozen=True)
class OffloadReport:
    """Plan, file and forecast.

    Attributes:
        memory: Where the weights lie.
        path: The file.
        built: Whether it is there already.
        file_bytes: What it takes.
        free_bytes: What its disk has left.
        speed: The forecast, or ``None`` where nothing is streamed or no rate could be measured.
    """

    memory: MemoryPlan
    path: Path
    built: bool
    file_bytes: int
    free_bytes: int
    speed: Forecast | None

    def as_json(self) -> dict[str, Any]:
        """As a mapping."""
        found: dict[str, Any] = {
            "memory_bytes": self.memory.memory_bytes,
            "budget_bytes": self.memory.budget,
            "layers": len(self.memory.resident),
            "streamed_layers": self.memory.num_streamed_layers,
            "streamed_head": not self.memory.head_in_memory,
            "streamed_bytes": self.memory.streamed_bytes,
            "file": str(self.path),
            "built": self.built,
            "file_bytes": self.file_bytes,
            "free_bytes": self.free_bytes,
        }
        if self.speed is not None:
            found |= {
                "disk_bytes_per_second": self.speed.disk_rate,
                "pass_seconds": self.speed.pass_seconds,
                "tokens_per_second": {rate: self.speed.tokens_per_second(rate) for rate in (0.0, *ACCEPTANCE_RATES)},
            }
        return found

    def text(self) -> str:
        """As lines."""
        state = (
            "built"
            if self.built
            else f"to be built by the first start; the disk has {self.free_bytes / GB:.1f} GB free"
        )
        lines = [
            f"  where the weights lie      {self.memory}",
            f"  file                       {self.file_bytes / GB:.2f} GB, {state}: {self.path}",
        ]
        if self.speed is not None:
            lines += [
                f"  the disk reads             {self.speed.disk_rate / GB:.2f} GB/s, measured",
                f"  a pass takes about         {self.speed.pass_seconds:.2f} s",
                "  about, one request at a time, if so many draft tokens are the target's own:",
                f"    without drafts           {self.speed.tokens_per_second(0.0):6.2f} tokens/s",
            ]
            lines += [
                f"    {rate:.0%} of draft tokens      {self.speed.tokens_per_second(rate):6.2f} tokens/s"
                for rate in ACCEPTANCE_RATES
            ]
        elif self.memory.streamed:
            lines.append("  the disk                   not measured: no file to read past the page cache")
        return "\n".join(lines)


def describe_offload(model: str, config: SiriusConfig, memory: MemoryPlan) -> OffloadReport:
    """Looks at the file's disk and measures it.

    Args:
        model: Path or hub name.
        config: The options, as they were resolved.
        memory: Where the weights lie.

    Returns:
        The report.

    Raises:
        OffloadError: If the disk has too little room.
    """
    folder = offload_folder.offload_folder(config.offload_path)
    path = offload_folder.file_of(folder, model, "None")
    sizes = memory.sizes
    file_bytes = sizes.copies + sizes.kept + sizes.rows + sum(sizes.groups) + sum(sizes.head)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free, built = shutil.disk_usage(existing).free, path.exists()
    if not built and free < file_bytes:
        raise OffloadError(
            f"the file of the target's weights takes {file_bytes / GB:.2f} GB, and {existing} has {free / GB:.2f} GB free: free "
            "some, or set offload_path to a folder on another disk."
        )
    files = [path] if built else [*Path(model).glob("*.safetensors")] if Path(model).is_dir() else []
    rate = disk_rate(files) if memory.streamed else 0.0
    speed = forecast(memory, rate, memory_rate(), config.kernel_size) if rate > 0.0 else None
    return OffloadReport(memory, path, built, file_bytes, free, speed)
