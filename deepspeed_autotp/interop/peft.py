# SPDX-License-Identifier: Apache-2.0
"""PEFT's adapters: the model inside of them, which are plain LoRA, and when they change."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch
import wrapt
from torch import Tensor, nn

from deepspeed_autotp.interop.torch_private import own_parameters, submodules


def without_adapters(model: nn.Module) -> nn.Module:
    """The model inside of a PEFT model, at "base_model.model"; any other model itself."""
    if not type(model).__module__.startswith("peft."):
        return model
    inner = getattr(getattr(model, "base_model", None), "model", None)
    return inner if isinstance(inner, nn.Module) else model


def has_adapters(model: nn.Module) -> bool:
    """Whether ``save_pretrained`` of ``model`` writes adapters only."""
    is_wrapped = type(model).__module__.startswith("peft.")
    return is_wrapped or bool(getattr(model, "_hf_peft_config_loaded", False))


def saved_adapters(model: nn.Module) -> dict[str, set[str]]:
    """The names of the tensors of ``model`` that are saved with each of its adapters, of which a
    model of transformers saves the active one. Its folder is the one with the name of the adapter
    in that of the model; the latter for "default", and for a model of transformers."""
    peft_model: Any = model
    is_wrapped = type(model).__module__.startswith("peft.")
    adapters = list(peft_model.peft_config) if is_wrapped else peft_model.active_adapters()[:1]
    found = model.state_dict(keep_vars=True)
    stand_ins = {name: torch.empty(1) for name in found}
    peft = importlib.import_module("peft")
    result = {}
    for adapter in adapters:
        saved = peft.get_peft_model_state_dict(
            model, state_dict=dict(stand_ins), adapter_name=adapter
        )
        wanted = {id(tensor) for tensor in saved.values()}
        place = adapter if is_wrapped and adapter != "default" else ""
        result[place] = {name for name, tensor in stand_ins.items() if id(tensor) in wanted}
    return result


def write_adapters(model: nn.Module, folder: Path, full: dict[str, Tensor]) -> None:
    """Write the adapters of ``model``, whose tensors ``full`` has, as PEFT does."""
    saved: Any = model
    type(saved).save_pretrained(saved, folder, state_dict=full)


# Submodules of a LoRA layer. The factors of an embedding are parameters, and replicated.
_LORA_FACTORS = ("lora_A", "lora_B")
_LORA_OF_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_LORA_MODULES = ("base_layer", "lora_dropout", *_LORA_FACTORS)


def unsupported_adapters(model: nn.Module) -> dict[str, str]:
    """The layers with an adapter that is not plain LoRA, and what it is, by their names."""
    return {
        name: kind
        for name, module in model.named_modules()
        if "base_layer" in submodules(module) and (kind := _unsupported(module))
    }


def _unsupported(layer: nn.Module) -> str:
    """What the adapter of ``layer`` is; empty for plain LoRA."""
    variants: Mapping[str, object] = getattr(layer, "lora_variant", {})
    if variants:
        return ", ".join(dict.fromkeys(type(each).__name__ for each in variants.values()))
    is_plain = not own_parameters(layer) and all(
        _is_lora(key, child) for key, child in submodules(layer).items() if child is not None
    )
    # The layer of target_parameters has factors like any other, and uses them otherwise.
    if is_plain and not hasattr(layer, "parameter_name"):
        return ""
    return type(layer).__module__.removeprefix("peft.tuners.").removesuffix(".layer")


def _is_lora(key: str, child: nn.Module) -> bool:
    if key in _LORA_MODULES:
        return key == "base_layer" or not isinstance(child, nn.ParameterDict)
    return key in _LORA_OF_EMBEDDING or next(child.parameters(), None) is None


def refuse_kinds(model: nn.Module) -> None:
    """ValueError for adapters that do not wrap layers: what they do to a sharded one is not
    known."""
    configs: Any = getattr(model, "peft_config", None)
    for name, config in configs.items() if isinstance(configs, dict) else ():
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ValueError(
                f"the adapter '{name}' is {_kind(config)}, which a sharded model cannot be trained "
                "with; expected LORA"
            )


def _kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


# What draws or sets the factors without the weight of the layer.
_INITIAL = (True, False, "gaussian", "orthogonal")
# Options of LoRA, beside its variants, that look at full weights or share tensors.
_WHOLE_MODEL = ("layer_replication", "target_parameters", "trainable_token_indices")


def refuse_late(config: Any, *, on_meta: object) -> None:
    """ValueError for an adapter that cannot be added to a model that is sharded already."""
    if _kind(config) != "LORA":
        raise ValueError(
            f"peft_type: got {_kind(config)}, expected LORA: other adapters cannot be added to a "
            "sharded model"
        )
    if on_meta:
        raise ValueError("low_cpu_mem_usage: got True, expected False: the model is sharded")
    known = [each for each in _INITIAL if type(each) is type(config.init_lora_weights)]
    if config.init_lora_weights not in known:
        raise ValueError(
            f"init_lora_weights: got {config.init_lora_weights!r}, expected one of "
            f"{list(_INITIAL)}: it needs full weights; add this adapter before the model is sharded"
        )
    variants = [each.name for each in fields(config) if each.metadata.get("is_lora_variant")]
    for name in (*variants, *_WHOLE_MODEL, "ensure_weight_tying"):
        if getattr(config, name, None):
            raise ValueError(
                f"{name}: got {getattr(config, name)!r}: this kind of LoRA cannot be added to a "
                "sharded model; leave it out"
            )


def copies_of_modules(model: nn.Module) -> dict[int, nn.Parameter]:
    """The original of each parameter, by the id of its copy, in the modules that an adapter trains
    in full (``modules_to_save``)."""
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        children = submodules(module)
        original, copies = children.get("original_module"), children.get("modules_to_save")
        if original is None or copies is None:
            continue
        own = dict(original.named_parameters(remove_duplicate=False))
        for each in copies.children():
            for name, parameter in each.named_parameters(remove_duplicate=False):
                if name in own and own[name] is not parameter:
                    found[id(parameter)] = own[name]
    return found


def lora_layers(model: nn.Module) -> list[tuple[nn.Module, nn.Module, list[nn.Parameter]]]:
    """The layers with LoRA: what PEFT puts around them, they themselves, and all factors."""
    found = []
    for module in model.modules():
        children = submodules(module)
        base = children.get("base_layer")
        factors = [children.get(key) for key in (*_LORA_FACTORS, *_LORA_OF_EMBEDDING)]
        if base is not None and any(factors):
            own = [p for each in factors if each is not None for p in each.parameters()]
            found.append((module, base, own))
    return found


# What is the sharded model after a change.
Root = Callable[[], nn.Module]


class ModuleChanges(Protocol):
    """Lets PEFT change the modules of one sharded model."""

    def add(
        self, change: Callable[[], Any], *, check: Callable[[], None], root: Root | None = None
    ) -> Any:
        """Call ``change``, which adds an adapter, between the modules of the unsharded model. All
        ranks of the TP group call it; ValueError on each of them, with nothing changed, where
        ``check`` raises. After it the sharded model is ``root()``, or the one of before."""

    def remove(
        self, change: Callable[[], Any], *, check: Callable[[], None], root: Root | None = None
    ) -> Any:
        """As ``add``, where ``change`` takes adapters away."""


# What finds them for a model, or for one inside of it or around it; None where it is not sharded.
FindChanges = Callable[[nn.Module], "ModuleChanges | None"]


@functools.cache
def watch_peft(find: FindChanges) -> None:
    """Let PEFT change sharded models by ``ModuleChanges``, from now on or from when it is imported,
    which takes seconds."""
    wrapt.register_post_import_hook(lambda _: _watch(find), "peft")


def _watch(find: FindChanges) -> None:
    models = importlib.import_module("peft.peft_model")
    tuners = importlib.import_module("peft.tuners.tuners_utils")
    lora = importlib.import_module("peft.tuners.lora.model")
    for owner, name, replacement in (
        (models.PeftModel, "__init__", _made),
        (models.PeftModel, "add_adapter", _added),
        (tuners.BaseTuner, "inject_adapter", _injected),
        (tuners.BaseTuner, "delete_adapter", _deleted),
        (tuners.BaseTuner, "merge_adapter", _merged),
        (tuners.BaseTuner, "_unload_and_optionally_merge", _unloaded),
        (lora.LoraModel, "add_weighted_adapter", _weighted),
    ):
        original = getattr(owner, name, None)  # None in a version that has another name for it
        if original is not None and not hasattr(original, "autotp_original"):
            setattr(owner, name, _replaced(original, replacement, find))


def _replaced(original: Any, replacement: Any, find: FindChanges) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        return replacement(find, lambda: original(self, *args, **kwargs), self, bound.arguments)

    call.autotp_original = original  # type: ignore[attr-defined]
    return call


def _made(find: FindChanges, change: Callable[[], Any], peft: Any, given: Mapping[str, Any]) -> Any:
    changes = find(given["model"])
    if changes is None:
        return change()
    config, on_meta = given["peft_config"], given.get("low_cpu_mem_usage")
    return changes.add(
        change, check=lambda: refuse_late(config, on_meta=on_meta), root=lambda: peft
    )


def _added(
    find: FindChanges, change: Callable[[], Any], peft: Any, given: Mapping[str, Any]
) -> Any:
    # Within __init__ a model for prompts has no parameters yet, and is not sharded.
    changes = find(peft)
    if changes is None:
        return change()
    config, on_meta = given["peft_config"], given.get("low_cpu_mem_usage")
    return changes.add(change, check=lambda: refuse_late(config, on_meta=on_meta))


def _injected(
    find: FindChanges, change: Callable[[], Any], tuner: Any, given: Mapping[str, Any]
) -> Any:
    changes = find(given["model"])
    if changes is None:
        return change()
    adapter, on_meta = given["adapter_name"], given.get("low_cpu_mem_usage")
    config = tuner.peft_config[adapter]
    try:
        return changes.add(change, check=lambda: refuse_late(config, on_meta=on_meta))
    except BaseException:
        _forget_refused(tuner, given["model"], adapter)
        raise


def _forget_refused(tuner: Any, model: nn.Module, adapter: str) -> None:
    """Forget the configuration of an adapter that ``model`` did not get: transformers, and what
    PEFT makes for it, note it before they add the adapter."""
    layers: list[Any] = [layer for layer, _, _ in lora_layers(model)]
    if not any(adapter in layer.r for layer in layers):
        tuner.peft_config.pop(adapter, None)
    if not layers and not tuner.peft_config:
        vars(model).pop("_hf_peft_config_loaded", None)


def _deleted(find: FindChanges, change: Callable[[], Any], tuner: Any, _: Any) -> Any:
    changes = find(tuner.model)
    return change() if changes is None else changes.remove(change, check=lambda: None)


def _merged(
    find: FindChanges, change: Callable[[], Any], tuner: Any, given: Mapping[str, Any]
) -> Any:
    if given.get("safe_merge") and find(tuner.model) is not None:
        _refuse_safe_merge(given)
    return change()


def _refuse_safe_merge(given: Mapping[str, Any]) -> None:
    if given.get("safe_merge"):
        raise ValueError(
            "safe_merge: got True, expected False: the model is sharded, and a rank alone would "
            "stop at a value that is not finite; merge without it and look at the result"
        )


def _unloaded(
    find: FindChanges, change: Callable[[], Any], tuner: Any, given: Mapping[str, Any]
) -> Any:
    changes = find(tuner.model)
    if changes is None:
        return change()
    return changes.remove(change, check=lambda: _refuse_safe_merge(given), root=lambda: tuner.model)


def _weighted(find: FindChanges, change: Callable[[], Any], tuner: Any, _: Any) -> Any:
    if find(tuner.model) is not None:
        raise ValueError(
            "add_weighted_adapter: the model is sharded, and a combination of shards is not that "
            "of full adapters; combine them in an unsharded model and load the result"
        )
    return change()
