# SPDX-License-Identifier: Apache-2.0
"""The walls between the parts: who may include and import what.

Each wall is one function over text or a syntax tree, tried on a breach here as well.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "deepspeed_autotp"
BRIDGES = (
    "bridge.cpp", "bridge.h", "bridge_cuda.cpp", "bridge_device.h", "bridge_host.cpp",
    "bridge_lookup.cpp", "bridge_nccl.cpp", "bridge_registry.h",
)  # fmt: skip
BRIDGE = {CSRC / "torch" / name for name in BRIDGES}
INTEROP = PACKAGE / "interop"
FOREIGN = ("deepspeed", "transformers", "peft", "accelerate", "trl")
MAX_LINES = 400

LIBC = {
    "assert.h", "ctype.h", "errno.h", "float.h", "inttypes.h", "limits.h", "locale.h", "math.h",
    "setjmp.h", "signal.h", "stdalign.h", "stdarg.h", "stdatomic.h", "stdbool.h", "stddef.h",
    "stdint.h", "stdio.h", "stdlib.h", "stdnoreturn.h", "string.h", "strings.h", "time.h",
}  # fmt: skip
# What opens libraries and waits for other ranks needs of POSIX besides.
POSIX = {"dlfcn.h", "fcntl.h", "pthread.h", "sched.h", "unistd.h", "sys/mman.h", "sys/stat.h"}
TORCH = re.compile(r"(torch|ATen|c10|caffe2)/")
CUDA = re.compile(r"(cuda|cub/|cooperative_groups|nccl|thrust)")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)

C_FILES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".c", ".h", ".cpp", ".cu", ".cuh"})
CORE_FILES = [p for p in C_FILES if p.parent == CSRC / "core"]
PY_FILES = sorted(PACKAGE.rglob("*.py"))
STUBS = sorted(PACKAGE.rglob("*.pyi"))
SOURCES = [*C_FILES, *PY_FILES, *STUBS, *(ROOT / "examples").glob("*.py")]


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def includes(text: str) -> list[tuple[bool, str]]:
    """(quoted, name) of every include directive."""
    return [(mark == '"', name) for mark, name in INCLUDE.findall(text)]


def strangers_of_core(text: str, own: set[str]) -> list[str]:
    """Includes of a file of the core that are neither libc, PCRE2 nor a header of the core."""
    return [
        name
        for quoted, name in includes(text)
        if name not in (own if quoted else LIBC | {"pcre2.h"})
    ]


def strangers_of_transport(text: str, own: set[str]) -> list[str]:
    """Includes of a file of nccl/ that are neither libc, POSIX, its own nor the core's errors."""
    return [
        name
        for quoted, name in includes(text)
        if name not in (own | {"../core/error.h"} if quoted else LIBC | POSIX)
    ]


def torch_headers(text: str) -> list[str]:
    return [name for _, name in includes(text) if TORCH.match(name)]


def foreign_imports(source: str) -> Iterator[str]:
    """Imports of packages that only interop/ may look into, at any depth of the file."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and called(node) in {"import_module", "__import__"}:
            names = [str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        yield from (name for name in names if name.split(".")[0] in FOREIGN)


def called(node: ast.Call) -> str:
    match node.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def attribute_guesses(source: str) -> list[int]:
    """Lines that look an attribute up by name instead of knowing the type."""
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return sorted(
        node.lineno
        for node in calls
        if isinstance(node.func, ast.Name) and node.func.id in {"getattr", "hasattr"}
    )


def test_the_walls_notice_a_breach() -> None:
    assert strangers_of_core('#include <Python.h>\n# include "split.h"\n', {"split.h"}) == [
        "Python.h"
    ]
    assert strangers_of_core('#include "../torch/shard.h"\n', {"split.h"}) == ["../torch/shard.h"]
    assert strangers_of_transport('#include <nccl.h>\n#include "../cuda/api.h"\n', {"abi.h"}) == [
        "nccl.h",
        "../cuda/api.h",
    ]
    assert torch_headers("#include <torch/csrc/stable/tensor.h>\n") == [
        "torch/csrc/stable/tensor.h"
    ]
    source = """
def f():
    import deepspeed.comm as dist
    from transformers import Trainer
    from . import deepspeed
    importlib.import_module("peft.tuners")
