# SPDX-License-Identifier: Apache-2.0
"""The keys of the section ``tensor_parallel`` and what each of them may be, without torch.

A plan is made of these; ``TPTrainingConfig`` has the data type as torch has it, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AliasChoices,
    BeforeValidator,
    Field,
    PlainValidator,
    StrictBool,
    TypeAdapter,
    ValidationError,
)

from deepspeed_autotp import _core
from deepspeed_autotp.config.autotp_config import AutoTPConfig, AutoTPPresets, merge_autotp_configs
from deepspeed_autotp.config.dtype_names import canonical_dtype
from deepspeed_autotp.config.section import Section
from deepspeed_autotp.config.validation import (
    ConfigProblems,
    NonNegative,
    Positive,
    dictionary,
    nest,
    problems,
    shown,
    wrong,
)

__all__ = ["TPConfig", "TPSection", "section_of"]


class TPConfig(Section):
    """The nested section ``tp``: the ranks and who groups them.

    tp_size        TP size, as DeepSpeed's nested section has it; `autotp_size` decides
    tp_grain_size  shard sizes are multiples of this where the model leaves a choice, in elements,
                   and of 16 bytes where they are not equal
    mpu            an object that knows the parallel groups
    tp_group       the process group of the TP ranks
    """

    _where: ClassVar[str] = "tp"

    tp_size: Positive = 1
    tp_grain_size: Positive = 1
    mpu: Any = None
    tp_group: Any = None

    # Spelled out so that type checkers accept what the checks accept.
    def __init__(self, /, **data: Any) -> None:
        super().__init__(**data)


_GRAIN = TypeAdapter(Positive)


def _known_preset(name: object) -> object:
    if name is not None and not isinstance(name, str):
        raise wrong(name, "the name of a preset")
    if name is not None:
        _core.preset_rows(name)
    return name


def _readable_rules(value: object) -> dict[str, Any] | None:
    """The dictionary as it was written, once a configuration can be made of it."""
    if value is None:
        return None
    AutoTPConfig.from_dict(given := dictionary(value, "partition_config"))
    return given


def _only(allowed: object, remedy: str) -> Callable[[object], Any]:
    """A check for a field that is there for DeepSpeed's sake and may keep its default only."""

    def check(value: object) -> object:
        if value != allowed:
            raise ValueError(f"got {shown(value)}, which is not supported; {remedy}")
        return allowed

    return check


def _dtype(value: object) -> str:
    return canonical_dtype(value, "dtype")


def _self_check(value: object) -> object:
    # Literal["auto", True, False] would take 1 for True.
    if value != "auto" and not isinstance(value, bool):
        raise wrong(value, "'auto', true or false")
    return value


