"""The shape of the package: layers, where heavy libraries are imported, and what starting up costs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "triton", "mlx", "transformers")


def loaded_by(code: str) -> list[str]:
    """The heavy libraries that a fresh interpreter has imported after `code`."""
    ask = f"{code}\nimport json, sys\nprint(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_layer_contract() -> None:
    """The contracts of .importlinter: layers, and torch, triton, mlx, transformers only where they belong."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[done.stdout.find("Contracts") :] + done.stderr
    assert "0 broken" in done.stdout


def test_the_contract_sees_external_libraries(tmp_path: Path) -> None:
    """A contract that could not see an `import torch` would always be kept."""
    code = "import grimp; g = grimp.build_graph('smedjan', include_external_packages=True, cache_dir=None)"
    ask = f"{code}\nprint([sorted(g.find_modules_that_directly_import(n))[:1] for n in {HEAVY!r} if n in g.modules])"
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("smedjan.") == len(HEAVY)


@pytest.mark.parametrize("code", ["import smedjan", "import smedjan.cli.app", "import smedjan.train.config"])
def test_importing_is_light(code: str) -> None:
    assert loaded_by(code) == []


def test_help_imports_nothing_that_computes_or_reads() -> None:
    """What `bench/startup.py` holds to 0.3 s, told by what is imported, since a machine that tests may be busy."""
    code = "import sys; from smedjan.cli.app import run; run(['--help'])"
    ask = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    names = json.loads(done.stdout.splitlines()[-1])
    roots = {name.partition(".")[0] for name in names}
    others = {"numpy", "pyarrow", "jinja2", "huggingface_hub", "tokenizers", "safetensors", "gguf", "pydantic"}
    assert roots.isdisjoint({*HEAVY, *others})
    ours = {name.split(".")[1] for name in names if name.startswith("smedjan.")}
    assert ours <= {"cli", "train", "checkpoint", "data", "report", "errors"}


def test_the_check_sees_what_is_loaded() -> None:
    assert "torch" in loaded_by("import smedjan.backends.torch_reference")


def test_help_is_quick_beside_an_interpreter_that_imports_torch() -> None:
    """Relative, since the machine may be busy: help comes in well under the time that importing torch alone takes."""

    def best(code: str) -> float:
        taken = []
        for _ in range(3):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
            taken.append(time.perf_counter() - began)
        return min(taken)

    assert best("from smedjan.cli.app import run; run(['--help'])") < 0.7 * best("import torch")
