# SPDX-License-Identifier: Apache-2.0
"""The loader of transformers, made to load tensors of which the values come later.

Everything that ``from_pretrained`` decides is left to it: configuration, class, data types, names,
conversions, ties, the initialisation of what is missing.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from deepspeed_autotp.interop.progress_bars import without_progress_bars
from deepspeed_autotp.interop.quantizers import refuse_quantization
from deepspeed_autotp.interop.versions import required

_required = functools.partial(
    required, project="transformers", needed_for="from_pretrained of shards"
)

# What of a call of from_pretrained would do the same in another way.
_REFUSED = ("device_map", "tp_plan", "tp_size", "distributed_config", "device_mesh", "gguf_file")

Checkpoint = Callable[[Sequence[str]], Mapping[str, Tensor]]
CheckIndex = Callable[[Path], object]
Equal = Callable[[Tensor, Tensor], bool]

_log = logging.getLogger("deepspeed_autotp")


def _modeling() -> Any:
    return importlib.import_module("transformers.modeling_utils")


def load_pickled(file: str) -> Mapping[str, Tensor]:
    """The tensors of a ``.bin`` file, mapped into memory where its format allows that."""
    loaded: Mapping[str, Tensor] = _required(_modeling(), "load_state_dict")(file)
    return loaded


def refuse_arguments(arguments: Mapping[str, Any]) -> None:
    """ValueError for arguments of ``from_pretrained`` that do not go with loading shards."""
    if given := [key for key in _REFUSED if arguments.get(key) is not None]:
        raise ValueError(
            f"{given[0]} does not go with deepspeed_autotp's loading of shards: the TP size says "
            "what each rank loads, and device where to; leave it out"
        )
    if arguments.get("state_dict") is not None:
        raise ValueError("state_dict: got weights in memory, of which no slices are read")


@contextmanager
def traced_loading(
    checkpoint: Checkpoint, are_equal: Equal, check_index: CheckIndex
) -> Iterator[None]:
    """Within it ``from_pretrained`` loads what ``checkpoint`` makes of the files it has found;
    ``are_equal`` compares the values of two of these tensors, where a checkpoint has both of a tied
    pair. ``check_index`` is given the index of several files before they are looked for.

    ValueError for a quantised checkpoint, and for one with an adapter. ZeRO 3 partitions no model
    there.
    """
    modeling = _modeling()
    base = modeling.PreTrainedModel
    load = _required(base, "_load_pretrained_model")

    def load_traced(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any
    ) -> Any:
        tensors = checkpoint(checkpoint_files or ())
        info, offloaded = load(model, tensors, None, load_config, *args)
        _check(model, tensors, info, load_config)
        _tie_equal(model, info, are_equal)
        return info, offloaded

    with ExitStack() as stack:
        for owner, name, value in (
            (base, "_load_pretrained_model", staticmethod(load_traced)),
            (modeling, "get_hf_quantizer", _without_quantizer),
            (modeling, "maybe_load_adapters", _without_adapter(modeling)),
            (modeling, "get_checkpoint_shard_files", _with_index(modeling, check_index)),
            (modeling, "is_deepspeed_zero3_enabled", lambda: False),
        ):
            stack.enter_context(_replaced(owner, name, value))
        stack.enter_context(without_progress_bars())
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    _required(owner, name)
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _without_adapter(modeling: Any) -> Callable[..., Any]:
    """What transformers looks for an adapter with; ValueError where it finds one."""
    find = _required(modeling, "maybe_load_adapters")

    def maybe_load_adapters(*args: Any, **kwargs: Any) -> Any:
        adapter, base, _ = found = find(*args, **kwargs)
        if adapter is not None:
            first, folder = f"load the base model '{base}'", f"'{adapter}'"
            if adapter == base:
                first = "move its files into a folder of their own, load the model"
                folder = "that folder"
            raise ValueError(
                f"'{adapter}' has an adapter (adapter_config.json), which is not loaded as shards "
                f"together with its model; {first}, then peft.PeftModel.from_pretrained(model, "
                f"{folder})"
            )
        return found

    return maybe_load_adapters


def _with_index(modeling: Any, check_index: CheckIndex) -> Callable[..., Any]:
    """What transformers finds the files of an index with, which takes them from anywhere."""
    find = _required(modeling, "get_checkpoint_shard_files")

    def get_checkpoint_shard_files(model: Any, index_filename: Any, *args: Any, **more: Any) -> Any:
        check_index(Path(index_filename))
        return find(model, index_filename, *args, **more)

    return get_checkpoint_shard_files


def _without_quantizer(
    config: Any, quantization_config: Any, device_map: Any, *args: Any, **kwargs: Any
) -> tuple[None, Any, Any]:
    found = quantization_config or getattr(config, "quantization_config", None)
    if found is not None:
        refuse_quantization(found)
        raise ValueError(
            "quantization_config: got load_in_4bit, expected weights in floating point: they are "
            "quantised before they are sharded; load the model with its own from_pretrained on "
            "every rank, and give it to parallelize or initialize"
        )
    return None, config, device_map


@contextmanager
def replaced_from_pretrained(
    load: Callable[[Callable[[], Any], Mapping[str, Any]], Any],
) -> Iterator[None]:
    """Within it each outermost call of ``from_pretrained`` of a model is given to ``load``: as a
    function that makes it, or with ``output_loading_info`` a pair, and its keyword arguments."""
    base = _modeling().PreTrainedModel
    original = vars(base)["from_pretrained"].__func__
    is_inner = False

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal is_inner
        call = functools.partial(original, cls, *args, **kwargs)
        if is_inner:
            return call()
        is_inner = True
        try:
            return load(call, kwargs)
        finally:
            is_inner = False

    with _replaced(base, "from_pretrained", classmethod(from_pretrained)):
        yield


def _check(model: Any, tensors: Mapping[str, Tensor], info: Any, load_config: Any) -> None:
    """ValueError for a checkpoint of another model, or one that cannot be converted."""
    where, what = load_config.pretrained_model_name_or_path, type(model).__name__
    for name, text in info.conversion_errors.items():
        reason = text.strip().splitlines()[-2:]
        raise ValueError(f"{where}: {name} cannot be converted for {what}: {' '.join(reason)}")
    if info.mismatched_keys and not load_config.ignore_mismatched_sizes:
        name, found, expected = min(info.mismatched_keys)
        others = len(info.mismatched_keys) - 1
        raise ValueError(
            f"{where}: {name} has the shape {list(found)}, but {what} of this configuration needs "
            f"{list(expected)}{f', and so do {others} others' if others else ''}; load the "
            "configuration of the checkpoint, or pass ignore_mismatched_sizes=True"
        )
    expected = set(model.state_dict())
    if tensors and expected and expected <= info.missing_keys:
        raise ValueError(
            f"{where}: none of its {len(tensors)} tensors (as {min(tensors)}) belongs to {what} "
            f"(as {min(expected)}): it is the checkpoint of another model"
        )


def _tie_equal(model: Any, info: Any, are_equal: Equal) -> None:
    """Of a tied pair that the checkpoint has both of, as transformers does: tie them where they are
    equal, and else leave both as they are.

    transformers looks at the values, and at nothing where there are none yet.
    """
    for target, source in list(model.all_tied_weights_keys.items()):
        if {target, source} & info.missing_and_mismatched():
            continue
        if are_equal(model.get_parameter(target), model.get_parameter(source)):
            info.missing_keys.add(target)  # which is then tied
        else:
            _log.warning(
                "%s and %s are to be tied, but the checkpoint has different values for them: they "
                "stay two weights; set tie_word_embeddings to false in its configuration",
                target,
                source,
            )
            model.all_tied_weights_keys.pop(target)
