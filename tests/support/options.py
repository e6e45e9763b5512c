# SPDX-License-Identifier: Apache-2.0
"""Every option that people set beside tensor parallelism, and what happens with it.

test_options.py runs the rows; docs/options.md shows them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

LOOP = None  # in the place of a ZeRO stage: without DeepSpeed
EVERYWHERE = (LOOP, 0, 1)

WORKS, REFUSED, NOT_OURS, NOT_TRIED = "works", "refused", "not ours", "not tried"


@dataclass(frozen=True, slots=True)
class Option:
    """One row: ``name`` as the page shows it.

    outcome    WORKS: losses, gradient norms and weights are those of a run without TP;
               REFUSED: before training, on every rank alike, by an error with ``words``;
               NOT_OURS, NOT_TRIED: nothing runs, ``note`` says why
    config     what it adds to a DeepSpeed configuration
    keys       further keys that the row is about
    optimizer  how the optimizer is made, in options_ranks; "config": by the configuration
    stages     ZeRO stages, or LOOP
    replicas   data-parallel replicas
    bound      how far weights may be from those without TP, as a part of how far they moved
    tested     the test that shows it, where that is not one run of this row
    special    what the loop does beside training, in options_ranks
    fast       whether the suite runs it, and not ``make loops`` alone
    """

    name: str
    outcome: str = WORKS
    config: Mapping[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    optimizer: str = "SGD"
    stages: tuple[int | None, ...] = (1,)
    replicas: int = 1
    bound: float = 1e-3
    tested: str = ""
    special: str = ""
    words: str = ""
    note: str = ""
    fast: bool = False

    @property
    def runs(self) -> bool:
        """Whether test_options.py runs it."""
        return self.outcome in (WORKS, REFUSED) and not self.tested

    def covered(self) -> Iterator[str]:
        """The keys that the row is about; those of zero_optimization with its name in front."""
        yield from self.keys
        for key, value in self.config.items():
            if key == "zero_optimization":
                yield from (f"{key}.{name}" for name in value)
            else:
                yield key


def zero(**section: Any) -> dict[str, Any]:
    """A configuration with these keys of ``zero_optimization``."""
    return {"zero_optimization": section}
