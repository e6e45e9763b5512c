# SPDX-License-Identifier: Apache-2.0
"""The only file that looks into foreign objects: DeepSpeed, transformers, mpu and mesh.

Everything here reads an attribute that somebody else defined, or writes one that somebody
else reads. A new version of DeepSpeed or transformers is followed in this file alone.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh


def deepspeed() -> ModuleType:
    """The deepspeed module; ImportError says what to install."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError(
            "initialize and install need DeepSpeed: pip install 'deepspeed>=0.19'. "
            "A training loop without DeepSpeed can use deepspeed_autotp.parallelize(model, ...)."
        )
    return importlib.import_module("deepspeed")


# --- transformers ---------------------------------------------------------------------------


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
    """The configuration of the text part, or None."""
    config = getattr(model, "config", None)
    getter = getattr(config, "get_text_config", None)
    return getter() if callable(getter) else config


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


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is GPT-2's transposed linear."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def tp_plan(model: nn.Module) -> dict[str, str]:
    """The transformers plan of ``model``: pattern to style, the model's own entries first.

    The instance's plan names modules from the root and already holds those of the
    sub-models; the class's and the configuration's are what older versions have.
    """
    config_plan = getattr(text_config(model), "base_model_tp_plan", None)
    merged: dict[str, str] = {}
    for plan in (vars(model).get("_tp_plan"), type(model).__dict__.get("_tp_plan"), config_plan):
        if isinstance(plan, Mapping):
            prefix = f"{getattr(model, 'base_model_prefix', '')}."
            for pattern, style in plan.items():
                if pattern not in merged and f"{prefix}{pattern}" not in merged:
                    merged[pattern] = style
    return merged


def trial_inputs(model: nn.Module, *, device: torch.device) -> dict[str, Tensor] | None:
    """A few tokens that ``model`` accepts, the same on every rank, or None when unknown."""
    size = getattr(text_config(model), "vocab_size", None)
    if not isinstance(size, int) or _called(model, "get_input_embeddings") is None:
        return None
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    draw = torch.Generator().manual_seed(20)
    ids = torch.randint(0, size, (2, 8), generator=draw).to(device)
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def output_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in output_tensors(value)]
    if isinstance(output, (tuple, list)):
        return [t for value in output for t in output_tensors(value)]
    return []


# --- DeepSpeed: parameters ------------------------------------------------------------------


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape as a layer, also of a parameter that ZeRO 3 has already partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ``deepspeed.zero.Init`` holds this parameter's weight."""
    return hasattr(parameter, "ds_id")


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """Within it, parameters that ZeRO 3 partitioned over the data-parallel ranks are there."""
    partitioned = [p for p in parameters if is_partitioned(p)]
    if not partitioned:
        return nullcontext()
    context: AbstractContextManager[None] = deepspeed().zero.GatheredParameters(partitioned)
    return context


# What zero.Init gives a parameter beside the names that begin with "ds_".
_PARTITIONED = frozenset(
    {
        *("all_gather", "all_gather_coalesced", "partition", "partition_gradients"),
        *("reduce_gradients_at_owner", "aligned_size", "padding_size", "partition_numel"),
        *("item", "convert_to_zero_parameters", "is_external_param", "nvme_swapper"),
    }
)


def make_plain(parameters: Iterable[nn.Parameter]) -> None:
    """Make parameters that ``deepspeed.zero.Init`` holds whole and ordinary, in place.

    Every rank that built the model calls it, and then holds the whole model.
    """
    for parameter in parameters:
        if is_partitioned(parameter):
            with gathered([parameter]):
                whole = parameter.detach().clone()
            attributes = vars(parameter)
            for name in [n for n in attributes if n.startswith("ds_") or n in _PARTITIONED]:
                del attributes[name]
            parameter.data = whole


class ParameterKeeper(Protocol):
    """What DeepSpeed calls to make a module's parameters whole and to cut them again."""

    def gather_params(self, params_list: list[Tensor | None]) -> None: ...

    def _tp_partition(self, params_list: list[Tensor | None]) -> None: ...


def mark_parameters(
    parameters: Iterable[nn.Parameter], *, keeper: ParameterKeeper, counted: Callable[[int], bool]
) -> None:
    """Give every parameter the attributes that DeepSpeed 0.19.8 reads.

    ``counted(i)`` says whether this rank counts parameter ``i`` in the gradient norm although
    it is not the first rank; DeepSpeed counts all of the first rank's.
    """
    for index, parameter in enumerate(parameters):
        written: Any = parameter
        written.gather_params = keeper.gather_params
        written._tp_partition = keeper._tp_partition
        written.ds_is_replaced_module = True
        written.tensor_model_parallel = counted(index)


