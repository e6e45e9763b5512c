# SPDX-License-Identifier: Apache-2.0
"""Names of torch and DeepSpeed that begin with an underscore are looked up in one place."""

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deepspeed_autotp.interop.torch_private import submodules, version_counter
from deepspeed_autotp.interop.versions import TESTED, required

PACKAGE = Path(__file__).resolve().parents[2] / "deepspeed_autotp"
INTEROP = PACKAGE / "interop"
FILES = sorted(PACKAGE.rglob("*.py"))
# What a module, a tensor or a process group of torch has of its own: not the name of an attribute
# of ours, whatever it is called.
OF_TORCH = {"_modules", "_parameters", "_buffers", "_version", "_C", "_forward_pre_hooks"}


def own_names(trees: dict[Path, ast.Module]) -> set[str]:
    """Every underscored name that the package defines or assigns."""
    found = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
                found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return found


def private_names(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Attributes of others with an underscore, and imports of torch with one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name, of_self = node.attr, ast.unparse(node.value) in {"self", "cls", "made"}
            foreign = name not in own or (name in OF_TORCH and not of_self)
            if foreign and name.startswith("_") and not name.startswith("__"):
                yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            parts = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            yield from (part for part in parts if part.startswith("_"))
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("torch") and "._" in a.name)


def test_private_names_of_others_are_in_interop_and_those_of_torch_in_one_file() -> None:
    trees = {path: ast.parse(path.read_text()) for path in FILES}
    own = own_names(trees)
    breaches = {
        str(path.relative_to(PACKAGE)): sorted(private_names(tree, own))
        for path, tree in trees.items()
        if INTEROP not in path.parents
    }
    assert {path: names for path, names in breaches.items() if names} == {}


def test_a_private_name_is_seen() -> None:
    source = "import torch._dynamo\nfrom torch.utils import _pytree\nx._version\nself._own\ny._own"
    assert sorted(private_names(ast.parse(source), {"_own"})) == [
        "_pytree",
        "torch._dynamo",
        "x._version",
    ]


def test_a_missing_name_is_an_error_with_the_versions() -> None:
    with pytest.raises(RuntimeError) as caught:
        required(SimpleNamespace(), "_gone", project="torch", needed_for="a test")
    text = str(caught.value)
    assert text.startswith("SimpleNamespace._gone is missing: tested with torch 2.13.0, found 2.")
    assert "a test needs it. Install a version of torch near the tested one" in text


def test_a_name_that_is_there_is_its_value() -> None:
    x = torch.ones(2)
    before = version_counter(x)
    x.add_(1)
    assert version_counter(x) > before
    assert list(submodules(nn.Sequential(nn.ReLU()))) == ["0"]


def test_the_tested_versions_are_those_of_the_test_environment() -> None:
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    assert f'"deepspeed=={TESTED["deepspeed"]}"' in text
    assert f'"transformers=={TESTED["transformers"]}"' in text
    assert f"TORCH=torch=={TESTED['torch']}" in (PACKAGE.parent / "tools/setup.sh").read_text()
