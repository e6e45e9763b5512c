# SPDX-License-Identifier: Apache-2.0
"""The orders in which a script that has trained can end."""

import atexit
import builtins
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import deepspeed_autotp
from tests.support.engine_config import Setting, engine_config
from tests.support.faults.cell import RANKS
from tests.support.faults.rank import Rank
from tests.support.pretrained_models import build_pretrained
from tests.support.small_models import tokens

# What a script has in its globals, which live until the interpreter ends.
KEPT: list[Any] = []


class Closing:
    """In a cycle with its model, which it destroys when the interpreter finds that."""

    def __init__(self, model: Any) -> None:
        self.model = model
        model.closing = self

    def __del__(self) -> None:
        deepspeed_autotp.destroy(self.model)


def run(rank: Rank) -> None:
    is_engine = rank.cell.stage.startswith("engine")
    model: Any = build_pretrained("llama")
    if is_engine:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = engine_config(Setting(tp=RANKS, zero=1, clip=1.0))
        model = deepspeed_autotp.initialize(model=model, optimizer=optimizer, config=config)[0]
    else:
        model = deepspeed_autotp.parallelize(model, tp_size=RANKS)
    ids = tokens(0)
    loss = model(input_ids=ids, labels=ids).loss
    rank.note("loss", 0, float(loss.detach()))
    (model.backward if is_engine else torch.Tensor.backward)(loss, retain_graph=True)
    KEPT.extend((model, loss))
    # The files of all ranks are closed by now, whichever of them ends first.
    dist.barrier()
    ORDERS[rank.cell.stage](model)


def _in_order(model: Any) -> None:
    _destroy(model)
    dist.destroy_process_group()


def _model_last(model: Any) -> None:
    dist.destroy_process_group()
    _destroy(model)


def _destroy(model: Any) -> None:
    (getattr(model, "destroy", None) or (lambda: deepspeed_autotp.destroy(model)))()


def _at_exit(model: Any) -> None:
    atexit.register(dist.destroy_process_group)
    atexit.register(_destroy, model)


def _at_exit_model_last(model: Any) -> None:
    atexit.register(_destroy, model)
    atexit.register(dist.destroy_process_group)


def _in_a_cycle(model: Any) -> None:
    KEPT.clear()
    Closing(model)


def _in_builtins(model: Any) -> None:
    vars(builtins)["kept"] = model


def _without_modules(_: Any) -> None:
    for name in [name for name in sys.modules if name.startswith("deepspeed_autotp")]:
        del sys.modules[name]


def _in_a_thread(model: Any) -> None:
    def hold(held: Any) -> None:
        while held is not None:
            time.sleep(0.01)

    threading.Thread(target=hold, args=(model,), daemon=True).start()


def _forgotten(_: Any) -> None:
    KEPT.clear()


ORDERS: dict[str, Callable[[Any], None]] = {
    "nothing is closed": lambda model: None,
    "in order": _in_order,
    "model after its groups": _model_last,
    "groups only": lambda model: dist.destroy_process_group(),
    "at exit": _at_exit,
    "at exit, model after its groups": _at_exit_model_last,
    "by a finalizer": _in_a_cycle,
    "model in builtins": _in_builtins,
    "modules are gone": _without_modules,
    "a thread has the model": _in_a_thread,
    "model is forgotten": _forgotten,
    "sys.exit": lambda model: sys.exit(0),
    "engine, nothing is closed": lambda model: None,
    "engine, in order": _in_order,
    "engine, groups only": lambda model: dist.destroy_process_group(),
}
