# SPDX-License-Identifier: Apache-2.0
"""What a model says about itself, with or without transformers."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Of a configuration: where it comes from, and what the weights tell themselves.
_NOT_COMPUTED = frozenset({"architectures", "dtype", "torch_dtype", "transformers_version"})


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model's configuration says; empty for a model without one."""

    model_type: str | None = None
    prefix: str = ""
    integers: Mapping[str, int] = field(default_factory=dict)
    input_embedding: nn.Module | None = None
    output_head: nn.Module | None = None


def _called(model: nn.Module, name: str) -> nn.Module | None:
    method = getattr(model, name, None)
    try:
        found = method() if callable(method) else None
    except (NotImplementedError, AttributeError):
        return None  # transformers raises for models without token embeddings
    return found if isinstance(found, nn.Module) else None


def text_config(model: nn.Module) -> Any:
    """The configuration of the text part, of the whole where it has several, or None."""
    config = getattr(model, "config", None)
    getter = getattr(config, "get_text_config", None)
    try:
        return getter() if callable(getter) else config
    except ValueError:  # transformers asks which one is meant
        return config


def other_parts(model: nn.Module) -> list[str]:
    """The outermost modules of a model of several senses that have a configuration of their own,
    other than that of the text part."""
    text, whole = text_config(model), getattr(model, "config", None)
    if text is whole:
        return []
    parts: list[str] = []
    for name, module in model.named_modules():
        config = vars(module).get("config")
        if (
            hasattr(config, "get_text_config")
            and type(config) not in (type(text), type(whole))
            and not any(name.startswith(f"{part}.") for part in parts)
        ):
            parts.append(name)
    return parts


def model_facts(model: nn.Module) -> ModelFacts:
    """Type, base-model prefix, integers, input embedding and output head of ``model``."""
    config = text_config(model)
    if config is None:
        return ModelFacts()
    values = dict(config) if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    model_type = getattr(model.config, "model_type", None)
    prefix = getattr(model, "base_model_prefix", "")
    return ModelFacts(
        model_type=model_type if isinstance(model_type, str) else None,
        prefix=prefix if isinstance(prefix, str) else "",
        integers={k: v for k, v in values.items() if type(v) is int},
        input_embedding=_called(model, "get_input_embeddings"),
        output_head=_called(model, "get_output_embeddings"),
    )


def config_values(model: nn.Module) -> dict[str, str]:
    """What the configuration of ``model`` says of what it computes, key by key, as text.

    Not where it was loaded from and by which version, nor the data type, which the weights tell.
    """
    listed = getattr(getattr(model, "config", None), "to_dict", None)
    values = listed() if callable(listed) else None
    return dict(_flat(values)) if isinstance(values, Mapping) else {}


