# SPDX-License-Identifier: Apache-2.0
"""What ``save_pretrained`` of a transformers model would write, found out without its weights.

transformers converts some weights while it saves: fused experts become one tensor for each expert,
fused projections their parts. Its own functions say how, called with tensors that have no memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deepspeed_autotp.interop.progress_bars import without_progress_bars
from deepspeed_autotp.interop.torch_private import storage_id
from deepspeed_autotp.interop.versions import required


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor of the files.

    Its elements are those of the one tensor of the model in ``sources``, from element ``begin``
    on; where ``begin`` is -1 it is computed from the tensors in ``sources``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[str, ...]
    begin: int


@dataclass(frozen=True, slots=True)
class SavedModel:
    """The tensors of the files, names by file, and the bytes that an index states."""

    tensors: tuple[SavedTensor, ...]
    files: Mapping[str, tuple[str, ...]]
    total_size: int


def refuse_unsaveable(model: nn.Module, *, only_adapters: bool) -> None:
    """ValueError for a model that is not of transformers, or is quantised and saved itself."""
    if not callable(getattr(type(model), "save_pretrained", None)) or not hasattr(model, "config"):
        raise ValueError(
            f"save_pretrained: got {type(model).__name__}, expected a model of transformers; for "
            "another model call deepspeed_autotp.full_state_dict(model) on every rank, and save "
            "what it returns on one"
        )
    if getattr(model, "hf_quantizer", None) is not None and not only_adapters:
        raise ValueError(
            f"save_pretrained: {type(model).__name__} is quantised, expected plain weights; save "
            "it before it is sharded"
        )


def write_config(model: nn.Module, folder: Path) -> None:
    """Write into ``folder`` all that ``save_pretrained`` writes but for the weights."""
    saved: Any = model
    with without_progress_bars():
        type(saved).save_pretrained(saved, folder, state_dict={})


def kept_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of ``tensors`` that are saved: not what the model leaves out, tied ones once.

    The same tensor has to stand under all of its names.
    """
    modeling = importlib.import_module("transformers.modeling_utils")
    left_out = getattr(model, "_keys_to_ignore_on_save", None) or ()
    # One element each: only which of them are the same tensor is asked for.
    stand_ins = {id(tensor): torch.empty(1) for tensor in tensors.values()}
    named = {n: stand_ins[id(t)] for n, t in tensors.items() if n not in left_out}
    untied = _function(modeling, "remove_tied_weights_from_state_dict")
    return list(untied(named, model))


def saved_model(
    model: nn.Module, full: Mapping[str, Tensor], *, max_shard_size: int | str
) -> SavedModel:
    """What is saved of ``full``, tensors on the meta device by their names in the model."""
    converted = reverted(model, full)
    trace = _Trace(full)
    with trace:
        traced = reverted(model, full)
    tensors = tuple(trace.saved(name, tensor) for name, tensor in traced.items())
    found = {t.name: (t.shape, t.dtype) for t in tensors}
    if found != {name: (tuple(t.shape), t.dtype) for name, t in converted.items()}:
        raise ValueError(
            f"save_pretrained: how transformers converts the weights of {type(model).__name__} "
            "while saving is not understood; call deepspeed_autotp.full_state_dict(model) on every "
            "rank, then on rank 0 model.save_pretrained(folder, state_dict=full)"
        )
    split = _split(converted, max_shard_size)
    files = {file: tuple(names) for file, names in split.filename_to_tensors.items()}
    return SavedModel(tensors, files, split.metadata["total_size"])


def reverted(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` as transformers writes it: the conversions of loading, reversed."""
    loading = importlib.import_module("transformers.core_model_loading")
    result: dict[str, Tensor] = _function(loading, "revert_weight_conversion")(model, dict(state))
    return result


def _split(state: Mapping[str, Tensor], max_shard_size: int | str) -> Any:
    """As huggingface_hub splits tensors over files, which keeps those of one storage together."""
    hub = importlib.import_module("huggingface_hub")
    factory = _function(hub, "split_state_dict_into_shards_factory")
    return factory(
        state,
        get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
        get_storage_id=storage_id,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )


def _function(module: Any, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = required(
        module, name, project="transformers", needed_for="save_pretrained"
    )
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in sequences and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


class _Trace(TorchFunctionMode):
    """Where the elements of tensors come from that are made of ``full`` within it.

    What would be copied stays a view, as a copy has no memory of where it comes from.
    """

    def __init__(self, full: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._full = full
        self._names = {storage_id(tensor): name for name, tensor in full.items()}
        # Of storages that are computed: the names of what they are computed from.
        self._computed: dict[int, frozenset[str]] = {}
        self._alive: list[Tensor] = []  # so that the numbers of storages stay theirs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.contiguous, Tensor.clone):
            return args[0]
        try:
            result = func(*args, **(kwargs or {}))
        except RuntimeError:
            if func is not Tensor.view:
                raise
            result = args[0].reshape(*args[1:])  # of what would be a contiguous copy
        made = [tensor for tensor in _tensors(result) if self._is_new(tensor)]
        if made:
            sources = frozenset(n for t in _tensors((args, kwargs)) for n in self._sources(t))
            self._alive += made
            self._computed.update((storage_id(t), sources) for t in made)
        return result

    def _is_new(self, tensor: Tensor) -> bool:
        storage = storage_id(tensor)
        return storage not in self._names and storage not in self._computed

    def _sources(self, tensor: Tensor) -> frozenset[str]:
        storage = storage_id(tensor)
        if storage in self._names:
            return frozenset([self._names[storage]])
        return self._computed.get(storage, frozenset())

    def saved(self, name: str, tensor: Tensor) -> SavedTensor:
        """``tensor``, which was made within this trace, as a tensor of the files."""
        source = self._names.get(storage_id(tensor))
        is_view = source is not None and (
            tensor.is_contiguous() and tensor.dtype == self._full[source].dtype
        )
        return SavedTensor(
            name,
            tuple(tensor.shape),
            tensor.dtype,
            tuple(sorted(self._sources(tensor))),
            int(tensor.storage_offset()) if is_view else -1,
        )
