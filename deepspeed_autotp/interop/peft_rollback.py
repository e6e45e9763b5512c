# SPDX-License-Identifier: Apache-2.0
"""What PEFT notes on modules about their adapters, put back where a change has failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

# Of a module that is none of PEFT's.
_OF_MODEL = ("peft_config", "_hf_peft_config_loaded")
# What every module has; and what is not PEFT's, or says what was done to the weights.
_NOT_KEPT = {*vars(nn.Module()), "_autotp", "merged_adapters"}


def keep_adapters(root: nn.Module) -> tuple[Callable[[], None], Callable[[], None]]:
    """Two steps back to the adapters that the modules of ``root`` say now that they have. The first
    puts back what PEFT noted, and follows that of the modules themselves; the second unmerges the
    adapters that were merged since, and follows when the layers are sharded again."""
    noted = [(m, {k: (v, _copy(v)) for k, v in _notes(m).items()}) for m in root.modules()]
    merged = [
        (module, list(vars(module)["merged_adapters"]))
        for module in root.modules()
        if "merged_adapters" in vars(module)
    ]

    def put_back() -> None:
        for module, before in noted:
            attributes = vars(module)
            for name in set(_notes(module)) - set(before):
                del attributes[name]
            for name, (value, content) in before.items():
                _fill(value, content)
                attributes[name] = value

    def unmerge() -> None:
        for module, before in merged:
            layer: Any = module
            since = [name for name in layer.merged_adapters if name not in before]
            if since:
                layer.merged_adapters = since
                layer.unmerge()
                layer.merged_adapters = before

    return put_back, unmerge


def _notes(module: nn.Module) -> dict[str, Any]:
    attributes = vars(module)
    if isinstance(module, nn.ParameterDict) or _is_of_peft(module):
        return {name: value for name, value in attributes.items() if name not in _NOT_KEPT}
    return {name: attributes[name] for name in _OF_MODEL if name in attributes}


def _is_of_peft(module: nn.Module) -> bool:
    return any(base.__module__.startswith("peft.") for base in type(module).__mro__)


def _copy(value: Any) -> Any:
    return value.copy() if type(value) in (dict, list, set) else None


def _fill(value: Any, content: Any) -> None:
    """Give a container its content of before: others may have the same container."""
    if content is None:
        return
    value.clear()
    if isinstance(value, list):
        value.extend(content)
    else:
        value.update(content)
