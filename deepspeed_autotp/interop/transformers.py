# SPDX-License-Identifier: Apache-2.0
"""What transformers models say about themselves; any other model says nothing."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp.interop.module_state import replace_method
from deepspeed_autotp.interop.peft import without_adapters

# Keys of a configuration that do not change what is computed, or that the weights show.
_NOT_COMPUTED = frozenset({"architectures", "dtype", "torch_dtype", "transformers_version"})


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """From a model's configuration; empty for a model without one."""

    model_type: str | None = None
    prefix: str = ""
    integers: Mapping[str, int] = field(default_factory=dict)
    input_embedding: nn.Module | None = None
    output_head: nn.Module | None = None


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    method = getattr(model, name, None)
    try:
        found = method() if callable(method) else None
    except (NotImplementedError, AttributeError):
        return None  # raised by transformers for models without token embeddings
    return found if isinstance(found, nn.Module) else None


def text_config(model: nn.Module) -> Any:
    """The configuration of the text model, that of the full model where it has several, or None."""
    config = getattr(model, "config", None)
    getter = getattr(config, "get_text_config", None)
    try:
        return getter() if callable(getter) else config
    except ValueError:  # raised where there are several text models
        return config


def other_modalities(model: nn.Module) -> list[str]:
    """The outermost modules of a multimodal model, such as a vision tower, whose configuration is
    neither that of the text model nor that of the full model."""
    text, full = text_config(model), getattr(model, "config", None)
    if text is full:
        return []
    found: list[str] = []
    for name, module in model.named_modules():
        config = vars(module).get("config")
        if (
            hasattr(config, "get_text_config")
            and type(config) not in (type(text), type(full))
            and not any(name.startswith(f"{outer}.") for outer in found)
        ):
            found.append(name)
    return found


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
        input_embedding=_submodule(model, "get_input_embeddings"),
        output_head=_submodule(model, "get_output_embeddings"),
    )


def config_values(model: nn.Module) -> dict[str, str]:
    """The configuration of ``model``, key by key, as text.

    Without where it was loaded from, by which version, and the dtype, which the weights show.
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


_ROUTED = ("hidden_states", "top_k_index", "top_k_weights")


def are_routed_experts(module: nn.Module) -> bool:
    """Whether a module is given tokens, routing indices and routing weights, and runs for each
    token the experts that it names: those of transformers do that can be run in several ways, and
    those whose forward says so."""
    if "_is_expert_parallel" in vars(module):
        return True
    if not _transformers_class(module).endswith("Experts"):
        return False
    return tuple(inspect.signature(type(module).forward).parameters)[1:] == _ROUTED


def are_blocks_of_experts(module: nn.Module) -> bool:
    """Whether a module is given a block of rows for each of its experts, in their order, and gives
    such blocks."""
    return _transformers_class(module) == "Llama4TextExperts"


def _transformers_class(module: nn.Module) -> str:
    """The name of a class of transformers, or ""."""
    cls = type(module)
    return cls.__name__ if cls.__module__.startswith("transformers.") else ""


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a subclass of nn.Linear with its own forward computes what nn.Linear does."""
    return _transformers_class(module) == "FalconLinear"


def tp_plan(model: nn.Module) -> dict[str, str]:
    """The ``tp_plan`` of ``model``: pattern to style, entries of the instance first.

    The plan of the instance names modules from the root and includes those of its submodels;
    older versions have that of the class and of the configuration. Of a PEFT model it is that of
    the model inside.
    """
    model = without_adapters(model)
    config_plan = getattr(text_config(model), "base_model_tp_plan", None)
    merged: dict[str, str] = {}
    for plan in (vars(model).get("_tp_plan"), type(model).__dict__.get("_tp_plan"), config_plan):
        if isinstance(plan, Mapping):
            prefix = f"{getattr(model, 'base_model_prefix', '')}."
            for pattern, style in plan.items():
                if pattern not in merged and f"{prefix}{pattern}" not in merged:
                    merged[pattern] = style
    return merged


def user_tp_plan_entries(model: nn.Module) -> set[str]:
    """The patterns of :func:`tp_plan` that come from no class of the model: the user's."""
    model = without_adapters(model)
    from_classes = {"embed_tokens"}  # transformers adds it to the plan of a base model
    for module in model.modules():
        for holder, key in (
            (module, "_tp_plan"),
            (vars(module).get("config"), "base_model_tp_plan"),
        ):
            plan = getattr(type(holder), key, None)
            from_classes.update(plan if isinstance(plan, Mapping) else ())
    return {
        pattern
        for pattern in tp_plan(model)
        if not any(f".{pattern}".endswith(f".{known}") for known in from_classes)
    }


