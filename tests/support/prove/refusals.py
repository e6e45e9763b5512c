# SPDX-License-Identifier: Apache-2.0
"""Which errors say that the package does not train a case, and are no faults."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed_autotp

PACKAGE = Path(deepspeed_autotp.__file__).parent
# All ranks are given the same: where the package finds that they differ, one of them went astray.
ASTRAY = (
    "at different calls of it",
    "different first batches",
    "between the ranks",
    "the ranks made different plans",
)


class Refused(Exception):
    """The package says that it does not shard or train this model."""


@contextmanager
def refusals() -> Iterator[None]:
    """Around what may be refused: a ValueError that the package itself raises is a refusal; one of
    torch, transformers, DeepSpeed or the model is an error as any other."""
    try:
        yield
    except ValueError as error:
        if not is_refusal(error):
            raise
        raise Refused(str(error)) from error


def is_refusal(error: ValueError) -> bool:
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    is_own = PACKAGE in Path(innermost.filename).parents
    return is_own and not any(text in str(error) for text in ASTRAY)
