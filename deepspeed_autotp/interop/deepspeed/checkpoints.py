# SPDX-License-Identifier: Apache-2.0
"""Hooks into the saving and loading of DeepSpeed's engine, and what its optimizer is made of."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy
import torch.distributed as dist

from deepspeed_autotp.interop.versions import required

_RECOVERY_SCRIPT = """#!/usr/bin/env python
import sys

sys.exit(
    "DeepSpeed's zero_to_fp32.py and zero_to_torch.py do not put together the shards of a "
    "tensor-parallel run, which these checkpoints are of. For full weights that "
    "from_pretrained loads run: autotp merge CHECKPOINT_FOLDER OUTPUT_FOLDER, with --master "
    "for the float32 weights of the optimizer. For a checkpoint that was saved here without "
    "tensor parallelism run: python -m deepspeed.utils.zero_to_fp32"
)
"""

_LONGEST_TAG = 1000

# What the files of a checkpoint hold beside tensors, containers and numbers.
_SAVED = (
    "deepspeed.runtime.fp16.loss_scaler:LossScaler",
    "deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler",
    "deepspeed.runtime.zero.config:ZeroStageEnum",
    "deepspeed.utils.tensor_fragment:fragment_address",
)


def saved_classes() -> list[Any]:
    """The classes that DeepSpeed's checkpoints hold, and those of numpy's numbers, which client
    states often have: none of them runs anything when it is made."""
    places = (each.split(":") for each in _SAVED)
    own = [
        required(importlib.import_module(module), name, project="deepspeed", needed_for="loading")
        for module, name in places
    ]
    numbers = [type(numpy.dtype(kind)) for kind in "?bhilqBHILQefd"]
    return [*own, *numbers, numpy.dtype, numpy.float64(0).__reduce__()[0]]


@dataclass(frozen=True, slots=True)
class MadeStates:
    """What DeepSpeed is to read in the place of the files of this rank; ``path`` is what it is to
    say that it loaded."""

    path: str
    model: Mapping[str, Any]
    optimizer: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What was asked of ``load_checkpoint``. ``name`` is that of the ``folder``, or None where
    there is no checkpoint, of which DeepSpeed warns."""

    folder: Path
    name: str | None
    optimizer_states: bool


@dataclass(frozen=True, slots=True)
class EngineOptimizer:
    """``kind`` is as in ``checkpoint.saved_checkpoint.Kind``, or DeepSpeed's class where it is no
    such one. ``groups`` has the names of parameters with their shapes on this rank, in the order
    that the optimizer has them, by group or by ZeRO 3's sub-group. ``own_way`` names a key of the
    configuration that moves states elsewhere, or fills them up in a way of its own."""

    kind: str
    groups: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]
    replicas: int
    replica: int
    sub_group_size: int
    own_way: str | None


def engine_optimizer(engine: Any) -> EngineOptimizer:
    """What an engine's optimizer is made of."""
    group = engine.seq_data_parallel_group
    zero = engine._config.zero_config
    return EngineOptimizer(
        _kind(engine),
        tuple(_groups(engine)),
        dist.get_world_size(group),
        dist.get_rank(group),
        zero.sub_group_size,
        _key_of_own_way(engine),
    )


def save_every_shard(engine: Any, *, tp_size: int) -> None:
    """Let one rank of each TP rank on a node write model states with use_node_local_storage,
    where DeepSpeed lets local rank 0 alone, and the shards of the others are saved nowhere."""
    if engine.use_node_local_storage() and engine.local_rank < tp_size:
        engine.save_non_zero_checkpoint = True


def _key_of_own_way(engine: Any) -> str | None:
    zero = engine._config.zero_config
    for key in ("offload_optimizer", "offload_param"):
        device = getattr(getattr(zero, key), "device", "none")  # an enum's member, or its value
        if str(getattr(device, "value", device)) != "none":
            return f"zero_optimization.{key}"
    # Without it no parameter is filled up, also where the key is set.
    paddings = getattr(engine.optimizer, "round_robin_bit16_padding", ())
    filled = any(any(group) for group in paddings)
    return "zero_optimization.parameter_alignment" if filled else None


def _kind(engine: Any) -> str:
    name = type(engine.optimizer).__name__
    stage = engine.zero_optimization_stage()
    known = {"BF16_Optimizer": "bf16", "FP16_UnfusedOptimizer": "16 bits", "FP16_Optimizer": name}
    if name in known:
        return known[name]
    if stage == 0:
        return "torch"
    return "zero3" if stage == 3 else "zero"


def _groups(engine: Any) -> list[tuple[tuple[str, tuple[int, ...]], ...]]:
    if engine.optimizer is None:
        return []
    if engine.zero_optimization_stage() > 0:
        found = engine._get_zero_param_shapes()
        return [tuple((name, tuple(shape)) for name, shape in each.items()) for each in found]
    optimizer = engine.optimizer
    groups = getattr(optimizer, "fp16_groups", None)
    if groups is None:
        groups = [group["params"] for group in optimizer.param_groups]
    names = engine.param_names
    # A parameter that is not in the model has no name.
    return [tuple((names.get(p, ""), tuple(p.shape)) for p in group) for group in groups]


