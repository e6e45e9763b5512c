# SPDX-License-Identifier: Apache-2.0
"""Every name of torch that begins with an underscore: one function for each.

RuntimeError, from each of them, where the installed torch does not have the name.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import optimizer as optimizers
from torch.utils import _pytree as pytree

from deepspeed_autotp.interop.versions import required

T = TypeVar("T")

_required = functools.partial(required, project="torch")


def version_counter(x: Tensor) -> int:
    """A number that every write to ``x`` in place increases."""
    found: int = _required(x, "_version", needed_for="finding writes in place")
    return found


def storage_id(tensor: Tensor) -> int:
    """A number of the storage, which is not given anew while the storage lives."""
    number: int = StorageWeakRef(tensor.untyped_storage()).cdata
    return number


def backward_id() -> int:
    """The number of the backward pass that runs on this thread; negative outside of one."""
    read = _required(torch._C, "_current_graph_task_id", needed_for="the overlap of gradients")
    found: int = read()
    return found


def is_called(modules: Container[nn.Module]) -> bool:
    """Whether a call of one of ``modules`` is on the stack of this thread."""
    call = _required(nn.Module, "_wrapped_call_impl", needed_for="the sums of gradients").__code__
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is call and frame.f_locals["self"] in modules:
            return True
        frame = frame.f_back
    return False


def keeps_graph() -> bool:
    """Whether the backward pass that runs was called with ``retain_graph=True``."""
    name = "_get_current_graph_task_keep_graph"
    read = _required(torch._C._autograd, name, needed_for="the loss over a sharded vocabulary")
    found: bool = read()
    return found


def reshaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``x``, to which nothing else refers, in another shape; no view, as models write into it."""
    reshape = _required(torch.ops.aten, "_unsafe_view", needed_for="sequence parallelism")
    y: Tensor = reshape(x, shape)
    return y


