# SPDX-License-Identifier: Apache-2.0
"""What of a case cannot be with something else, and becomes plain."""

from dataclasses import replace
from typing import Any

from tests.support.prove.case import Case
from tests.support.prove.names import ENCODERS


def settle(case: Case) -> Case:
    """Without contradictions: what cannot be with something else becomes plain."""
    settled = _settle_once(case)
    return case if settled == case else settle(settled)


def _settle_once(case: Case) -> Case:
    for condition, plain in _contradictions:
        if condition(case):
            names = plain.split()
            case = replace(case, **{n: Case.__dataclass_fields__[n].default for n in names})
    if _spread(case):
        case = replace(case, replicas=2)
    if case.rows < case.replicas * case.accumulate:
        case = replace(case, rows=4)
    if case.groups and (case.groups > case.heads or case.heads % case.groups):
        case = replace(case, groups=0)
    if case.positions == "rotary" and case.head_size % 2:
        case = replace(case, positions="")
    return case


def _own(case: Case) -> bool:
    return not case.family


def _engine(case: Case) -> bool:
    return case.way.startswith("zero")


def _spread(case: Case) -> bool:
    return case.way in ("ddp", "fsdp")


_MIXTURES = ("mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss")
_OF_LOGITS = ("one", "z-loss", "classes")
_MODEL_FIELDS = (
    "head_bias shared embedding logits block norm residual linear mixed time_first penalty counts "
    "model_names projection names "
    "count_names reads attention_bias head_norm before_output positions per_head scale convolution "
    "product network network_names network_bias inner_norm per_feature activation experts router "
    "shared_expert"
)

