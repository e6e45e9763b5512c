# SPDX-License-Identifier: Apache-2.0
"""Options and trainers of TRL that cannot be right under tensor parallelism: refused at start."""

from __future__ import annotations

from typing import Any

_BATCHING = (
    "it generates batches of what has arrived at a moment, which differs between the ranks of a TP "
    "group, so that they wait for each other for ever",
    "leave it out, and the model generates the batch, or set use_vllm=True",
)
_OWN_SENDING = (
    "it sends the model's parameters to vLLM by code of its own, which are one rank's shards",
)
# Class of the arguments, option (empty for the trainer as such), reason and remedy.
_REFUSED = (
    ("TrainingArguments", "use_transformers_continuous_batching", *_BATCHING),
    ("TrainingArguments", "use_transformers_paged", *_BATCHING),
    (
        "OnlineDPOConfig",
        "use_vllm",
        *_OWN_SENDING,
        "leave it out, and the model generates, or train with GRPOTrainer or RLOOTrainer",
    ),
    (
        "AsyncGRPOConfig",
        "",
        *_OWN_SENDING,
        'train with GRPOTrainer, use_vllm=True and vllm_mode="server"',
    ),
    (
        "AsyncDistillationConfig",
        "",
        *_OWN_SENDING,
        'train with DistillationTrainer, use_vllm=True and vllm_mode="server"',
    ),
)


def refuse_options(arguments: Any, *, tp_size: int) -> None:
    """ValueError where a trainer of TRL with these arguments would be wrong, or hang."""
    classes = {cls.__name__ for cls in type(arguments).__mro__}
    for name, option, reason, remedy in _REFUSED:
        if name not in classes or not (option == "" or getattr(arguments, option, False)):
            continue
        size = f"tensor_parallel.autotp_size {tp_size}"
        if option:
            got = f"{option}: got {getattr(arguments, option)}, expected False with {size}"
        else:
            got = f"got {size}, expected 1"
        raise ValueError(f"{type(arguments).__name__}: {got}: {reason}; {remedy}")