def watch_checkpoints(
    engine: Any,
    *,
    saving: Callable[[Path | None], None],
    loading: Callable[[Callable[[], LoadRequest]], MadeStates | None],
) -> None:
    """Call ``saving`` and ``loading`` with the folder of a checkpoint before ``engine`` uses it.

    On every rank, so that they fail together. ``saving`` is given the folder on the rank that
    creates it, global rank 0 or, with node-local storage, local rank 0, and None on the others.
    ``loading`` is given what tells the folder, which raises OSError where it cannot be read; it may
    return what DeepSpeed is to load in the place of the files. Universal checkpoints, which have
    full weights, are loaded without a call.
    """
    save, load = engine.save_checkpoint, engine.load_checkpoint
    signature = inspect.signature(load)

    def save_checkpoint(save_dir: str, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        rank = engine.local_rank if engine.use_node_local_storage() else engine.global_rank
        if save_dir:
            name = f"global_step{engine.global_steps}" if tag is None else str(tag)
            saving(Path(save_dir, name) if rank == 0 else None)
        return save(save_dir, tag, *args, **kwargs)

    def load_checkpoint(load_dir: str, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        if engine.load_universal_checkpoint():
            return load(load_dir, tag, *args, **kwargs)
        asked = signature.bind(load_dir, tag, *args, **kwargs)
        asked.apply_defaults()
        states = asked.arguments["load_optimizer_states"]
        states = states and not asked.arguments["load_module_only"]
        made = loading(lambda: _request(Path(load_dir), tag, states))
        if made is None:
            return load(load_dir, tag, *args, **kwargs)
        with tempfile.TemporaryDirectory(prefix="autotp-names-") as names:
            return _load_from_memory(engine, made, Path(names), lambda: load(
                names, "made", *args, **kwargs))  # fmt: skip

    engine.save_checkpoint = save_checkpoint
    engine.load_checkpoint = load_checkpoint


def replace_recovery_scripts(engine: Any) -> None:
    """Let the scripts that DeepSpeed puts beside the checkpoints of ``engine`` say what makes full
    weights of its shards; DeepSpeed's do not."""
    engine._copy_recovery_script = lambda folder: write_recovery_scripts(Path(folder), sharded=True)


def write_recovery_scripts(folder: Path, *, sharded: bool) -> None:
    """The scripts beside checkpoints: DeepSpeed's own, where it is installed, or for shards what
    says what to run."""
    found = importlib.util.find_spec("deepspeed")
    own = None if found is None or found.origin is None else Path(found.origin).parent / "utils"
    for name in ("zero_to_fp32.py", "zero_to_torch.py"):
        if sharded:
            (folder / name).write_text(_RECOVERY_SCRIPT, encoding="utf-8")
        elif own is not None:
            (folder / name).write_bytes((own / name).read_bytes())


def latest_name(latest: Path) -> str:
    """The folder that DeepSpeed's file ``latest`` names, beside itself or below. ValueError for one
    that is elsewhere, and for text that is no name."""
    with latest.open("rb") as opened:
        text = opened.read(_LONGEST_TAG + 1).decode("utf-8", "replace")
    name = text.strip()
    path = PurePosixPath(name)
    is_elsewhere = path.is_absolute() or ".." in path.parts or not path.parts
    if is_elsewhere or len(text) > _LONGEST_TAG or not name.isprintable():
        raise ValueError(
            f"the file {str(latest)!r}: got {ascii(text[:100])}, expected the name of a folder "
            "beside it; name the folder of the checkpoint itself"
        )
    return name


def _request(load_dir: Path, tag: Any, states: bool) -> LoadRequest:
    """For the checkpoint ``tag``, or the latest. ValueError where it is not there."""
    latest = load_dir / "latest"
    name = latest_name(latest) if tag is None and latest.is_file() else tag
    if name is None:
        return LoadRequest(load_dir, None, states)
    if not (load_dir / str(name)).is_dir():
        where = f"the file {str(latest)!r}" if tag is None else "tag"
        raise ValueError(
            f"load_checkpoint: {where}: got {str(name)!r}, and {str(load_dir)!r} has no such "
            "folder; name one of its checkpoints with tag"
        )
    return LoadRequest(load_dir / str(name), str(name), states)


def _load_from_memory(engine: Any, made: MadeStates, names: Path, load: Callable[[], Any]) -> Any:
    """Let DeepSpeed load ``made``: it finds empty files of the right names, and reads nothing."""
    for rank in range(engine.mp_world_size):
        file = Path(engine._get_ckpt_name(str(names), "made", mp_placeholder=f"{rank:02d}"))
        file.parent.mkdir(exist_ok=True)
        file.touch()
    before = engine.checkpoint_engine
    engine.checkpoint_engine = _FromMemory(made)
    try:
        path, client_state = load()
    finally:
        engine.checkpoint_engine = before
    return (None if path is None else made.path), client_state


class _FromMemory:
    """In the place of DeepSpeed's checkpoint engine, while a checkpoint is loaded."""

    def __init__(self, made: MadeStates) -> None:
        self._made = made

    def load(self, path: str, map_location: Any = None) -> Any:
        """The states of this rank, whichever rank's file DeepSpeed asks for."""
        if not path.endswith("_optim_states.pt"):
            return self._made.model
        return {"optimizer_state_dict": self._made.optimizer}
