# SPDX-License-Identifier: Apache-2.0
"""Optimizers whose update of an element depends on the rest of its tensor, or of the model.

Of a shard they would form another number than of the full tensor, and each rank its own for a
replicated one where they go over the model. Known by the names of classes, since most of them come
from packages that may not be installed. What works element by element is right on shards: SGD, Adam
and its variants, Adagrad, RMSprop, Lion, Adadelta, Rprop, schedule-free ones, 8-bit states.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_FACTORS = "factors of rows and columns, and the root mean square of a tensor"
_ORTHOGONAL = "an orthogonal matrix of a full matrix"
_TRUST = "a ratio of the norms of a tensor and of its update"
_SKETCH = "the projection of a full matrix"
_KRONECKER = "products of a full matrix with itself"
_STEP_SIZE = "one step size from products over all parameters"
_COMPRESSED = "the mean size of a tensor for one-bit gradients"
_NORM = "a norm over a tensor or over all parameters"

# Names of classes and of DeepSpeed's optimizer.type, in lower case without underscores.
_OVER_TENSORS = {
    **dict.fromkeys(
        ("adafactor", "adalomo", "came", "sm3", "stableadamw", "galoreadafactor"), _FACTORS
    ),
    **dict.fromkeys(("muon", "muonwithauxadam", "singledevicemuon", "distmuon"), _ORTHOGONAL),
    **dict.fromkeys(("singledevicemuonwithauxadam", "adamuon", "normuon"), _ORTHOGONAL),
    **dict.fromkeys(("lamb", "fusedlamb", "fusedmixedprecisionlamb", "lamb8bit"), _TRUST),
    **dict.fromkeys(("lars", "larc", "lars8bit", "novograd", "fusednovograd", "adammini"), _TRUST),
    **dict.fromkeys(("galoreadamw", "galoreadamw8bit", "apolloadamw", "qgaloreadamw8bit"), _SKETCH),
    **dict.fromkeys(("shampoo", "distributedshampoo", "soap", "kfac", "psgd", "kron"), _KRONECKER),
    **dict.fromkeys(("lbfgs", "prodigy", "dadaptadam", "dadaptsgd", "dadaptlion"), _STEP_SIZE),
    **dict.fromkeys(("dadaptadagrad", "dadaptadan"), _STEP_SIZE),
    **dict.fromkeys(("onebitadam", "onebitlamb", "zerooneadam"), _COMPRESSED),
    **dict.fromkeys(("lomo", "sam", "asam", "gsam"), _NORM),
}


def refuse_optimizer_over_tensors(optimizer: Any, *, before: str) -> None:
    """ValueError for such an optimizer, an instance or a name; ``before`` says where it is from."""
    for name in _names(optimizer):
        formed = _OVER_TENSORS.get(name.lower().replace("_", ""))
        if formed is not None:
            raise ValueError(
                f"{before}: got {name}, which forms {formed}; of the shard of a rank it would form "
                "another one, and train another model than one process does. Use an optimizer that "
                "works element by element, such as AdamW, SGD, Adagrad or Lion"
            )


def _names(optimizer: Any) -> Iterator[str]:
    """Names of the classes of an optimizer, and of those that it wraps, as Accelerate's does."""
    if isinstance(optimizer, str):
        yield optimizer
        return
    while optimizer is not None:
        yield from (cls.__name__ for cls in type(optimizer).__mro__)
        optimizer = vars(optimizer).get("optimizer") if hasattr(optimizer, "__dict__") else None
