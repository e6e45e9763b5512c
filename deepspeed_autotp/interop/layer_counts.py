# SPDX-License-Identifier: Apache-2.0
"""How many layers and experts a configuration may ask for, of which transformers makes each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from deepspeed_autotp.base.nested_values import held_values

MOST = 100_000
# As num_hidden_layers, n_layer, encoder_layers, n_routed_experts and depth.
_COUNTED = re.compile(r"(^|_)(n|num)_(\w+_)?(layer|expert|block)s?$|(^|_)(layers|depth)$")


def check_layer_counts(values: object, where: str) -> None:
    """ValueError where ``values``, a configuration, asks for more than ``MOST`` of a kind: making
    the model would take all memory before anything is known of it."""
    for key, count in _counts(values):
        if count > MOST:
            raise ValueError(
                f"{where}: {key} is {_shown(count)}, expected at most {MOST}: each is a module "
                "that has to be made to be planned"
            )


def _counts(values: object) -> Iterator[tuple[str, int]]:
    left = [values]
    while left:
        inner = left.pop()
        left.extend(held_values(inner))
        if isinstance(inner, Mapping):
            for key, value in inner.items():
                if type(value) is int and _COUNTED.search(str(key)):
                    yield str(key), value


def _shown(count: int) -> str:
    return str(count) if count < 10**18 else "a number of more than 18 digits"
