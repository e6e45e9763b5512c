# SPDX-License-Identifier: Apache-2.0
"""The table of options has every key that the installed DeepSpeed reads."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.options import REFUSED, WORKS
from tests.support.options_table import TABLE

# docs/configuration.md has the keys of this section.
OURS = {"tensor_parallel"}


class Recorded(dict[str, Any]):
    """A dictionary that remembers which keys it is asked for; so do its copies."""

    def __init__(self, given: dict[str, Any], asked: set[str]) -> None:
        super().__init__(given)
        self.asked = asked

    def __copy__(self) -> "Recorded":
        return Recorded(dict(self), self.asked)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return _Keys(self)


class _Keys:
    def __init__(self, of: Recorded) -> None:
        self._of = of

    def __contains__(self, key: object) -> bool:
        return key in self._of

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)


def top_level() -> set[str]:
    """The keys that DeepSpeed asks a configuration for."""
    from deepspeed.runtime.config import DeepSpeedConfig

    asked: set[str] = set()
    DeepSpeedConfig(Recorded({"train_micro_batch_size_per_gpu": 1}, asked))
    return asked


def of_zero() -> set[str]:
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = {field.alias or name for name, field in fields.items()}
    return {f"zero_optimization.{key}" for key in known | set(_REMOVED_ZERO_CONFIG_KEYS)}


@pytest.mark.usefixtures("deepspeed_imported")
def test_every_key_of_deepspeed_is_in_the_table() -> None:
    read = top_level() - {"zero_optimization"} | of_zero()
    assert {"gradient_clipping", "zero_optimization.overlap_comm", "amp"} <= read
    covered = {key for option in TABLE for key in option.covered()}
    assert sorted(read - covered - OURS) == []


def test_the_rows_are_whole() -> None:
    names = [option.name for option in TABLE]
    assert sorted({name for name in names if names.count(name) > 1}) == []
    for option in TABLE:
        assert bool(option.words) == (option.outcome == REFUSED), option.name
        assert option.note or option.tested or option.runs, option.name
    assert {option.outcome for option in TABLE if option.fast} == {REFUSED, WORKS}
