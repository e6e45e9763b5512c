# SPDX-License-Identifier: Apache-2.0
"""One worker of the pool, as it is forked from a template.

Serves jobs until its channel closes. What a job changes in the process (environment, process
groups, the state of DeepSpeed, Accelerate and transformers) is put back after it.
"""

import faulthandler
import gc
import importlib
import logging
import os
import pickle
import random
import signal
import sys
import time
import traceback
import warnings
import weakref
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support.worker_process import Answer, Failure, Job

# The parent gives up first and then reports every stack; a group that gave up before it would
# end the wait of the rank that is of interest.
GROUP_MARGIN = 30.0
# They wake up all the time, so that hundreds of them slow every test.
MOST_GROUP_THREADS = 30
# Engines that something still refers to after they were destroyed, which works once only.
_DESTROYED: weakref.WeakSet[Any] = weakref.WeakSet()
# The functions of torch.nn.functional.
_FUNCTIONS: dict[str, Any] = {}


def serve(channel: Connection) -> None:
    """Answer jobs until the channel closes."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    channel.send(os.getpid())
    while True:
        try:
            job = pickle.loads(channel.recv_bytes())
        except EOFError:
            return
        channel.send_bytes(pickle.dumps(_answer(job)))
        _keep_coverage()


def _keep_coverage() -> None:
    """Write what coverage has counted so far, where it counts: a worker may be killed."""
    counting = sys.modules.get("coverage")
    current = None if counting is None else counting.Coverage.current()
    if current is not None:
        current.save()


def import_all() -> None:
    """Import what costs seconds, once for all workers."""
    import accelerate  # noqa: F401
    import deepspeed
    import torch

    # What DeepSpeed's initialize imports in any case. The functions of torch.distributed.nn keep
    # the default group of the moment of their import as default argument, and so its sockets.
    import torch._dynamo
    import torch._inductor.compile_fx
    import torch.distributed.nn
    import transformers.integrations.deepspeed
    import transformers.models.llama.modeling_llama  # noqa: F401

    import deepspeed_autotp.api.deepspeed_api  # noqa: F401

    torch.set_num_threads(1)
    _FUNCTIONS.update(vars(torch.nn.functional))
    # DeepSpeed's shared-memory all-reduce would be compiled at the first initialize, keeps the
    # first group it sees for the life of the process, and leaves 66 MB per killed rank in
    # /dev/shm. Without it DeepSpeed uses the process group, as it does on several machines.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # What is imported now lives as long as the worker: collections need not look at it again.
    gc.collect()
    gc.freeze()


def _answer(job: Job) -> Answer:
    environment = dict(os.environ)
    result, failure = b"", None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", module=r"(deepspeed_autotp|tests)\b")
            _enter(job)
            result = pickle.dumps(_call(job))
    except BaseException as error:
        at = time.monotonic()
        failure = Failure(at, type(error).__name__, str(error), traceback.format_exc())
        # The frames hold engines, and these hold the group that peers still wait in.
        traceback.clear_frames(error.__traceback__)
    try:
        _leave()
    except BaseException as error:
        text = traceback.format_exc()
        if failure is None:
            failure = Failure(time.monotonic(), type(error).__name__, str(error), text)
    os.environ.clear()
    os.environ.update(environment)
    return Answer(result, failure, _group_threads() > MOST_GROUP_THREADS)


def _call(job: Job) -> Any:
    module, _, name = job.function.partition(":")
    function = vars(importlib.import_module(module))[name]
    return function(*pickle.loads(job.arguments))


def _enter(job: Job) -> None:
    import numpy
    import torch
    import torch.distributed as dist

    os.environ.update(
        RANK=str(job.rank),
        LOCAL_RANK=str(job.rank),
        WORLD_SIZE=str(job.ranks),
        LOCAL_WORLD_SIZE=str(job.ranks),
        LOCAL_SIZE=str(job.ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job.port),
        **job.environment,
    )
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(job.rendezvous, job.ranks),  # type: ignore[attr-defined]
        rank=job.rank,
        world_size=job.ranks,
        timeout=timedelta(seconds=job.timeout + GROUP_MARGIN),
    )
    dist.barrier()  # or a rank that is done at once would leave while others still connect


def _leave() -> None:
    import torch
    import torch.distributed as dist

    _reset_own()
    _destroy_engines()
    _reset_deepspeed()
    _reset_accelerate()
    _forget_meshes()
    # An engine and its optimizer have finalizers, and go at a later collection than the first.
    for _ in range(3):
        gc.collect()
    # What is left lives on (modules that the job imported, mostly): DeepSpeed collects several
    # times per engine, which would look at all of it each time.
    gc.freeze()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.excepthook = sys.__excepthook__  # torch wraps it once more for every group
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)


def _group_threads() -> int:
    """Threads of process groups that something still refers to: ZeRO 3 keeps its engine, and
    torch.compile its model."""
    count = 0
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread that has ended meanwhile
            count += "gloo" in task.joinpath("comm").read_text()
    return count


def _reset_own() -> None:
    """A test that failed between install() and uninstall() must not change those after it."""
    package = sys.modules.get("deepspeed_autotp")
    if package is not None:
        package.uninstall()
        package.reset()
    logger = logging.getLogger("deepspeed_autotp")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


def _destroy_engines() -> None:
    """Hooks on gradient accumulators keep an engine, and with it its groups, their threads and
    their sockets, alive for ever unless the engine removes them."""
    from deepspeed import DeepSpeedEngine

    # By type(): isinstance asks the object, and lazy modules answer by importing something.
    for value in gc.get_objects():
        if issubclass(type(value), DeepSpeedEngine) and value not in _DESTROYED:
            value.destroy()
            _DESTROYED.add(value)


def _reset_deepspeed() -> None:
    import torch
    from deepspeed import comm, zero
    from deepspeed.module_inject import layers
    from deepspeed.runtime import torch_autocast
    from deepspeed.runtime.tensor_parallel import init_utils
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.utils import groups

    backend = comm.comm
    backend.cdb = None
    if "_release_process_group_references" in vars(groups):
        groups._release_process_group_references()
    else:  # before DeepSpeed 0.19.8
        importlib.reload(groups)
    init_utils._TP_MODEL_INIT_ARGS = None
    layers.DEEPSPEED_AUTOTP_MODE = layers.AUTOTP_MODE.INFERENCE
    # ZeRO 3 replaces linear for good. Its own rounds in another way, so that ranks which had served
    # different jobs would differ by a bit, and its graph is another one.
    vars(torch.nn.functional).update(_FUNCTIONS)
    # ZeRO 3 numbers modules and parameters from where the last engine of this process ended, and
    # compares the numbers over ranks, which have served different jobs here.
    zero.Init.param_id = 0
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    number = DeepSpeedZeRoOffload._register_deepspeed_module
    number.__defaults__[0][0] = 0


def _forget_meshes() -> None:
    """The caches of DTensor have meshes of this job, which would stand for equal ones of the next,
    and the names of their groups."""
    if "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor import _redistribute, debug

    debug._clear_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()
    _redistribute.clear_redistribute_planner_cache()


def _reset_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
