# SPDX-License-Identifier: Apache-2.0
"""The architecture that the folders show: levels, walls, and who may include and import what.

Each wall is one function over text or a syntax tree, tried on a breach here as well.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CORE = CSRC / "core"
PACKAGE = ROOT / "deepspeed_autotp"
INTEROP = PACKAGE / "interop"
FOREIGN = ("deepspeed", "transformers", "peft", "accelerate", "trl", "bitsandbytes")
MAX_LINES = 400

# A room imports from rooms below it, and from itself.
LEVELS = {
    "base": -1,
    "native": 0,
    "config": 0,
    "interop": 0,
    "distributed": 1,
    "layers": 2,
    "planning": 2,
    "state": 2,
    "vocab_parallel": 3,
    "sequence_parallel": 3,
    "sharding": 4,
    "self_check": 5,
    "checkpoint": 5,
    "loading": 5,
    "api": 6,
    "estimate": 6,
    "cli": 7,
}
CORE_LEVELS = {
    "base": 0,
    "config": 1,
    "reads": 1,
    "layout": 2,
    "model": 3,
    "rules": 4,
    "plan": 5,
    "passes": 6,
    "cost": 6,
}

LIBC = {
    "assert.h", "ctype.h", "errno.h", "float.h", "inttypes.h", "limits.h", "locale.h", "math.h",
    "setjmp.h", "signal.h", "stdalign.h", "stdarg.h", "stdatomic.h", "stdbool.h", "stddef.h",
    "stdint.h", "stdio.h", "stdlib.h", "stdnoreturn.h", "string.h", "strings.h", "time.h",
}  # fmt: skip
# What opens libraries and waits for other ranks needs of POSIX besides.
POSIX = {"dlfcn.h", "fcntl.h", "pthread.h", "sched.h", "unistd.h", "sys/mman.h", "sys/stat.h"}
TORCH = re.compile(r"(torch|ATen|c10|caffe2)/")
CUDA = re.compile(r"(cuda|cub/|cooperative_groups|nccl|thrust)")
# Tests of their own say where those of torch and CUDA may stand.
OTHERS = re.compile(f"{TORCH.pattern}|{CUDA.pattern}")
# Headers of C++ have neither a folder nor an ending.
CXX = re.compile(r"[a-z_]+$")
CXX_FOLDERS = ("torch", "cuda")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)

# What the files of a folder of csrc/ may include: system headers, and folders.
MAY_INCLUDE = {
    "pack": (LIBC | {"sys/mman.h", "unistd.h"}, ("core/base", "pack")),
    "shared_memory": (LIBC | POSIX, ("core/base", "shared_memory")),
    "nccl": (LIBC | POSIX, ("core/base", "nccl")),
    "files": (LIBC | POSIX, ("core/base", "files")),
    "python": (LIBC | {"Python.h", "structmember.h", "pcre2.h"}, ("core", "python")),
    "cuda": (LIBC, ("pack", "cuda")),
    "torch": (
        LIBC | POSIX,
        ("core/base", "pack", "shared_memory", "nccl", "files", "cuda", "torch"),
    ),
}

C_FILES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".c", ".h", ".cpp", ".cu", ".cuh"})
CORE_FILES = [p for p in C_FILES if CORE in p.parents]
PY_FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted(p.parent for p in PACKAGE.rglob("__init__.py") if p.parent != PACKAGE)
STUBS = sorted(PACKAGE.rglob("*.pyi"))
TESTS = ROOT / "tests"
TEST_FILES = sorted(TESTS.rglob("*.py"))
SOURCES = [*C_FILES, *PY_FILES, *STUBS, *(ROOT / "examples").glob("*.py")]


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def includes(text: str) -> list[tuple[bool, str]]:
    """(quoted, name) of every include directive."""
    return [(mark == '"', name) for mark, name in INCLUDE.findall(text)]


def strangers_of_core(text: str, level: int) -> list[str]:
    """Includes of a file of the core that are neither libc, PCRE2 nor a folder of its level or
    below."""
    return [
        name
        for quoted, name in includes(text)
        if (quoted and (".." in name or CORE_LEVELS.get(name.split("/")[0], level + 1) > level))
        or (not quoted and name not in LIBC | {"pcre2.h"})
    ]


def strangers(text: str, folder: str) -> list[str]:
    """Includes of a file that the folder it is in may not have, torch's and CUDA's own apart."""
    system, folders = MAY_INCLUDE[folder]
    return [
        name
        for quoted, name in includes(text)
        if not (
            name.startswith(tuple(f"{each}/" for each in folders)) and ".." not in name
            if quoted
            else name in system or OTHERS.match(name) or (folder in CXX_FOLDERS and CXX.match(name))
        )
    ]


def torch_headers(text: str) -> list[str]:
    return [name for quoted, name in includes(text) if not quoted and TORCH.match(name)]


def imported_names(source: str, package: str) -> list[list[str]]:
    """What a module imports from a package, at any depth of the file: the dotted name below the
    package, in parts."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and called(node) in {"import_module", "__import__"}:
            names = [str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        parts = [name.split(".") for name in names]
        found += [part[1:] for part in parts if part[0] == package and len(part) > 1]
    return found


def imported_rooms(source: str) -> list[str]:
    """The rooms that a module of the package imports from."""
    rooms = [name[0] for name in imported_names(source, PACKAGE.name)]
    return [room for room in rooms if not room.startswith("_")]


def wrong_rooms(source: str, room: str) -> list[str]:
    """The imports that go sideways or up."""
    own = LEVELS[room]
    return [
        other for other in imported_rooms(source) if other != room and LEVELS.get(other, own) >= own
    ]


def wrong_test_imports(source: str, folder: str, stem: str) -> list[str]:
    """What a module of tests/ imports from tests/ beside support/ and, as test_x, its x_ranks."""
    ranks = [folder, f"{stem.removeprefix('test_')}_ranks"] if stem.startswith("test_") else [""]
    return [
        ".".join(name)
        for name in imported_names(source, TESTS.name)
        if name[0] != "support" and name[: len(ranks)] != ranks
    ]


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
    core = '#include <Python.h>\n# include "base/map.h"\n#include "plan/plan.h"\n'
    assert strangers_of_core(core, CORE_LEVELS["model"]) == ["Python.h", "plan/plan.h"]
    assert strangers_of_core('#include "../torch/tensor.h"\n', 6) == ["../torch/tensor.h"]
    assert strangers('#include "cuda/api.h"\n#include "core/plan/plan.h"\n', "nccl") == [
        "cuda/api.h",
        "core/plan/plan.h",
    ]
    assert strangers("#include <zlib.h>\n#include <vector>\n", "pack") == ["zlib.h", "vector"]
    assert strangers("#include <vector>\n", "torch") == []
    assert strangers('#include "pack/../torch/tensor.h"\n', "pack") == ["pack/../torch/tensor.h"]
    assert strangers_of_core('#include "config/tp_size.h"\n', CORE_LEVELS["layout"]) == []
    assert strangers_of_core('#include "layout/split.h"\n', CORE_LEVELS["config"]) == [
        "layout/split.h"
    ]
    assert torch_headers("#include <torch/csrc/stable/tensor.h>\n") == [
        "torch/csrc/stable/tensor.h"
    ]
    source = """
from deepspeed_autotp import _core, interop
from deepspeed_autotp.layers.linear import ColumnLinear
import deepspeed_autotp.api.pipeline
"""
    assert wrong_rooms(source, "state") == ["layers", "api"]
    assert wrong_rooms(source, "config") == ["interop", "layers", "api"]
    source = """
from tests.distributed import layers_ranks
from tests.distributed.autograd_collectives_ranks import reduce
from tests.support import layer_cases
"""
    assert wrong_test_imports(source, "distributed", "test_layers") == [
        "distributed.autograd_collectives_ranks.reduce"
    ]
    assert len(wrong_test_imports(source, "distributed", "layers_ranks")) == 2
    assert len(wrong_test_imports(source, "unit", "test_layers")) == 2
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
    assert len(CORE_FILES) > 20 and len(PY_FILES) > 50


def test_every_room_has_a_level_and_is_packaged() -> None:
    assert {room.name for room in ROOMS if room.parent == PACKAGE} == set(LEVELS)
    assert {folder.name for folder in CORE.iterdir()} == set(CORE_LEVELS)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    there = [PACKAGE, *ROOMS]
    assert sorted(packages) == sorted(".".join(p.relative_to(ROOT).parts) for p in there)


def test_every_module_is_in_a_room_and_imports_by_full_names() -> None:
    for path in [*PY_FILES, *TEST_FILES]:
        assert (path.parent / "__init__.py").exists(), label(path)
        relative = [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.level > 0
        ]
        assert relative == [], label(path)


def test_no_module_stands_beside_the_rooms() -> None:
    assert [p.name for p in PACKAGE.glob("*.py")] == ["__init__.py"]


def test_every_room_says_in_its_first_line_what_it_is_for() -> None:
    for room in ROOMS:
        said = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
        assert re.match(r"[A-Z].{19,}\.$", said.split("\n")[0]), room
        assert said.endswith("Internal: the public names are those of ``deepspeed_autotp`` itself.")


def test_rooms_import_from_lower_levels_only() -> None:
    for path in PY_FILES:
        room = path.relative_to(PACKAGE).parts[0]
        if room in LEVELS:
            assert wrong_rooms(path.read_text(), room) == [], label(path)


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in PY_FILES}
    needs = {}
    for name, path in modules.items():
        found = [[PACKAGE.name, *each] for each in imported_names(path.read_text(), PACKAGE.name)]
        needed = {".".join(each[:count]) for each in found for count in range(2, len(each) + 1)}
        needs[name] = needed & set(modules) - {name}
    assert list(TopologicalSorter(needs).static_order())