# What is put back to its plain values where a condition holds, in this order.
_contradictions: tuple[tuple[Any, str], ...] = (
    (lambda c: not _own(c), _MODEL_FIELDS),
    (lambda c: not _own(c), "dropout skipped trunk"),
    (lambda c: not _own(c) and c.signature == "loss" and c.outputs != "one", "outputs"),
    (lambda c: not _own(c) and c.outputs not in ("one", "z-loss"), "outputs"),
    (lambda c: not _own(c) and c.tied == "functional", "tied"),
    (lambda c: not _own(c) and c.ignored == "row", "ignored"),  # no mean of nothing
    (lambda c: c.family in ENCODERS, "outputs signature ignored sequence rules lengths functional"),
    (lambda c: "moe" not in c.family and c.family not in _MIXTURES, "expert_partition"),
    (lambda c: _spread(c) and c.tp != 2, "way"),
    (lambda c: c.replicas > 1 and c.tp != 2, "replicas"),
    (lambda c: c.replicas > 1, "dropout"),
    (lambda c: c.replicas > 1 and c.resume != 2, "resume"),
    (lambda c: _spread(c), "dropout resume compiled lora start between hooks"),
    (lambda c: c.way == "fsdp", "shared"),
    (lambda c: c.way != "parallelize", "autocast check backward functional"),
    (lambda c: not _engine(c) or c.way == "zero 0", "offload"),
    (lambda c: c.accumulate == 1 or _spread(c), "forwards_first"),
    # What is left of parameters outside of a forward, and what DDP finds in outputs alone.
    (lambda c: _spread(c) or c.way == "zero 3" or c.precision == "bfloat16", "squares"),
    # DeepSpeed takes one gradient of a parameter, and a recomputation forms its own.
    (lambda c: _engine(c) and c.checkpointing == "reentrant", "squares"),
    # What a recomputation drops, and what a forward counts in place.
    (lambda c: c.forwards_first and c.checkpointing != "", "dropout"),
    (lambda c: c.forwards_first, "counts"),
    # DeepSpeed clips by norms alone.
    (lambda c: _engine(c) and c.clip == "value", "clip"),
    (lambda c: not _engine(c) and c.precision == "bfloat16", "precision"),
    (lambda c: c.precision == "bfloat16", "outputs tiny between resume lora counts"),
    # In 16 bits a token that is near a tie goes to another expert.
    (lambda c: (c.precision == "bfloat16" or c.autocast) and c.router == "top 1", "router"),
    (lambda c: c.between == "thaw" and c.frozen == 0, "between"),
    (lambda c: c.between == "thaw", "settings"),
    (lambda c: _engine(c) and c.between not in ("", "evaluate"), "between"),
    # A recomputation of a graph that is gone through twice, and its buffers under torch.compile.
    (lambda c: c.backward == "twice", "checkpointing compiled"),
    (lambda c: c.functional, "checkpointing compiled"),
    (lambda c: c.backward == "twice" and c.hooks == "backward", "hooks"),
    (lambda c: c.skipped != "", "sequence compiled checkpointing twice"),
    (lambda c: c.skipped == "block" and (c.layers == 1 or c.shared != ""), "skipped"),
    # That of a block which is left out is the one of the step before.
    (lambda c: c.skipped == "block", "penalty"),
    (lambda c: c.skipped == "head" and c.outputs not in ("two heads", "value head"), "skipped"),
    (lambda c: c.trunk != "", "frozen lora hooks checkpointing sequence"),
    (lambda c: c.logits in ("in place", "shifted") and c.signature == "logits", "logits"),
    (lambda c: c.start == "files" and _own(c), "start"),
    # Its tables of positions are drawn here, and are in no file.
    (lambda c: c.start == "files" and c.family == "marian", "start"),
    (lambda c: c.start != "", "rules lora dropout frozen"),
    (lambda c: c.lora != "", "frozen resume linear between settings"),
    (lambda c: c.linear != "" and c.start != "", "linear"),
    (lambda c: c.checkpointing == "reentrant", "frozen lora"),
    # Its checkpoints have one tensor in common, whose graph transformers goes through twice.
    (lambda c: c.checkpointing == "reentrant" and c.family == "deberta-v2", "checkpointing"),
    # DeepSpeed and DistributedDataParallel themselves reduce a gradient once.
    (lambda c: c.checkpointing == "reentrant" and c.way == "ddp", "checkpointing"),
    (lambda c: c.checkpointing == "reentrant" and _engine(c), "shared"),
    (lambda c: c.signature == "logits" and c.outputs not in _OF_LOGITS, "outputs"),
    (lambda c: c.way != "parallelize" and c.lora == "after", "lora"),
    (lambda c: c.compiled, "dropout checkpointing hooks"),
    (lambda c: c.resume > 0, "between"),
    # torch itself warns where no input needs a gradient, and refuses what is done in place.
    (lambda c: c.hooks == "backward", "frozen lora"),
    (lambda c: c.hooks == "backward" and c.activation == "in place", "activation"),
    (lambda c: c.hooks == "backward" and c.residual == "in place", "residual"),
    (lambda c: c.hooks == "backward" and c.logits == "in place", "logits"),
    (lambda c: c.hooks == "backward" and c.checkpointing == "reentrant", "checkpointing"),
    (lambda c: c.checkpointing != "", "penalty counts"),
    (lambda c: c.penalty == "router" and c.experts == "", "penalty"),
    (lambda c: c.counts == "router bias" and c.experts == "", "counts"),
    (lambda c: c.counts == "running mean" and c.network in ("sequential", "conv1d", "none"),
     "counts"),
    (lambda c: c.penalty == "inner" and c.network in ("sequential", "conv1d", "none"), "penalty"),
    (lambda c: c.experts in ("tensors", "transposed") and c.penalty == "inner", "penalty"),
    (lambda c: c.experts in ("tensors", "transposed") and c.counts == "running mean", "counts"),
    (lambda c: c.signature == "logits", "penalty"),
    (lambda c: c.shared != "", "mixed"),
    (lambda c: c.layers == 1, "mixed"),
    (lambda c: c.mixed and c.rules == "own", "rules"),
    (lambda c: c.dropout or c.way != "parallelize", "twice"),
    (lambda c: c.compiled, "twice penalty counts"),
    (lambda c: c.linear == "functional" and c.way in ("ddp", "fsdp", "zero 3"), "linear"),
    (lambda c: c.tied == "functional" and c.way in ("fsdp", "zero 3"), "tied"),
    (lambda c: c.dropout, "time_first mixed"),
    # transformers' Conv1D views its input, which has to be contiguous.
    (lambda c: c.time_first and c.network == "conv1d", "time_first"),
    (lambda c: c.counts != "" and _spread(c), "counts"),
    (lambda c: c.counts != "" and (c.replicas > 1 or c.resume > 0 or c.autocast), "counts"),
    (lambda c: c.dropout, "lengths resume"),
    (lambda c: c.autocast, "dropout"),
    (lambda c: c.autocast, "precision"),
    (lambda c: c.way == "zero 0" and c.precision == "float32", "precision"),
    # A step of AdamW has the sign of a gradient, which in 16 bits may be that of noise.
    (lambda c: c.precision == "bfloat16" or c.autocast, "optimizer"),
    (lambda c: not _own(c) and c.rules in ("own", "apart"), "rules"),
    (lambda c: c.rules == "apart" and c.linear == "functional", "rules"),
    (lambda c: c.check == "false" and c.rules not in ("own", "apart"), "check"),
    (lambda c: c.dropout and c.shared != "", "shared"),
    (lambda c: c.outputs == "classes", "tied head_bias logits"),
    (lambda c: c.outputs == "classes" and c.ignored != "", "ignored"),
    (lambda c: c.embedding == "projected", "tied"),
    (lambda c: c.projection == "torch", "lora groups names count_names reads head_norm "
     "before_output per_head scale convolution product positions"),
    (lambda c: c.projection == "none" and c.network == "none", "network"),
    (lambda c: c.projection == "none", "groups names count_names reads head_norm attention_bias "
     "before_output per_head scale convolution product head_size heads"),
    (lambda c: c.projection == "none" and c.positions != "learned", "positions"),
    (lambda c: c.projection in ("per head", "latent"), "groups"),
    (lambda c: c.projection == "tensors", "lora"),
    (lambda c: c.projection == "latent", "head_norm"),
    (lambda c: c.product != "manual" and c.per_head in ("sinks", "talking"), "product per_head"),
    (lambda c: c.network == "none", "network_names network_bias inner_norm per_feature "
     "activation experts shared_expert inner"),
    (lambda c: c.network in ("sequential", "conv1d"), "inner_norm per_feature"),
    (lambda c: c.network not in ("plain", "gated") and c.activation == "in place", "activation"),
    (lambda c: c.experts != "" and c.per_feature in ("decay", "convolution"), "per_feature"),
    (lambda c: c.experts in ("tensors", "transposed"), "per_feature inner_norm"),
    (lambda c: c.experts != "" and c.network == "two inputs", "network"),
    (lambda c: c.network == "sequential", "network_names"),
    (lambda c: c.experts == "", "router shared_expert"),
    (lambda c: c.shared == "network" and c.network == "none", "shared"),
    (lambda c: c.shared == "weight" and c.network not in ("plain", "gated", "two inputs"),
     "shared"),
    (lambda c: c.shared == "weight" and c.experts != "", "shared"),
    (lambda c: c.shared == "attention" and c.projection == "none", "shared"),
    (lambda c: c.shared != "" and c.layers == 1, "shared"),
    (lambda c: c.block.startswith("parallel") and "none" in (c.projection, c.network), "block"),
)  # fmt: skip