def mark_model(model: nn.Module) -> None:
    """Tell DeepSpeed's engine that the model is partitioned already."""
    written: Any = model
    written.ds_autotp_parsed = True


# --- DeepSpeed: groups and engine -----------------------------------------------------------


def init_distributed(*, port: int, required: bool | None) -> None:
    """What ``deepspeed.initialize`` does first, done before we agree over ranks."""
    module = deepspeed()
    module.init_distributed(
        dist_backend=module.get_accelerator().communication_backend_name(),
        distributed_port=port,
        dist_init_required=required,
    )


def engine_group(*, tp_size: int) -> dist.ProcessGroup:
    """The group that DeepSpeed's engine uses: ``tp_size`` consecutive ranks, made at first use."""
    groups = importlib.import_module("deepspeed.utils.groups")
    groups._init_tp_mesh_device(tensor_model_parallel_size=tp_size)
    handle: dist.ProcessGroup = groups.get_tensor_model_parallel_group()
    return handle


def engine_group_size() -> int | None:
    """Ranks of the group that DeepSpeed's engine uses, or None where it has not made one."""
    groups = importlib.import_module("deepspeed.utils.groups")
    made = groups._TENSOR_MODEL_PARALLEL_GROUP
    return None if made is None else dist.get_world_size(made)


def refuse_engine_record() -> None:
    """ValueError where DeepSpeed's own ``tp_model_init`` was called: its ``initialize`` would
    shard by DeepSpeed's rules what ours has left alone."""
    recorded = importlib.import_module("deepspeed.runtime.tensor_parallel.init_utils")
    if recorded._TP_MODEL_INIT_ARGS is not None:
        raise ValueError(
            "deepspeed.tp_model_init was called: call deepspeed_autotp.tp_model_init in its place, "
            "or deepspeed_autotp.install() before it"
        )


def config_argument(args: Any, config: Any, config_params: Any) -> Any:
    """The configuration among the places where ``deepspeed.initialize`` accepts one."""
    passed = config if config is not None else config_params
    named = getattr(args, "deepspeed_config", None) or getattr(args, "deepscale_config", None)
    if passed is not None and named is not None:
        raise ValueError(
            f"initialize: args.deepspeed_config is {named!r}, and config is passed, too; pass one"
        )
    if passed is None and named is None:
        raise ValueError(
            "initialize: no configuration: pass config=..., or args with deepspeed_config"
        )
    return named if passed is None else passed


def mpu_group(mpu: Any) -> dist.ProcessGroup | None:
    """The tensor-parallel group of a Megatron-like ``mpu``, or None when it has none."""
    for name in ("get_tensor_model_parallel_group", "get_model_parallel_group"):
        method = getattr(mpu, name, None)
        if callable(method):
            handle: dist.ProcessGroup = method()
            return handle
    return None


def unwrapped(engine_or_model: Any) -> Iterator[nn.Module]:
    """``engine_or_model`` and, inwards, what DeepSpeed, DDP or compile wrapped in it."""
    inner = engine_or_model
    while isinstance(inner, nn.Module):
        yield inner
        inner = vars(inner).get("_orig_mod") or getattr(inner, "module", None)


def mesh_group(mesh: Any) -> dist.ProcessGroup:
    """The group of a one-dimensional DeviceMesh, or of its dimension "tp"."""
    if not isinstance(mesh, DeviceMesh):
        raise ValueError(f"parallelize: mesh: got {type(mesh).__name__}, expected a DeviceMesh")
    names = mesh.mesh_dim_names or ()
    if mesh.ndim > 1 and "tp" not in names:
        raise ValueError(
            f"parallelize: the mesh has the dimensions {list(names) or mesh.ndim}; name the one "
            'over which the model is cut "tp", or pass mesh["that dimension"]'
        )
    handle: dist.ProcessGroup = mesh.get_group("tp" if "tp" in names else 0)
    return handle


def engine_initialize() -> Callable[..., Any]:
    """DeepSpeed's own ``initialize``, also where ``install`` has put ours in its place."""
    found = deepspeed().initialize
    original: Callable[..., Any] = getattr(found, "deepspeed_original", found)
    return original


