# SPDX-License-Identifier: Apache-2.0
"""Run on every rank by tests.distributed.test_save_pretrained."""

import contextlib
import filecmp
import io
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import deepspeed_autotp
from tests.support.pretrained_models import MODELS, build_pretrained, load_pretrained
from tests.support.raised_error import raised_error
from tests.support.small_models import tokens

UNPRIVILEGED = 65534


def sharded(name: str = "llama", **changes: Any) -> nn.Module:
    model = build_pretrained(name, **changes)
    return deepspeed_autotp.parallelize(
        model, tp_size=dist.get_world_size(), config={"self_check": False}
    )


def differences(folder: str, parallel: bool, max_shard_size: str) -> list[str]:
    """How the files of sharded models differ from those of unsharded ones, and what
    ``from_pretrained`` makes of them."""
    found = []
    for number, name in enumerate(MODELS):
        full = build_pretrained(name)
        plain, ours = Path(folder, f"plain{number}"), Path(folder, f"ours{number}")
        if dist.get_rank() == 0:
            full.save_pretrained(plain, max_shard_size=max_shard_size)  # type: ignore[operator]
        model = sharded(name)
        with contextlib.redirect_stderr(io.StringIO()) as shown:
            deepspeed_autotp.save_pretrained(
                model, ours, max_shard_size=max_shard_size, parallel=parallel
            )
        found += [f"{name}: a bar of no progress"] if "Writing" in shown.getvalue() else []
        deepspeed_autotp.destroy(model)
        if dist.get_rank() == 0:
            found += [f"{name}: {each}" for each in unlike(plain, ours)]
            found += [f"{name}: {each}" for each in loaded_otherwise(str(ours), full)]
    return found


def unlike(plain: Path, ours: Path) -> Iterator[str]:
    """Names of files that are missing, too much or have other bytes."""
    names = {path.name for path in plain.iterdir()}
    yield from names ^ {path.name for path in ours.iterdir()}
    yield from (
        name
        for name in names
        if not (ours / name).is_file() or not filecmp.cmp(plain / name, ours / name, shallow=False)
    )


def loaded_otherwise(folder: str, full: nn.Module) -> Iterator[str]:
    """How what plain transformers load differs from the model that was saved."""
    loaded, info = load_pretrained(folder)
    if info:
        yield str(info)
    state = loaded.state_dict()
    for name, tensor in full.state_dict().items():
        if not torch.equal(state[name], tensor):
            yield name


def saves_of_replicas(folder: str) -> list[str]:
    """Two data-parallel replicas that were trained: who writes, and what."""
    model = build_pretrained("llama")
    deepspeed_autotp.parallelize(model, tp_size=2, config={"self_check": False})
    model(input_ids=tokens(0), labels=tokens(0)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    opened: list[str] = []
    for parallel in (True, False):
        ours = Path(folder, f"parallel-{parallel}")
        with writes(opened):
            deepspeed_autotp.save_pretrained(model, ours, parallel=parallel)
        full = deepspeed_autotp.full_state_dict(model)
        state = load_pretrained(str(ours))[0].state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in full.items())
    return opened


@contextmanager
def writes(into: list[str]) -> Iterator[None]:
    """Note the names of the files whose memory is written to."""
    from deepspeed_autotp.checkpoint.weight_files import WeightFiles

    opened = WeightFiles.opened

    def noting(self: WeightFiles, folder: Path) -> Any:
        into.extend(self.layouts)
        return opened(self, folder)

    WeightFiles.opened = noting  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        WeightFiles.opened = opened  # type: ignore[method-assign]


def errors(folder: str) -> dict[str, str]:
    """By what is wrong, the error; each leaves the folder as it was."""
    model = sharded()

    def save(path: str, **more: Any) -> str:
        return raised_error(lambda: deepspeed_autotp.save_pretrained(model, path, **more))

    found = {}
    if dist.get_rank() == 0:
        Path(folder, "file").touch()
        Path(folder, "closed").mkdir(mode=0o500)
    dist.barrier()
    found["a file"] = save(f"{folder}/file")
    with unprivileged():
        found["no permission"] = save(f"{folder}/closed")
    with file_size_limit(100_000):
        found["no space"] = save(f"{folder}/full")
        found["no space, parallel"] = save(f"{folder}/full", parallel=True)
    found["a size"] = save(f"{folder}/size", max_shard_size="5 apples")
    found["no model"] = raised_error(
        lambda: deepspeed_autotp.save_pretrained(nn.Linear(2, 2), f"{folder}/linear")
    )
    model.model.norm.weight = nn.Parameter(torch.ones(64))  # type: ignore[union-attr]
    found["replaced"] = save(f"{folder}/replaced")
    dist.barrier()
    found["left"] = str(sorted(path.name for path in Path(folder).rglob("*")))
    return found


@contextmanager
def unprivileged() -> Iterator[None]:
    """Without the rights of root, where it has them."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(UNPRIVILEGED)
    try:
        yield
    finally:
        os.seteuid(user)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may be larger, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def saves_onto(folder: str) -> str:
    """What saving onto a disk that is too small raises."""
    model = sharded()
    return raised_error(lambda: deepspeed_autotp.save_pretrained(model, folder))


def called_by_some(folder: str) -> str:
    """What a rank gets that calls it alone."""
    model = sharded()
    if dist.get_rank() == 1:
        return ""
    return raised_error(lambda: deepspeed_autotp.save_pretrained(model, folder))


def adapters(folder: str) -> list[str]:
    """How the adapters of a sharded model are written otherwise than those of an unsharded one."""
    import peft

    def wrapped() -> Any:
        model = build_pretrained("llama")
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        torch.manual_seed(1)
        made = peft.get_peft_model(model, lora)  # type: ignore[arg-type]
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        return made

    plain, ours = Path(folder, "plain"), Path(folder, "ours")
    full = wrapped()
    if dist.get_rank() == 0:
        ours.mkdir()
        (ours / "README.md").write_text("# Mine\n")
        plain.mkdir()
        (plain / "README.md").write_text("# Mine\n")
        full.save_pretrained(plain)
    model = wrapped()
    deepspeed_autotp.parallelize(model, tp_size=2, config={"self_check": False})
    for _ in range(2):
        deepspeed_autotp.save_pretrained(model, ours)
    return sorted(unlike(plain, ours)) if dist.get_rank() == 0 else []


def unsharded(folder: str) -> list[str]:
    """A model that is not sharded, in a process without a group."""
    dist.destroy_process_group()
    full = build_pretrained("qwen3_moe")
    plain, ours = Path(folder, "plain"), Path(folder, "ours")
    full.save_pretrained(plain)  # type: ignore[operator]
    deepspeed_autotp.save_pretrained(full, ours, parallel=True)
    return sorted(unlike(plain, ours))
