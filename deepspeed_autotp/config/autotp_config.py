# SPDX-License-Identifier: Apache-2.0
"""Ordered layer specifications, as a user or a preset writes them, and as the core's rules."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    ConfigDict,
    StrictBool,
    StrictStr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)
from pydantic.dataclasses import dataclass

from deepspeed_autotp import _core
from deepspeed_autotp.config.layer_spec import TPLayerSpec, add_rule, preset_spec
from deepspeed_autotp.config.section import read_dataclass, readable
from deepspeed_autotp.config.validation import (
    ConfigProblems,
    NonNegative,
    Positive,
    list_of,
    problems,
    shown,
    wrong,
)

__all__ = ["AutoTPConfig", "AutoTPPresets", "build_rules", "merge_autotp_configs"]

_log = logging.getLogger("deepspeed_autotp")


# The context in which specifications may be dictionaries.
_DICTIONARIES = "dictionaries"


def _spec(value: object, info: ValidationInfo) -> TPLayerSpec:
    if info.context == _DICTIONARIES:
        return read_dataclass(TPLayerSpec, value, where="TPLayerSpec")
    if isinstance(value, TPLayerSpec):
        return value
    raise ValueError(
        f"got {shown(value)}, expected TPLayerSpec; AutoTPConfig.from_dict reads dictionaries"
    )


_Specs = Annotated[
    list[Annotated[TPLayerSpec, BeforeValidator(_spec)]],
    list_of("dictionaries"),
]
_COUNTS = TypeAdapter(dict[str, Positive])


def _embedding_dim(value: object) -> object:
    if type(value) is not int or value not in (0, 1):
        raise wrong(value, "0 (vocabulary) or 1 (hidden)")
    return value


_EmbeddingDim = Annotated[int, BeforeValidator(_embedding_dim)]


@readable
@dataclass(config=ConfigDict(extra="forbid"))
class AutoTPConfig:
    """Ordered layer specifications and what holds for the rest of the model.

    tp_size                  TP size; taken from `autotp_size` where a configuration has one, and
                             another value is refused
    layer_specs              ordered rules: the first that matches a parameter decides
    embedding_partition_dim  where default rules shard an embedding: 0 vocabulary, 1 hidden
    lm_head_patterns         a module whose name contains one of these is an output head
    use_default_specs        `false`: nothing but `layer_specs` decides
    strict_mode              a linear layer that no rule matches is an error

    Raises ValueError that lists every field with a wrong value.
    """

    tp_size: NonNegative = 1
    layer_specs: _Specs = field(default_factory=list)
    embedding_partition_dim: _EmbeddingDim = 1
    lm_head_patterns: Annotated[list[StrictStr], list_of("names")] = field(
        default_factory=lambda: ["lm_head", "embed_out"]
    )
    use_default_specs: StrictBool = True
    strict_mode: StrictBool = False

    def find_matching_spec(
        self, param_name: str, model_type: str | None = None
    ) -> TPLayerSpec | None:
        """The first specification that matches, or None; a warning names all if several do."""
        found = [spec for spec in self.layer_specs if spec.matches(param_name, model_type)]
        if len(found) > 1:
            _log.warning(
                "parameter %s matches %d layer_specs, and the first decides: %s",
                param_name,
                len(found),
                "; ".join(str(spec.patterns) for spec in found),
            )
        return found[0] if found else None

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> AutoTPConfig:
        """The configuration under ``partition_config``.

        Raises ValueError that lists every unknown key and every wrong value with its path.
        """
        return read_dataclass(cls, config_dict, where="partition_config", context=_DICTIONARIES)


def merge_autotp_configs(base: AutoTPConfig, override: AutoTPConfig) -> AutoTPConfig:
    """Both lists of specifications, those of `override` first; its other fields hold."""
    return AutoTPConfig(
        tp_size=override.tp_size if override.tp_size > 1 else base.tp_size,
        layer_specs=[*override.layer_specs, *base.layer_specs],
        embedding_partition_dim=override.embedding_partition_dim,
        lm_head_patterns=override.lm_head_patterns or base.lm_head_patterns,
        use_default_specs=override.use_default_specs,
        strict_mode=override.strict_mode,
    )


def build_rules(config: AutoTPConfig) -> _core.Rules:
    """The specifications as ordered rules of the core, each with its origin.

    A rule of the user is called "layer_specs[2]" after its place.
    """
    rules = _core.Rules()
    for index, spec in enumerate(config.layer_specs):
        add_rule(rules, spec, label=f"layer_specs[{index}]")
    return rules


class AutoTPPresets:
    """DeepSpeed's presets, from the core's table.

    A fused q|k|v has no `shape` here, where DeepSpeed's presets for phi3 and chatglm split it in
    thirds: the plan finds its pieces from the head counts, which need not be equal.
    """

    @staticmethod
    def get_preset(model_type: str) -> AutoTPConfig:
        """The preset of that name, in any case; ValueError with the nearest names if none is."""
        if not isinstance(model_type, str):
            raise ConfigProblems("preset_model", [f": {wrong(model_type, 'a name')}"])
        rows = _core.preset_rows(model_type)
        name = f"preset {model_type.lower()}"
        return AutoTPConfig(
            layer_specs=[
                preset_spec(f"{name}[{index}]", pattern, row)
                for index, (pattern, row) in enumerate(rows)
            ]
        )

    @staticmethod
    def llama() -> AutoTPConfig:
        """Separate q, k, v and gate, up."""
        return AutoTPPresets.get_preset("llama")

    @staticmethod
    def bloom() -> AutoTPConfig:
        """q, k, v fused head by head."""
        return AutoTPPresets.get_preset("bloom")

    @staticmethod
    def chatglm() -> AutoTPConfig:
        """q|k|v and gate|up fused."""
        return AutoTPPresets.get_preset("chatglm")

    @staticmethod
    def mixtral() -> AutoTPConfig:
        """As llama, with numbered experts w1, w2, w3."""
        return AutoTPPresets.get_preset("mixtral")

    @staticmethod
    def deepseek_v2() -> AutoTPConfig:
        """Latent attention, numbered experts and shared ones."""
        return AutoTPPresets.get_preset("deepseek_v2")

    @staticmethod
    def qwen2() -> AutoTPConfig:
        """As llama."""
        return AutoTPPresets.get_preset("qwen2")

    @staticmethod
    def phi3() -> AutoTPConfig:
        """q|k|v and gate|up fused."""
        return AutoTPPresets.get_preset("phi3")

    @staticmethod
    def llama_gqa(num_heads: int, num_kv_heads: int, head_dim: int) -> AutoTPConfig:
        """As llama, with q|k|v fused into ``qkv_proj`` with fewer key/value heads."""
        counts = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        try:
            _COUNTS.validate_python(counts)
        except ValidationError as error:
            raise ConfigProblems("AutoTPPresets.llama_gqa", problems(error)) from None
        query, key = num_heads * head_dim, num_kv_heads * head_dim
        fused = preset_spec(
            "preset llama_gqa[1]",
            r".*\.self_attn\.qkv_proj\.weight$",
            {
                "partition_type": "column",
                "partition_dim": 0,
                "shape": ((query, key, key), -1),
                "gather_output": False,
                "sum_gradient": False,
            },
        )
        separate = "model.layers.0.self_attn.q_proj.weight"
        return AutoTPConfig(
            layer_specs=[
                fused if spec.matches(separate) else spec
                for spec in AutoTPPresets.llama().layer_specs
            ]
        )
