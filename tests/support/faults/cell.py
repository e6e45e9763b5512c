# SPDX-License-Identifier: Apache-2.0
"""A cell of the table: which fault at which stage, over which transport."""

from dataclasses import dataclass
from itertools import product

RANKS = 2
FAULTY = 1
# Seconds of the process group, which a rank that is stopped makes the others wait for.
TIMEOUT = 8.0
# Of the training steps the one with the fault; the first call of a model compares batches.
STEPS, FAULTY_STEP = 3, 1

GLOO, MEMORY = "gloo", "shared memory"
TRANSPORTS = (GLOO, MEMORY)

# What a stage is in a run with DeepSpeed's engine, and in a plain loop.
ENGINE_STAGES = ("merge", "step", "save", "load", "close")
LOOP_STAGES = (
    "plan",
    "self-check",
    "shard",
    "forward",
    "backward",
    "step",
    "save",
    "load",
    "close",
)
# The orders in which a script can end, see exits.py.
EXITS = (
    "nothing is closed",
    "in order",
    "model after its groups",
    "groups only",
    "at exit",
    "at exit, model after its groups",
    "by a finalizer",
    "model in builtins",
    "modules are gone",
    "a thread has the model",
    "model is forgotten",
    "sys.exit",
    "engine, nothing is closed",
    "engine, in order",
    "engine, groups only",
)
FAULTS = ("killed", "stopped", "throws", "skips", "repeats", "shape", "nan")

# Faults that a stage does not have: nothing there has a shape or a value of a user.
_NONE = {
    ("loop", "shard", "shape"),
    ("loop", "shard", "nan"),
    *((way, "load", "nan") for way in ("loop", "engine")),
    *((way, "close", fault) for way in ("loop", "engine") for fault in ("shape", "nan")),
    ("engine", "step", "shape"),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """``way`` is "loop", "engine" or "exit", whose stages are orders; a fault of "none" is a run
    that ends well."""

    way: str
    stage: str
    fault: str
    transport: str

    def __str__(self) -> str:
        return f"{self.way} {self.stage} {self.fault} {self.transport}"


def cells() -> list[Cell]:
    """All of the table."""
    stages = [("loop", stage) for stage in LOOP_STAGES] + [
        ("engine", stage) for stage in ENGINE_STAGES
    ]
    faults = [
        Cell(way, stage, fault, transport)
        for (way, stage), fault, transport in product(stages, FAULTS, TRANSPORTS)
        if (way, stage, fault) not in _NONE
    ]
    return faults + [
        Cell("exit", order, "none", transport) for order, transport in product(EXITS, TRANSPORTS)
    ]