def submodules(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """The direct submodules; None for one that was assigned None."""
    found: Mapping[str, nn.Module | None] = _required(
        module, "_modules", needed_for="reading a model"
    )
    return found


def saves_tensors_by() -> object:
    """What packs the tensors that autograd saves, within the innermost checkpoint or other hooks
    for saved tensors; None outside of all."""
    name = "_top_saved_tensors_default_hooks"
    read = _required(torch._C._autograd, name, needed_for="sequence parallelism")
    hooks = read(False)
    return None if hooks is None else hooks[0]


def own_parameters(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """The parameters of the module itself; None for one that was registered as None."""
    found: Mapping[str, nn.Parameter | None] = _required(
        module, "_parameters", needed_for="reading a model"
    )
    return found


def keep_modules(root: nn.Module) -> Callable[[], None]:
    """What puts back the submodules and parameters that each module of ``root`` has now, and which
    of the parameters train."""
    kept = [(m, dict(submodules(m)), dict(own_parameters(m))) for m in root.modules()]
    trains = [(parameter, parameter.requires_grad) for parameter in root.parameters()]

    def put_back() -> None:
        for module, children, parameters in kept:
            for current, before in ((module._modules, children), (module._parameters, parameters)):
                current.clear()
                current.update(before)  # type: ignore[arg-type]
        for parameter, flag in trains:
            parameter.requires_grad_(flag)

    return put_back


def forward_pre_hooks(module: nn.Module) -> Collection[Any]:
    """The hooks that run before the module's forward."""
    hooks = _required(module, "_forward_pre_hooks", needed_for="registering a hook once")
    found: Collection[Any] = hooks.values()
    return found


def hooked_once(hook: Callable[..., None], **options: bool) -> Callable[[nn.Module], None]:
    """What calls ``hook`` before each forward of a module, registered with ``options``, unless one
    of its class is: an engine may be built around a model that ``parallelize`` has sharded."""

    def register(module: nn.Module) -> None:
        if not any(type(each) is type(hook) for each in forward_pre_hooks(module)):
            module.register_forward_pre_hook(hook, **options)

    return register


def state_dict_pre_hooks(module: nn.Module) -> Collection[Any]:
    """The hooks that run before the module's ``state_dict``."""
    hooks = _required(module, "_state_dict_pre_hooks", needed_for="registering a hook once")
    found: Collection[Any] = hooks.values()
    return found


def output_hooks(module: nn.Module) -> list[Any]:
    """The hooks that see what the module's forward returns, or its gradient."""
    names = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = [_required(module, name, needed_for="the logits of an output") for name in names]
    return [hook for registered in found for hook in registered.values()]


def has_user_hooks(module: nn.Module, *, inputs: bool = False) -> bool:
    """Whether hooks of a user watch what ``module`` returns, or, with ``inputs``, is given; hooks
    of all modules among them. Those of transformers, which record outputs, stay for good."""
    own = ("deepspeed.", "deepspeed_autotp.", "torch.distributed.fsdp.", "transformers.utils.")
    hooks = [*output_hooks(module), *_hooks_of_all_modules()]
    if inputs:
        hooks += forward_pre_hooks(module)
    return any(not str(getattr(hook, "__module__", "")).startswith(own) for hook in hooks)


def _hooks_of_all_modules() -> list[Any]:
    kinds = ("forward_pre_hooks", "forward_hooks", "backward_hooks", "backward_pre_hooks")
    every = nn.modules.module
    found = (
        _required(every, f"_global_{kind}", needed_for="the logits of an output") for kind in kinds
    )
    return [hook for registered in found for hook in registered.values()]


def has_gradient_hooks(x: Tensor) -> bool:
    """Whether hooks are registered for the gradient of ``x``."""
    return bool(_required(x, "_backward_hooks", needed_for="gradient hooks"))


def written_arguments(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a call of an operator of torch writes to."""
    schema = _required(operator, "_schema", needed_for="the weight of an output head")
    if not schema.is_mutable:
        return []
    written = [
        each.alias_info is not None and each.alias_info.is_write for each in schema.arguments
    ]
    named = {each.name: flag for each, flag in zip(schema.arguments, written, strict=True)}
    found = [value for value, flag in zip(args, written, strict=False) if flag]
    found += [value for name, value in kwargs.items() if named.get(name)]
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in found]
    return [each for values in lists for each in values]


def with_leaves(kind: type[T], change: Callable[[T], Any], tree: Any) -> Any:
    """``tree``, of mappings and sequences, with every leaf of ``kind`` changed."""
    tree_map = _required(pytree, "tree_map_only", needed_for="tensors within what torch is given")
    return tree_map(kind, change, tree)


def tensor_without_memory(
    kind: type[Tensor], shape: Sequence[int], *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor of a subclass that has no values."""
    make = _required(kind, "_make_wrapper_subclass", needed_for="the weight of an output head")
    made: Tensor = make(kind, shape, dtype=dtype, device=device)
    return made


def plain_results() -> Any:
    """The ``__torch_function__`` of a subclass of Tensor whose operations give plain tensors."""
    name = "_disabled_torch_function_impl"
    return _required(torch._C, name, needed_for="the weight of an output head")


def device_types(handle: dist.ProcessGroup) -> list[torch.device]:
    """The types of the devices on which collectives of ``handle`` take tensors."""
    found: list[torch.device] = _required(handle, "_device_types", needed_for="process groups")
    return found


def is_gloo(handle: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether gloo moves the tensors of ``handle`` that are on ``device``."""
    if not dist.is_gloo_available():
        return False
    return isinstance(_backend(handle, device), dist.ProcessGroupGloo)


def backend_timeout(handle: dist.ProcessGroup, device: torch.device) -> timedelta | None:
    """The timeout of collectives on such a device; None where the backend does not say."""
    limit = getattr(getattr(_backend(handle, device), "options", None), "_timeout", None)
    return limit if isinstance(limit, timedelta) else None


def registered_groups() -> list[dist.ProcessGroup]:
    """All process groups that torch.distributed knows."""
    return list(_world().pg_map)


def take_timeout(handle: dist.ProcessGroup, of: dist.ProcessGroup) -> None:
    """Give a group the timeouts of ``of``, on each device where both have the same backend."""
    for device in set(device_types(handle)) & set(device_types(of)):
        backend, timeout = _backend(handle, device), backend_timeout(of, device)
        if timeout is not None and type(backend) is type(_backend(of, device)):
            set_timeout = _required(backend, "_set_default_timeout", needed_for="process groups")
            set_timeout(timeout)


def _backend(handle: dist.ProcessGroup, device: torch.device) -> Any:
    return _required(handle, "_get_backend", needed_for="process groups")(device)


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because a rank, or the way to it, is gone or too slow. gloo's
    errors have no type of their own."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    is_of_gloo = "/gloo/" in text or "pair closure" in text
    return isinstance(error, RuntimeError) and is_of_gloo and "mismatch" not in text


def new_named_group(
    ranks: Sequence[int], *, name: str, backend: str, timeout: timedelta | None
) -> dist.ProcessGroup:
    """A process group of ``ranks`` (global, this rank among them), which alone have to call it.

    ``name`` is equal on them, and never used twice. ``torch.distributed.new_group`` derives a name
    from the number of groups that a process has, which is another one on each rank where groups
    were closed, and may come again.
    """
    make = _required(c10d, "_new_process_group_helper", needed_for="process groups")
    made: dist.ProcessGroup
    made, _ = make(
        len(ranks),
        list(ranks).index(dist.get_rank()),
        list(ranks),
        dist.Backend(backend),
        default_store(),
        name,
        timeout=c10d.default_pg_timeout if timeout is None else timeout,
    )
    _world().pg_group_ranks[made] = {rank: i for i, rank in enumerate(ranks)}
    return made


def default_store() -> c10d.Store:
    """What the ranks of the run met through."""
    store: c10d.Store = _required(c10d, "_get_default_store", needed_for="process groups")()
    return store


def is_registered(handle: dist.ProcessGroup) -> bool:
    """Whether torch.distributed knows a group: neither it nor the default group was destroyed."""
    return handle in _world().pg_map


def _world() -> Any:
    return _required(c10d, "_world", needed_for="process groups")


@contextmanager
def without_global_step_hooks() -> Iterator[None]:
    """A context in which a step of an optimizer runs no hooks that are registered for all."""
    names = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
    needed_for = "the trial of optimizers"
    found = [_required(optimizers, name, needed_for=needed_for) for name in names]
    kept = [dict(hooks) for hooks in found]
    for hooks in found:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in zip(found, kept, strict=True):
            hooks.update(before)


def in_autograd_function() -> bool:
    """Whether the forward of a ``torch.autograd.Function`` is running, which knows the gradient
    of its tensors alone. Unlike ``no_grad`` it switches forward-mode differentiation off."""
    read = _required(torch._C, "_is_fwd_grad_enabled", needed_for="the logits of an output")
    enabled: bool = read()
    return not enabled and not torch.is_inference_mode_enabled()


def found_inf_per_device(
    scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer
) -> dict[torch.device, Tensor]:
    """What ``unscale_`` found in the gradients of ``optimizer``: on each device a number that is
    not 0 where one is not finite. Empty before ``unscale_``; what is written to it counts."""
    read = _required(scaler, "_found_inf_per_device", needed_for="deepspeed_autotp.GradScaler")
    found: dict[torch.device, Tensor] = read(optimizer)
    return found


def is_hooked(module: nn.Module) -> bool:
    """Whether anybody registered a hook of the forward or backward of ``module`` itself."""
    return bool(output_hooks(module) or forward_pre_hooks(module))


def checkpoint_chunks(tensor: Tensor) -> list[Any]:
    """What ``tensor``, a DTensor, holds of itself on this rank, as torch.distributed.checkpoint
    knows it: offsets and sizes."""
    name = "__create_chunk_list__"
    found: list[Any] = _required(tensor, name, needed_for="torch.distributed.checkpoint")()
    return found


def fully_shard_meshes(module: nn.Module) -> list[Any]:
    """The meshes that ``module``, for which fully_shard was called, was given."""
    name = "_get_fsdp_state"
    state = _required(module, name, needed_for="fully_shard around a sharded model")()
    groups = getattr(state, "_fsdp_param_groups", None)  # one group before torch 2.11
    if groups is None:
        groups = [_required(state, "_fsdp_param_group", needed_for="fully_shard")]
    return [group.mesh_info.mesh for group in groups if group is not None]


def active_ddp() -> nn.Module | None:
    """The DistributedDataParallel whose forward is running, or None."""
    cls = nn.parallel.DistributedDataParallel
    found: nn.Module | None = _required(
        cls, "_active_ddp_module", needed_for="DistributedDataParallel around a sharded model"
    )
    return found


def is_managed_by_fsdp(module: nn.Module) -> bool:
    """Whether parameters of ``module`` are those of fully_shard, for it or a module around it, or
    of FullyShardedDataParallel."""
    return bool(vars(module).get("_is_fsdp_managed_module"))


def total_norm_names() -> list[tuple[Any, str]]:
    """Modules, and the name in each, by which torch's clipping calls the norm of gradients."""
    module, name = importlib.import_module("torch.nn.utils.clip_grad"), "_get_total_norm"
    _required(module, name, needed_for="torch.nn.utils.clip_grad_norm_ of a sharded model")
    return [(module, name), (nn.utils, "get_total_norm")]


def gradients(
    outputs: Sequence[Tensor], weights: Sequence[Tensor], inputs: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """As torch.autograd.grad with ``allow_unused``, within the function modes of now: the public
    function leaves them, so that a recomputation in the backward pass would not see them."""
    return _run_backward(tuple(outputs), tuple(weights), tuple(inputs), accumulate_grad=False)


def backward(loss: Tensor) -> None:
    """As ``loss.backward()``, within the function modes of now, as :func:`gradients`."""
    _run_backward((loss,), (torch.ones_like(loss),), (), accumulate_grad=True)


def _run_backward(
    outputs: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    *,
    accumulate_grad: bool,
) -> tuple[Tensor | None, ...]:
    run: Any = torch.autograd.graph._engine_run_backward
    found: tuple[Tensor | None, ...] = run(
        outputs, weights, False, False, inputs, True, accumulate_grad=accumulate_grad
    )
    return found
