# SPDX-License-Identifier: Apache-2.0
"""The names that ``optim`` of TrainingArguments takes, as rows of the table of options.

The Trainer gives DeepSpeed an optimizer that it has built, so a row follows from that of its class.
"""

import re
from collections.abc import Iterator

from tests.support.options import NOT_TRIED, REFUSED, Option

_CLASSES = "unit/test_trainer_optimizers.py"


def _names(*names: str) -> str:
    return ", ".join(f'`optim="{name}"`' for name in names)


def _as(cls: str, *names: str, note: str = "") -> Option:
    """Rows above have trained ``torch.optim.cls``."""
    words = f"`torch.optim.{cls}`, see above"
    return Option(_names(*names), tested=_CLASSES, note=f"{words}; {note}" if note else words)


def _refused(words: str, *names: str, note: str = "") -> Option:
    return Option(_names(*names), REFUSED, tested=_CLASSES, words=words, note=note)


def _untried(note: str, *names: str) -> Option:
    return Option(_names(*names), NOT_TRIED, note=note)


OPTIMIZERS_OF_THE_TRAINER = (
    _as(
        "AdamW",
        "adamw_torch",
        "adamw_torch_fused",
        note="a section `optimizer` of the DeepSpeed configuration stands in the place of `optim`",
    ),
    _as("SGD", "sgd"),
    _as("RMSprop", "rmsprop"),
    _refused(
        "the optimizer holds state of the full weights already",
        "adagrad",
        note="the Trainer builds it before the model is sharded, with its state; "
        "`optimizer.type: Adagrad` works",
    ),
    _refused("got Adafactor, which forms", "adafactor"),
    _refused(
        "which forms",
        *("galore_adamw", "galore_adamw_8bit", "galore_adafactor"),
        *("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"),
        *("apollo_adamw", "apollo_adamw_layerwise"),
        note="projections of full matrices",
    ),
    _refused("which forms", "lomo", "adalomo", "stable_adamw", note="norms over tensors"),
    _untried(
        "of bitsandbytes; their states are quantised in blocks of a rank's shard, which are other "
        "blocks than those of the full weight",
        *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "ademamix_8bit"),
        *("paged_ademamix_8bit", "lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"),
    ),
    _untried(
        "of bitsandbytes; not refused",
        *("paged_adamw_32bit", "ademamix", "paged_ademamix_32bit", "lion_32bit"),
        *("paged_lion_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit"),
    ),
    _untried(
        "of packages that the tests do not have; an optimizer of a name that is not known is tried "
        "on a small tensor and on its parts",
        *("adamw_torch_4bit", "adamw_torch_8bit", "adamw_anyprecision", "grokadamw"),
        *("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
    ),
    _untried("of XLA and NPU devices", "adamw_torch_xla", "adamw_torch_npu_fused"),
)
# The classes of packages that the tests do not have, as transformers imports them.
CLASSES_ELSEWHERE = {
    "galore_adamw": "GaLoreAdamW",
    "galore_adamw_8bit": "GaLoreAdamW8bit",
    "galore_adafactor": "GaLoreAdafactor",
    "galore_adamw_layerwise": "GaLoreAdamW",
    "galore_adamw_8bit_layerwise": "GaLoreAdamW8bit",
    "galore_adafactor_layerwise": "GaLoreAdafactor",
    "apollo_adamw": "APOLLOAdamW",
    "apollo_adamw_layerwise": "APOLLOAdamW",
    "lomo": "Lomo",
    "adalomo": "AdaLomo",
    "stable_adamw": "StableAdamW",
}


def names_of(option: Option) -> Iterator[str]:
    """The names of ``optim`` that a row is about."""
    yield from re.findall(r'optim="(\w+)"', option.name)