def token_inputs(model: nn.Module, *, device: torch.device) -> dict[str, object] | None:
    """A few tokens that ``model`` accepts, equal on every rank, or None for other inputs."""
    size = getattr(text_config(model), "vocab_size", None)
    if not isinstance(size, int) or _submodule(model, "get_input_embeddings") is None:
        return None
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    generator = torch.Generator().manual_seed(20)
    placeholders = _placeholder_tokens(model)
    known = torch.tensor([i for i in range(size) if i not in placeholders])
    ids = known[torch.randint(0, len(known), (2, 8), generator=generator)].to(device)
    inputs: dict[str, object] = {"input_ids": ids}
    # A cache that is written to in the forward has no backward; training uses none.
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def _placeholder_tokens(model: nn.Module) -> set[int]:
    """Token ids of a multimodal model that stand for an image or the like, which would have to be
    given as well."""
    if text_config(model) is model.config:
        return set()
    keys = ("_token_id", "_token_index")
    return {v for k, v in vars(model.config).items() if type(v) is int and k.endswith(keys)}


def drops_layers(module: nn.Module) -> bool:
    """Whether a module skips some of its layers in training, as BART with ``layerdrop``."""
    dropped = vars(module).get("layerdrop")
    return isinstance(dropped, float) and dropped > 0


def hidden_states_argument(module: nn.Module) -> int | None:
    """At which position the forward of ``module`` takes ``output_hidden_states``, if it does."""
    names = list(inspect.signature(module.forward).parameters)
    return names.index("output_hidden_states") if "output_hidden_states" in names else None


def wants_hidden_states(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], position: int | None
) -> bool:
    """Whether a call asks for ``output_hidden_states``, by argument, whose ``position`` is that of
    :func:`hidden_states_argument`, or by configuration."""
    asked = kwargs.get("output_hidden_states")
    if position is not None and position < len(args):
        asked = args[position]
    config = vars(module).get("config")
    return bool(getattr(config, "output_hidden_states", False) if asked is None else asked)


def config_texts(model: nn.Module) -> dict[str, str]:
    """The files with the configuration of a model and of its generation, as ``save_pretrained``
    names them; none where the model is not of transformers."""
    config: Any = getattr(model, "config", None)
    if not callable(getattr(config, "to_json_string", None)):
        return {}
    values = json.loads(config.to_json_string(use_diff=True))
    values["architectures"] = values.get("architectures") or [type(model).__name__]
    texts = {"config.json": json.dumps(values, indent=2, sort_keys=True) + "\n"}
    generation: Any = getattr(model, "generation_config", None)
    if callable(getattr(generation, "to_json_string", None)):
        texts["generation_config.json"] = generation.to_json_string(use_diff=True)
    return texts


def guard_save_pretrained(model: nn.Module, *, is_sharded: Callable[[Tensor], bool]) -> None:
    """Let ``save_pretrained`` refuse to write the shards of one rank, also that of a backbone or
    of the model inside of a PeftModel.

    Without the argument ``state_dict`` it would write ``model.state_dict()``. Replaced by a method
    of the instance, so that a deep copy has its own.
    """
    for module in model.modules():
        is_model = callable(getattr(type(module), "save_pretrained", None))
        if module is model or (is_model and any(map(is_sharded, module.parameters()))):
            _guard(module)


def _guard(model: nn.Module) -> None:
    replace_method(model, "save_pretrained", _save_pretrained)
    # PEFT's own takes shards of what it loads.
    if not type(model).__module__.startswith("peft."):
        replace_method(model, "load_adapter", _load_adapter)


def _load_adapter(model: Any, *_: Any, **__: Any) -> Any:
    raise ValueError(
        f"{type(model).__name__} is sharded, and its load_adapter would load full tensors into "
        "shards; call peft.PeftModel.from_pretrained(model, folder)"
    )


def _save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    method = type(model).save_pretrained
    # PEFT's arguments are in another order than transformers'.
    bound = inspect.signature(method).bind(model, *args, **kwargs)
    named = {**bound.arguments, **bound.kwargs}
    # Accelerate calls it on every rank, with the full state on the one that writes.
    if named.get("state_dict") is None and named.get("is_main_process", True):
        raise ValueError(
            f"{type(model).__name__} is sharded, and its save_pretrained would write this rank's "
            "shards only; call deepspeed_autotp.save_pretrained(model, folder) on every rank"
        )
    return method(*bound.args, **bound.kwargs)


def output_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output, in order: in mappings, of which
    transformers' ModelOutput is one, sequences, named tuples and dataclasses.

    Not in other objects: caches hold the shards of each rank.
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
