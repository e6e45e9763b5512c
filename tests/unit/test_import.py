# SPDX-License-Identifier: Apache-2.0
"""What importing the package costs."""

import json
import subprocess
import sys
from typing import Any

import pytest

# torch's compiler, which takes as long to import as torch, and what it needs; other frameworks; and
# what only some users of the package need.
HEAVY = (
    "torch._dynamo",
    "torch._inductor",
    "torch._functorch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.fx.experimental",
    "torch.onnx",
    "accelerate",
    "deepspeed",
    "mpmath",
    "numpy",
    "peft",
    "rich.table",
    "safetensors",
    "sympy",
    "transformers",
    "triton",
    "trl",
)

# Without collections, whose time is that of torch's objects in either import.
IMPORT = """
import gc, json, sys, time
gc.disable()
start = time.process_time()
import torch
torch_at = time.process_time()
before = set(sys.modules)
import deepspeed_autotp
package_at = time.process_time()
for name in deepspeed_autotp.__all__:
    getattr(deepspeed_autotp, name)
names_at = time.process_time()
print(json.dumps({
    "torch": torch_at - start,
    "package": package_at - torch_at,
    "names": names_at - package_at,
    "modules": sorted(set(sys.modules) - before),
    "libraries": sorted(torch.ops.loaded_libraries),
}))
"""


def imported() -> dict[str, Any]:
    """Processor seconds of torch, the package and all its names, and the modules that came."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=60, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    return imported()


def test_importing_imports_neither_the_compiler_nor_another_framework(
    fresh: dict[str, Any],
) -> None:
    heavy = [
        name for name in fresh["modules"] if f"{name}.".startswith(tuple(f"{h}." for h in HEAVY))
    ]
    assert heavy == []


def test_importing_loads_no_operators(fresh: dict[str, Any]) -> None:
    assert fresh["libraries"] == []


def test_importing_costs_next_to_nothing_and_all_names_a_part_of_what_torch_costs() -> None:
    runs = [imported() for _ in range(3)]
    torch, package, names = (min(run[key] for run in runs) for key in ("torch", "package", "names"))
    assert package < 0.05, f"{package:.3f} s"
    # A third of it is pydantic; a busy machine is slow at both, and ours reads more small files.
    assert names < max(0.3, 0.5 * torch), f"{names:.2f} s of {torch:.2f} s for torch"


PEFT_COMES_LATER = """
import sys
from deepspeed_autotp.interop.peft import watch_peft
watch_peft(lambda model: None)
assert "peft" not in sys.modules
import peft
from peft.tuners.tuners_utils import BaseTuner
for method in (peft.PeftModel.__init__, peft.PeftModel.add_adapter, BaseTuner.inject_adapter):
    assert hasattr(method, "autotp_original"), method
"""


def test_peft_is_watched_also_where_it_is_imported_after_a_model_was_sharded() -> None:
    subprocess.run([sys.executable, "-c", PEFT_COMES_LATER], timeout=120, check=True)