def without_config(args: Any) -> Any:
    """``args`` without a configuration: DeepSpeed refuses one there beside ours."""
    if args is None:
        return None
    bare = copy.copy(args)
    for name in ("deepspeed_config", "deepscale_config"):
        if hasattr(bare, name):
            setattr(bare, name, None)
    return bare


def refuse_pipeline(model: nn.Module) -> None:
    """ValueError for DeepSpeed's pipeline modules."""
    if isinstance(model, deepspeed().PipelineModule):
        raise ValueError(
            "tensor parallelism of a PipelineModule is not supported; shard a plain model, or set "
            "tensor_parallel.autotp_size to 0"
        )


def settle_engine_config(config: dict[str, Any], *, mpu: Any) -> None:
    """Let DeepSpeed check its configuration before anything is sharded, and fix the batch sizes.

    DeepSpeed checks ``train_batch_size`` against all ranks, and ZeRO 3 once more against the
    data-parallel ranks alone, which cannot both hold. What both derive it from can.
    """
    try:
        checked = deepspeed().DeepSpeedConfig(config, mpu)
    except Exception as error:  # assertions, pydantic's errors and DeepSpeed's own
        raise ValueError(f"DeepSpeed refuses the configuration: {error}") from error
    config.pop("train_batch_size", None)
    config["train_micro_batch_size_per_gpu"] = checked.train_micro_batch_size_per_gpu
    config["gradient_accumulation_steps"] = checked.gradient_accumulation_steps


def default_whole_weights_on_save(config: dict[str, Any]) -> None:
    """Let ``save_16bit_model`` and ``Trainer.save_model`` write whole weights.

    DeepSpeed ties the gathering over tensor-parallel ranks to a key of ZeRO 3, which is off by
    default; without it saving fails. A value that the user wrote stays.
    """
    zero = config.setdefault("zero_optimization", {})
    if isinstance(zero, dict):
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)


def save_whole_weights(engine: Any, *, whole: Callable[[bool], dict[str, Tensor] | None]) -> None:
    """Let ``engine`` write whole weights wherever it writes a model without its optimizer.

    ``whole(frozen)`` is the state on the first rank and None elsewhere. Without it DeepSpeed
    0.19.8 writes the first rank's shards in ``save_16bit_model`` unless ZeRO 3 is on, and
    leaves the buffers away in what ``Trainer.save_model`` takes.
    """
    save = engine.save_16bit_model

    def save_16bit_model(
        save_dir: str,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        engine.module_state_dict = lambda **_: whole(not exclude_frozen_parameters)
        try:
            saved: bool = save(save_dir, save_filename, exclude_frozen_parameters)
        finally:
            del engine.module_state_dict
        return saved

    engine.save_16bit_model = save_16bit_model
    engine._replace_module_consolidated_state_dict = lambda: whole(True)


def has_stepped(optimizer: Any) -> bool:
    """Whether an optimizer holds state for any parameter."""
    return bool(getattr(optimizer, "state", None))


# --- DeepSpeed: the place of our functions ---------------------------------------------------

_REPLACED = ("initialize", "tp_model_init")


def install_functions(ours: Mapping[str, Callable[..., Any]]) -> None:
    """Put our functions in the place of DeepSpeed's; a second call changes nothing."""
    module = deepspeed()
    for name in _REPLACED:
        current = getattr(module, name)
        if not hasattr(current, "deepspeed_original"):
            setattr(module, name, _standing_in(ours[name], current))


def uninstall_functions() -> None:
    """Put DeepSpeed's own functions back."""
    module = deepspeed()
    for name in _REPLACED:
        current = getattr(module, name)
        setattr(module, name, getattr(current, "deepspeed_original", current))


def _standing_in(ours: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(ours)
    def call(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    written: Any = call
    written.deepspeed_original = original
    return call


def set_engine_mode(*, training: bool) -> None:
    """DeepSpeed's AutoTP mode; nothing without DeepSpeed."""
    if importlib.util.find_spec("deepspeed") is not None:
        deepspeed().module_inject.set_autotp_mode(training=training)


def engine_mode_is_training() -> bool:
    """DeepSpeed's AutoTP mode; without DeepSpeed there is only training."""
    if importlib.util.find_spec("deepspeed") is None:
        return True
    layers = importlib.import_module("deepspeed.module_inject.layers")
    return bool(layers.is_autotp_training_mode())