"""
    assert sorted(foreign_imports(source)) == ["deepspeed.comm", "peft.tuners", "transformers"]
    assert attribute_guesses("x = 1\nhasattr(x, 'y')\n") == [2]


def test_there_is_something_to_look_at() -> None:
    assert len(CORE_FILES) > 20 and len(PY_FILES) > 5


def test_the_core_includes_libc_pcre2_and_itself_only() -> None:
    own = {header.name for header in CORE_FILES if header.suffix == ".h"}
    breaches = {label(p): strangers_of_core(p.read_text(), own) for p in CORE_FILES}
    assert {path: names for path, names in breaches.items() if names} == {}


def test_what_moves_bytes_through_nccl_includes_libc_posix_errors_and_itself_only() -> None:
    files = [p for p in C_FILES if p.parent == CSRC / "nccl"]
    own = {header.name for header in files if header.suffix == ".h"}
    breaches = {label(p): strangers_of_transport(p.read_text(), own) for p in files}
    assert len(files) > 3
    assert {path: names for path, names in breaches.items() if names} == {}


def test_torch_headers_appear_in_the_bridge_only() -> None:
    breaches = {label(p): torch_headers(p.read_text()) for p in C_FILES if p not in BRIDGE}
    assert {path: names for path, names in breaches.items() if names} == {}


def test_cuda_headers_appear_under_csrc_cuda_only() -> None:
    users = {
        label(p): [name for quoted, name in includes(p.read_text()) if CUDA.match(name)]
        for p in C_FILES
    }
    outside = {path for path, names in users.items() if names and "/cuda/" not in path}
    assert outside == set()
    # The bridge and the C files build where there is no CUDA.
    assert not any(names for path, names in users.items() if path.endswith((".c", "api.h")))


def test_python_headers_appear_under_csrc_python_only() -> None:
    users = [p for p in C_FILES if (False, "Python.h") in includes(p.read_text())]
    assert [label(p) for p in users if p.parent != CSRC / "python"] == []


def test_interop_alone_imports_other_frameworks() -> None:
    others = [p for p in PY_FILES if INTEROP not in p.parents]
    breaches = {label(p): list(foreign_imports(p.read_text())) for p in others}
    assert {path: names for path, names in breaches.items() if names} == {}


def test_interop_alone_guesses_attributes() -> None:
    others = [p for p in PY_FILES if INTEROP not in p.parents]
    breaches = {label(p): attribute_guesses(p.read_text()) for p in others}
    assert {path: lines for path, lines in breaches.items() if lines} == {}


def test_no_source_file_is_long() -> None:
    lengths = {label(p): len(p.read_text().splitlines()) for p in SOURCES}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_every_source_file_names_its_licence_in_the_first_line() -> None:
    first = {label(p): p.read_text().split("\n", 1)[0] for p in [*C_FILES, *PY_FILES]}
    mark = "SPDX-License-Identifier: Apache-2.0"
    assert [path for path, line in first.items() if mark not in line] == []


def readme_rows() -> set[tuple[str, str]]:
    """(folder, stem) of every row of the tables in csrc/README.md."""
    rows = set()
    for section in re.split(r"^## ", (CSRC / "README.md").read_text(), flags=re.MULTILINE)[1:]:
        folder = section.split("\n", 1)[0].strip("`/ ")
        for name in re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE):
            rows.add((folder, name))
    return rows


def test_the_readme_of_csrc_has_a_row_for_every_file_and_for_nothing_else() -> None:
    there = {(str(p.parent.relative_to(CSRC)), p.stem) for p in C_FILES}
    assert sorted(there - readme_rows()) == [], "files without a row"
    assert sorted(readme_rows() - there) == [], "rows without a file"


HIDE = f"""
import sys

class Without:
    finders = tuple(sys.meta_path)

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {FOREIGN!r}:
            return None
        specs = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in specs if spec is not None), None)

sys.meta_path[:] = [Without()]
"""


def run_without_frameworks(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HIDE + code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_the_package_imports_and_plans_without_deepspeed_and_transformers() -> None:
    done = run_without_frameworks("""
import deepspeed_autotp
from deepspeed_autotp import _core

rules = _core.Rules()
rules.add([r".*up\\.weight"], {"partition_type": "column"}, label="test")
modules = [("", "Net", "other", {}), ("up", "Linear", "linear", {})]
parameters = [("up.weight", "weight", 1, (8, 4), "float32", 4, -1)]
plan = _core.Plan(_core.Model(modules, parameters), rules, ranks=2)
assert plan.entries[0].local_shape(0) == (4, 4), plan.entries[0].local_shape(0)
loaded = [name for name in sys.modules if name.split(".")[0] in ("deepspeed", "transformers")]
assert not loaded, loaded
""")
    assert done.returncode == 0, done.stderr


def test_initialize_without_deepspeed_says_what_to_install() -> None:
    done = run_without_frameworks("""
import torch
import deepspeed_autotp

try:
    deepspeed_autotp.initialize(model=torch.nn.Linear(2, 2), config={"train_batch_size": 1})
except ImportError as error:
    print(error)
""")
    assert done.returncode == 0, done.stderr
    assert "pip install" in done.stdout and "deepspeed" in done.stdout