# The list of keys is shown in docs/configuration.md.
class TPSection(Section):
    """The section ``tensor_parallel``.

    autotp_size       TP size; with 0 and 1 the model stays unsharded
    dtype             data type that `tp_model_init` recorded has to agree with: a torch dtype or
                      any usual spelling
    tp_overlap_comm   compute weight gradients while an input gradient is all-reduced; on unless
                      `false` is written. The forward pass hides nothing
    vocab_parallel_lm_head
                      in training with labels keep the logits sharded over the vocabulary, also in
                      the loss: where the output head allows it (`null`), or else an error that says
                      why not (`true`), never (`false`)
    vocab_parallel_ce_backend
                      DeepSpeed's key; `"liger"` is refused
    preset_model      rules of a model family; [presets](#presets) lists them
    partition_config  your rules, before those of a preset
    self_check        compare a few tokens with the full model before sharding: on a small twin
                      where there is one, else on the model itself where inputs are known and it is
                      not too large (`"auto"`); always on the model itself (`true`); never (`false`)
    sequence_parallel shard the tokens between blocks, or an error that says which module does not
                      allow it
    expert_partition  of fused experts each rank has a shard of every expert (`"width"`), or some
                      of the experts, whole (`"experts"`), or these where shards would be thin
                      (`"auto"`)
    injection_policy_tuple
                      DeepSpeed's key; other values are refused
    keep_module_on_host
                      DeepSpeed's key; `true` is refused
    replace_with_kernel_inject
                      DeepSpeed's key; `true` is refused
    tensor_parallel   nested section

    monitor           after each step give DeepSpeed's monitor the bytes, the time and the share of
                      the step of the TP group's collectives; for `initialize` only

    ``tp_grain_size`` may stand here or in the nested section, where it is stored.
    """

    _where: ClassVar[str] = "tensor_parallel"
    _auto: ClassVar[tuple[str, ...]] = ("expert_partition",)

    dtype: Annotated[Any, PlainValidator(_dtype)] = "float16"
    autotp_size: NonNegative = 0
    tp_overlap_comm: StrictBool = False
    vocab_parallel_lm_head: StrictBool | None = None
    vocab_parallel_ce_backend: Annotated[
        Literal["torch"], PlainValidator(_only("torch", "write 'torch', or leave it out"))
    ] = "torch"
    tensor_parallel: Annotated[TPConfig, BeforeValidator(TPConfig.read)] = Field(
        default_factory=TPConfig, validation_alias=AliasChoices("tensor_parallel", "tp")
    )
    injection_policy_tuple: Annotated[
        None, PlainValidator(_only(None, "write the layers as partition_config.layer_specs"))
    ] = None
    partition_config: Annotated[dict[str, Any] | None, PlainValidator(_readable_rules)] = None
    preset_model: Annotated[str | None, PlainValidator(_known_preset)] = None
    keep_module_on_host: Annotated[
        bool,
        PlainValidator(_only(False, "weights stay on the device where they are; leave it out")),
    ] = False
    replace_with_kernel_inject: Annotated[
        bool, PlainValidator(_only(False, "the kernels it injects are for inference; leave it out"))
    ] = Field(
        default=False, validation_alias=AliasChoices("replace_with_kernel_inject", "kernel_inject")
    )
    self_check: Annotated[bool | Literal["auto"], PlainValidator(_self_check)] = "auto"
    sequence_parallel: StrictBool = False
    expert_partition: Literal["width", "experts", "auto"] = "width"
    monitor: StrictBool = False

    # Spelled out so that type checkers accept what the checks accept.
    def __init__(self, /, **data: Any) -> None:
        super().__init__(**data)

    @property
    def overlaps(self) -> bool:
        """Whether communication overlaps with computation: the default is DeepSpeed's false, but
        only a false that was written counts."""
        return self.tp_overlap_comm or "tp_overlap_comm" not in self.model_fields_set

    def get_partition_config_object(self) -> AutoTPConfig | None:
        """The user's rules before those of the preset, or None if there are neither.

        With ``use_default_specs: false`` there are the user's rules only.
        """
        config = AutoTPPresets.get_preset(self.preset_model) if self.preset_model else None
        if self.partition_config:
            custom = AutoTPConfig.from_dict(self.partition_config)
            if config is None or not custom.use_default_specs:
                config = custom
            else:
                config = merge_autotp_configs(config, custom)
        if config is not None:
            config.tp_size = self.autotp_size
        return config

    @classmethod
    def _spellings(cls) -> dict[str, str]:
        return super()._spellings() | {"tp_grain_size": "tp_grain_size"}

    def _move(self, given: dict[str, Any]) -> list[str]:
        """Store a grain size that is written here in the nested section."""
        if "tp_grain_size" not in given:
            return []
        key = "tp" if "tp" in given else "tensor_parallel"
        try:
            grain = _GRAIN.validate_python(given.pop("tp_grain_size"))
            nested = TPConfig.read(given.get(key))
        except ValidationError as error:
            return nest("tp_grain_size", problems(error))
        except ConfigProblems:  # which comes up again when the field is checked
            return []
        if "tp_grain_size" in nested.model_fields_set and nested.tp_grain_size != grain:
            return [
                f"tp_grain_size: got {grain}, but tp_grain_size in the nested section is "
                f"{nested.tp_grain_size}; write one of them"
            ]
        given[key] = nested.model_copy(update={"tp_grain_size": grain})
        return []

    def _contradictions(self) -> list[str]:
        lines = []
        rules = self.partition_config or {}
        size = rules.get("tp_size", self.autotp_size)
        if size != self.autotp_size:
            lines.append(
                f"partition_config.tp_size: got {size}, but autotp_size is {self.autotp_size}; "
                "leave it out here"
            )
        if self.preset_model and not rules.get("use_default_specs", True):
            lines.append(
                f"preset_model: {self.preset_model!r} has no effect, since "
                "partition_config.use_default_specs is false; leave out one of them"
            )
        return lines


def section_of(ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """The section of a DeepSpeed configuration as it was written; empty where there is none."""
    if not isinstance(ds_config, Mapping):
        raise ConfigProblems("the configuration", [f": {wrong(ds_config, 'a dictionary')}"])
    section = ds_config.get("tensor_parallel")
    return dictionary({} if section is None else section, "tensor_parallel")
