# SPDX-License-Identifier: Apache-2.0
"""From a configuration and a described model to a plan, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from deepspeed_autotp import interop
from deepspeed_autotp._core import Plan, Rules, preset_names
from deepspeed_autotp.config.autotp_config import AutoTPConfig, build_rules
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.distributed.consensus import Agreement
from deepspeed_autotp.planning.model_description import Description
from deepspeed_autotp.vocab_parallel.output_head import output_head

# What a user can start from who has to write rules.
_SAMPLE = (
    '{"layer_specs": [{"patterns": [".*\\\\.up\\\\.weight$"], "partition_type": "column"}, '
    '{"patterns": [".*\\\\.down\\\\.weight$"], "partition_type": "row"}]}'
)
# How many of the plan's notes an error repeats.
_NOTES = 3


def make_plan(
    description: Description,
    settings: TPTrainingConfig,
    *,
    ranks: int,
    whole: Sequence[str] = (),
    apart: Sequence[str] = (),
    guesses: bool = True,
    alone: bool = True,
    sequence: bool = False,
) -> Plan:
    """The plan for ``ranks`` ranks; ValueError when the rules cut nothing of the model.

    Whatever the rules say, ``whole`` names modules that stay whole, and ``apart`` those whose
    layers are cut one by one, with whole activations between them. ``guesses`` says whether layers
    are cut because of their names in a model of a type that was never tried, and ``alone`` whether
    large ones are cut by themselves that nothing else cuts. ``sequence`` is ``sequence_parallel``;
    ValueError, naming the module, where the model does not allow it.
    """
    given = settings.get_partition_config_object()
    partition = given or AutoTPConfig()
    rules = _model_rules(description) if given is None else build_rules(given)
    plan = Plan(
        description.model,
        rules,
        ranks=ranks,
        grain=settings.tensor_parallel.tp_grain_size,
        strict=partition.strict_mode,
        defaults=partition.use_default_specs,
        embedding_dim=partition.embedding_partition_dim,
        head_patterns=partition.lm_head_patterns,
        whole=whole,
        apart=apart,
        families=given is None,
        guesses=guesses,
        alone=alone,
        sequence=sequence,
    )
    # The default rules cut an embedding also where every pattern of the user has a typo.
    counted = (entry for entry in plan.entries if given is None or entry.source != "default")
    if all(entry.dim < 0 for entry in counted):
        what = type(description.modules[""]).__name__
        if given is None and not len(rules):
            raise ValueError(_no_plan(what, plan, guesses=guesses))
        raise ValueError(
            f"the rules cut nothing of {what}, so that every rank would hold all of it: write "
            "rules for its parameters in tensor_parallel.partition_config"
            + "".join(f"\n  - {note}" for note in plan.notes[:_NOTES])
        )
    return plan


def _model_rules(description: Description) -> Rules:
    rules = Rules()
    model = description.modules[""]
    if name := interop.other_adapter(model):
        raise ValueError(
            f"'{name}' has an adapter that is not plain LoRA, and how its parts are to be cut is "
            "not known: use LoRA (without DoRA), or write rules in tensor_parallel.partition_config"
        )
    own = interop.own_entries(model)
    for pattern, style in interop.tp_plan(model).items():
        rules.add_style(pattern, style, required=pattern in own)
    return rules


def _no_plan(what: str, plan: Plan, *, guesses: bool) -> str:
    why = (
        "its layers have no names by which they could be cut"
        if guesses
        else "without a trial its layers are not cut by their names alone (load the weights on "
        "every rank and pass example_inputs to deepspeed_autotp.parallelize)"
    )
    return (
        f"{what} has no tensor-parallel plan of its own, the configuration gives none, and {why}. "
        "Set tensor_parallel.preset_model to a "
        f"preset that fits ({', '.join(preset_names())}), or list the layers to cut in "
        f"tensor_parallel.partition_config, as {_SAMPLE}"
        + "".join(f"\n  - {note}" for note in plan.notes[:_NOTES])
    )


# Modules left whole, modules whose layers are cut one by one, and whether to guess.
_Asked = tuple[tuple[str, ...], tuple[str, ...], bool]


def _refuse_dropped_layers(description: Description, plan: Plan) -> None:
    for (owner,), *_ in plan.stacks:
        if interop.drops_layers(description.modules[owner]):
            raise ValueError(
                f"tensor_parallel.sequence_parallel is true, but '{owner}' drops layers in "
                "training, also those between which the tokens are cut and made whole; set its "
                "layerdrop to 0, or leave the key out"
            )


class AgreedPlans:
    """Makes plans of one model, each of them on every rank and compared over the ranks.

    ``guesses`` says whether a plan may guess unless it is told otherwise, and ``alone`` whether it
    then may cut layers by themselves, which only a trial shows to be possible.
    """

    def __init__(
        self,
        description: Description,
        settings: TPTrainingConfig,
        ranks: int,
        agreement: Agreement,
        *,
        guesses: bool,
        alone: bool,
    ) -> None:
        self._description = description
        self._settings = settings
        self._ranks = ranks
        self._agreement = agreement
        self._guesses = guesses
        self._alone = alone
        self.rules_are_users = settings.get_partition_config_object() is not None
        self._last: _Asked = ((), (), guesses)

    def make(
        self, whole: Sequence[str] = (), apart: Sequence[str] = (), *, guesses: bool | None = None
    ) -> Plan:
        """ValueError on every rank where one cannot plan, or plans otherwise than another."""
        may_guess = self._guesses if guesses is None else guesses
        asked = tuple(whole), tuple(apart), may_guess
        plan = self._agreed(asked, sequence=False)
        self._last = asked
        return plan

    def in_sequence(self) -> Plan:
        """As the last one, with the tokens cut between blocks. ValueError as above."""
        return self._agreed(self._last, sequence=True)

    def _agreed(self, asked: _Asked, *, sequence: bool) -> Plan:
        plan = self._agreement.together(lambda: self._own(asked, sequence))
        self._agreement.same_plan(plan, [_traits(p) for p in self._description.parameters])
        return plan

    def _own(self, asked: _Asked, sequence: bool) -> Plan:
        described, settings = self._description, self._settings
        whole, apart, guesses = asked
        plan = make_plan(
            described,
            settings,
            ranks=self._ranks,
            whole=whole,
            apart=apart,
            guesses=guesses,
            alone=guesses and self._alone,
            sequence=sequence,
        )
        _refuse_dropped_layers(described, plan)
        # A vocab_parallel_lm_head that cannot be had is refused before anything is tried.
        output_head(described.modules, plan, wanted=settings.vocab_parallel_lm_head)
        return plan


def _traits(parameter: nn.Parameter) -> str:
    """What of a parameter has to be the same on all ranks and is not in the plan."""
    return f"{parameter.dtype} {'trains' if parameter.requires_grad else 'frozen'}"


def compared(settings: TPTrainingConfig) -> dict[str, str]:
    """What all ranks have to be given alike, by the name of the field.

    Process groups differ between ranks by nature.
    """
    values = {
        f"tensor_parallel.{key}": str(value)
        for key, value in settings
        if key not in ("tensor_parallel", "dtype")
    }
    values["tensor_parallel.tp_grain_size"] = str(settings.tensor_parallel.tp_grain_size)
    return values
