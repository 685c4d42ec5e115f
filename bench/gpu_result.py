"""The result file of one run of bench/gpu.sh: `bench/results/<device>-<date>.json`, added to step by step.

`python bench/gpu_result.py FOLDER` begins one and prints its path; with FILE KEY VALUE it adds a word.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any


def begin(folder: Path) -> Path:
    import torch
    import triton

    device = torch.cuda.get_device_name()
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = folder / f"{name}-{date.today().isoformat()}.json"
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    _write(
        path,
        {
            "device": device,
            "date": date.today().isoformat(),
            "commit": done.stdout.strip() if done.returncode == 0 else "unknown",
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
        },
    )
    return path


def merge(path: Path, more: dict[str, Any]) -> None:
    """Adds keys: whatever was measured before a step ran out of time is kept."""
    _write(path, {**json.loads(path.read_text(encoding="utf-8")), **more})


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(begin(Path(sys.argv[1])))
    else:
        merge(Path(sys.argv[1]), {sys.argv[2]: sys.argv[3]})