def test_the_core_includes_libc_pcre2_and_lower_folders_only() -> None:
    for path in CORE_FILES:
        level = CORE_LEVELS[path.relative_to(CORE).parts[0]]
        assert strangers_of_core(path.read_text(), level) == [], label(path)


def test_the_other_folders_of_csrc_include_what_they_may() -> None:
    others = [p for p in C_FILES if p not in CORE_FILES]
    assert {p.parent.name for p in others} == set(MAY_INCLUDE)
    for path in others:
        assert strangers(path.read_text(), path.parent.name) == [], label(path)


def test_torch_headers_appear_under_csrc_torch_only() -> None:
    users = [p for p in C_FILES if torch_headers(p.read_text())]
    assert users
    assert [label(p) for p in users if p.parent.name != "torch"] == []


def test_cuda_headers_appear_under_csrc_cuda_only() -> None:
    users = {
        label(p): [n for quoted, n in includes(p.read_text()) if not quoted and CUDA.match(n)]
        for p in C_FILES
    }
    assert any(users.values())
    assert {path for path, names in users.items() if names and "/cuda/" not in path} == set()
    # The operators build where there is no CUDA.
    assert not users["csrc/cuda/api.h"]


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


def test_tests_import_support_and_their_own_ranks_only() -> None:
    for path in TEST_FILES:
        wrong = wrong_test_imports(path.read_text(), path.parent.name, path.stem)
        assert wrong == [], label(path)


def test_every_module_of_tests_is_a_test_its_ranks_or_support() -> None:
    for path in TEST_FILES:
        if path.stem in {"__init__", "conftest"} or TESTS / "support" in path.parents:
            continue
        stem = path.stem.removesuffix("_ranks")
        assert path.stem.startswith("test_") or stem != path.stem, label(path)
        assert stem == path.stem or path.with_name(f"test_{stem}.py").exists(), label(path)


def test_no_source_file_is_long() -> None:
    # A stub lists one compiled module, which cannot be divided.
    lengths = {label(p): len(p.read_text().splitlines()) for p in SOURCES if p not in STUBS}
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


def test_internals_says_the_levels_of_the_rooms() -> None:
    text = (ROOT / "docs" / "internals.md").read_text()
    rows = re.findall(r"^\| \[`(\w+)/`\]\(\S+\) \| (-?\d) \|", text, re.MULTILINE)
    assert {room: int(level) for room, level in rows} == LEVELS
    assert [folder for folder in CORE_LEVELS if f"`{folder}`" not in text] == []


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