def _flat(values: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = f"{before}{key}"
        if str(key).startswith("_") or key in _NOT_COMPUTED:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        else:
            yield name, repr(value)


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is GPT-2's transposed linear."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the forward of ``module``, a linear of a class of its own, is that of a linear."""
    cls = type(module)
    return cls.__name__ == "FalconLinear" and cls.__module__.startswith("transformers.")


def tp_plan(model: nn.Module) -> dict[str, str]:
    """The transformers plan of ``model``: pattern to style, the model's own entries first.

    The instance's plan names modules from the root and already holds those of the
    sub-models; the class's and the configuration's are what older versions have. Of a model
    with adapters it is that of the model inside.
    """
    model = _without_adapters(model)
    config_plan = getattr(text_config(model), "base_model_tp_plan", None)
    merged: dict[str, str] = {}
    for plan in (vars(model).get("_tp_plan"), type(model).__dict__.get("_tp_plan"), config_plan):
        if isinstance(plan, Mapping):
            prefix = f"{getattr(model, 'base_model_prefix', '')}."
            for pattern, style in plan.items():
                if pattern not in merged and f"{prefix}{pattern}" not in merged:
                    merged[pattern] = style
    return merged


def own_entries(model: nn.Module) -> set[str]:
    """The patterns of :func:`tp_plan` that no class of the model brings along: the user's."""
    model = _without_adapters(model)
    brought = {"embed_tokens"}  # which transformers adds to the plan of a base model
    for module in model.modules():
        for holder, key in (
            (module, "_tp_plan"),
            (vars(module).get("config"), "base_model_tp_plan"),
        ):
            plan = getattr(type(holder), key, None)
            brought.update(plan if isinstance(plan, Mapping) else ())
    return {
        pattern
        for pattern in tp_plan(model)
        if not any(f".{pattern}".endswith(f".{known}") for known in brought)
    }


def _without_adapters(model: nn.Module) -> nn.Module:
    """The model inside of PEFT's, whose names begin with "base_model.model."; any other itself."""
    if not type(model).__module__.startswith("peft."):
        return model
    inner = getattr(getattr(model, "base_model", None), "model", None)
    return inner if isinstance(inner, nn.Module) else model


# What LoRA has beside the layer that it wraps. Factors of an embedding are parameters, and whole.
_LORA = frozenset({"base_layer", "lora_dropout", "lora_A", "lora_B"})
_LORA_OF_EMBEDDING = frozenset({"lora_embedding_A", "lora_embedding_B"})


def other_adapter(model: nn.Module) -> str:
    """The name of a layer with an adapter that is not plain LoRA; empty where there is none."""
    name: str
    for name, module in model.named_modules():
        if "base_layer" not in module._modules:
            continue
        plain = not module._parameters and all(
            _is_lora(part, held) for part, held in module._modules.items() if held is not None
        )
        if not plain:
            return name
    return ""


def _is_lora(part: str, held: nn.Module) -> bool:
    if part in _LORA:
        return part == "base_layer" or not isinstance(held, nn.ParameterDict)
    return part in _LORA_OF_EMBEDDING or next(held.parameters(), None) is None


def trial_inputs(model: nn.Module, *, device: torch.device) -> dict[str, object] | None:
    """A few tokens that ``model`` accepts, the same on every rank, or None when unknown."""
    size = getattr(text_config(model), "vocab_size", None)
    if not isinstance(size, int) or _called(model, "get_input_embeddings") is None:
        return None
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    draw = torch.Generator().manual_seed(20)
    places = _places(model)
    known = torch.tensor([i for i in range(size) if i not in places])
    ids = known[torch.randint(0, len(known), (2, 8), generator=draw)].to(device)
    inputs: dict[str, object] = {"input_ids": ids}
    # A state that is written to in the forward has no backward; training keeps none.
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def _places(model: nn.Module) -> set[int]:
    """Tokens of a model of several senses that stand for an image or the like, which has to be
    given beside them."""
    if text_config(model) is model.config:
        return set()
    keys = ("_token_id", "_token_index")
    return {v for k, v in vars(model.config).items() if type(v) is int and k.endswith(keys)}


def drops_layers(module: nn.Module) -> bool:
    """Whether a module of transformers skips some of its layers in training, as BART may."""
    dropped = vars(module).get("layerdrop")
    return isinstance(dropped, float) and dropped > 0


def wants_hidden_states(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a transformers model is asked for what its layers give one by one."""
    said = kwargs.get("output_hidden_states")
    config = vars(module).get("config")
    return bool(getattr(config, "output_hidden_states", False) if said is None else said)


def guard_save_pretrained(model: nn.Module) -> None:
    """Let transformers' ``save_pretrained`` refuse to write the shards of one rank.

    It takes what ``state_dict()`` gives where no ``state_dict`` is passed. A method of the
    instance, so that a deep copy has one of its own.
    """
    if callable(getattr(type(model), "save_pretrained", None)):
        vars(model)["save_pretrained"] = types.MethodType(_save_whole, model)


def _save_whole(model: Any, *args: Any, **kwargs: Any) -> Any:
    method = type(model).save_pretrained
    # The positions of PEFT's arguments are others than those of transformers'.
    bound = inspect.signature(method).bind(model, *args, **kwargs)
    named = {**bound.arguments, **bound.kwargs}
    # Accelerate calls it on every rank, and has the whole state on the one that writes.
    if named.get("state_dict") is None and named.get("is_main_process", True):
        raise ValueError(
            f"{type(model).__name__} is sharded, and save_pretrained would write this rank's part "
            "of it. On every rank: whole = deepspeed_autotp.full_state_dict(model); then on the "
            "first: model.save_pretrained(folder, state_dict=whole)"
        )
    return method(*bound.args, **bound.kwargs)


def output_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output, in order: within mappings, of which
    transformers' ModelOutput is one, sequences, named or not, and dataclasses.

    Other objects are not looked into: caches hold what each rank has for itself.
    """
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in output_tensors(value)]
    if isinstance(output, (tuple, list)):
        return [t for value in output for t in output_tensors(value)]
    if is_dataclass(output) and not isinstance(output, type):
        values = (getattr(output, each.name, None) for each in fields(output))
        return [t for value in values for t in output_tensors(value)]
    return []
