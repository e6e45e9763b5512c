# SPDX-License-Identifier: Apache-2.0
"""What can vary between two cases: one field each, the plainest value first.

A case is a pure function of its seed. It is written as the fields that are not plain, which is also
how one case is asked for. Smaller cases are those with a field nearer to its plain value; a library
that shrinks (hypothesis) would do so by the hundreds, while here each try costs a second.
"""

import ast
import random
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

# How the layers of an attention are called: queries, keys, values, output; fused; keys|values.
NAMES = {
    "q_proj": ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "kv_proj"),
    "wq": ("wq", "wk", "wv", "wo", "wqkv", "wkv"),
    "to_q": ("to_q", "to_k", "to_v", "to_out", "to_qkv", "to_kv"),
    "query": ("query", "key", "value", "dense", "query_key_value", "key_value"),
    "q": ("q", "k", "v", "o", "qkv", "kv"),
    "c_attn": ("q_attn", "k_attn", "v_attn", "c_proj", "c_attn", "kv_attn"),
    "in_proj": ("q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "kv_proj"),
    "qkv": ("q_lin", "k_lin", "v_lin", "proj", "qkv", "kv"),
    "unknown": ("asker", "index", "content", "mix", "triple", "pair"),
}
# How those of a network are called: gate, up, down; gate|up.
NETWORK_NAMES = {
    "up_proj": ("gate_proj", "up_proj", "down_proj", "gate_up_proj"),
    "w1": ("w1", "w3", "w2", "w13"),
    "fc1": ("gate", "fc1", "fc2", "fc1"),
    "c_fc": ("w_gate", "c_fc", "c_proj", "c_fc"),
    "wi": ("wi_0", "wi_1", "wo", "wi"),
    "linear1": ("linear3", "linear1", "linear2", "linear1"),
    "unknown": ("valve", "widen", "narrow", "widen"),
}
# How the numbers of heads, of key/value heads and of features of a head are called.
COUNT_NAMES = {
    "num_heads": ("num_heads", "num_key_value_heads", "head_dim"),
    "n_head": ("n_head", "n_kv_head", "head_size"),
    "n_heads": ("n_heads", "n_kv_heads", "head_dim"),
    "heads": ("heads", "kv_heads", "dim_head"),
    "unknown": ("n_q", "n_groups", "size"),
}

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "phi", "gpt2",
    "gpt_neo", "gpt_neox", "gptj", "bloom", "falcon", "opt", "mixtral", "qwen2_moe", "qwen3_moe",
    "olmo", "olmo2", "olmoe", "cohere", "cohere2", "glm", "glm4", "granite", "starcoder2",
    "stablelm", "deepseek_v2", "deepseek_v3", "gpt_oss", "persimmon", "gpt_bigcode", "helium",
    "smollm3", "nemotron", "mpt",
)  # fmt: skip


def choice(*values: Any, plain: float = 0.6) -> Any:
    """A field with these values, of which the first is drawn with probability ``plain``."""
    return field(default=values[0], metadata={"values": values, "plain": plain})


@dataclass(frozen=True, slots=True)
class Case:
    """A model, and how it is trained."""

    # The run.
    tp: int = choice(2, 3, 4, plain=0.5)
    replicas: int = choice(1, 2, plain=0.9)
    way: str = choice(
        "parallelize", "zero 0", "zero 1", "zero 2", "zero 3", "ddp", "fsdp", plain=0.6
    )
    # In float32 the self-check allows more, as it does for most users.
    precision: str = choice("float64", "float32", plain=0.7)
    optimizer: str = choice("sgd", "adamw", plain=0.5)
    clip: bool = choice(False, True)
    accumulate: int = choice(1, 2, plain=0.7)
    checkpointing: str = choice("", "not reentrant", "reentrant", plain=0.75)
    lora: str = choice("", "before", "after", plain=0.85)
    frozen: int = choice(0, 1, 2, 3, plain=0.75)  # which third of the parameters is frozen
    autocast: bool = choice(False, True, plain=0.93)
    sequence: bool = choice(False, True, plain=0.8)
    rules: str = choice("", "own", "apart", "random", plain=0.65)
    start: str = choice("", "rank 0", "files", plain=0.85)  # where the weights are at first
    resume: bool = choice(False, True, plain=0.85)  # at another TP size for the last step
    check: str = choice("auto", "false", plain=0.9)
    compiled: bool = choice(False, True, plain=0.997)
    # What is done with the model between the second and the third step.
    between: str = choice("", "gather", "reload", "evaluate", "thaw", plain=0.75)
    hooks: str = choice("", "forward", "backward", plain=0.85)
    twice: bool = choice(False, True, plain=0.9)  # two forwards before a backward
    lengths: bool = choice(False, True, plain=0.8)  # a shorter batch in the second step
    # Sizes.
    rows: int = choice(2, 4, plain=0.8)
    length: int = choice(6, 5, 8, 9, plain=0.4)
    layers: int = choice(1, 2, 3, plain=0.4)
    heads: int = choice(4, 2, 1, 3, 5, 6, 8, plain=0.3)
    groups: int = choice(0, 1, 2, 3, 4, plain=0.5)  # key/value heads; 0: as many as heads
    head_size: int = choice(4, 2, 6, 8, plain=0.4)
    hidden: int = choice(16, 24, 20, 30, 14, plain=0.4)
    inner: int = choice(32, 24, 20, 30, 13, plain=0.4)
    vocabulary: int = choice(64, 61, 66, 48, plain=0.4)
    # A family of transformers, or a model of the user's own.
    family: str = choice("", *FAMILIES, plain=0.75)
    # The model.
    tied: bool = choice(False, True)
    head_bias: bool = choice(False, True, plain=0.8)
    shared: str = choice("", "block", "attention", "network", "weight", plain=0.8)
    outputs: str = choice(
        "one", "two heads", "value head", "z-loss", "hidden loss", "classes", plain=0.6
    )
    signature: str = choice("loss", "labels", "logits", plain=0.4)
    embedding: str = choice("", "scaled", "norm", "projected", plain=0.7)
    logits: str = choice("", "scaled", "capped", "in place", "shifted", plain=0.75)
    ignored: bool = choice(False, True, plain=0.8)  # targets that count for nothing
    dropout: bool = choice(False, True, plain=0.85)
    # What is so small that an error in it hardly shows in the outputs.
    tiny: str = choice("", "outputs", "scales", "one layer", plain=0.85)
    block: str = choice("pre", "post", "parallel", "parallel norms", "sandwich", plain=0.5)
    norm: str = choice("layer", "rms", "own rms", "none", plain=0.4)
    residual: str = choice(
        "", "constant", "small", "vector", "scalar", "gate", "in place", plain=0.6
    )
    # How linear layers are made, or called: their weights may be used without their forward.
    linear: str = choice("", "scaled", "weight norm", "functional", plain=0.88)
    mixed: bool = choice(False, True, plain=0.8)  # blocks that differ from each other
    time_first: bool = choice(False, True, plain=0.9)  # tokens before rows between blocks
    # What is added to the loss from within blocks, and what they count.
    penalty: str = choice("", "inner", "router", plain=0.9)
    counts: str = choice("", "running mean", "router bias", plain=0.9)
    model_names: str = choice("layers", "blocks", "h", "unknown", plain=0.4)
    # Attention.
    projection: str = choice(
        "separate", "qkv", "vqk", "per head", "per group", "q, kv", "q, kv per head", "parameter",
        "latent", "torch", "k is v", "none", plain=0.3,
    )  # fmt: skip
    names: str = choice(*NAMES, plain=0.3)
    count_names: str = choice(*COUNT_NAMES, plain=0.4)
    reads: str = choice("counts", "sizes", "widths", plain=0.6)  # what the forward uses to reshape
    attention_bias: str = choice("", "all", "inputs", plain=0.6)
    head_norm: str = choice("", "per head", "per head layer", "full", "full layer", plain=0.65)
    before_output: str = choice(
        "", "norm", "head norm", "gate", "head gate", "group norm", "mean", plain=0.75
    )
    positions: str = choice("", "learned", "rotary", "alibi", "table", plain=0.5)
    per_head: str = choice(
        "",
        "temperature",
        "one temperature",
        "outer temperature",
        "sinks",
        "offset",
        "talking",
        plain=0.7,
    )
    scale: str = choice("", "counts", "over heads", plain=0.8)  # what scores are divided by
    convolution: bool = choice(False, True, plain=0.9)  # of each feature of queries over tokens
    product: str = choice("sdpa", "manual", "capped", "window", plain=0.6)
    # What follows.
    network: str = choice(
        "plain", "gated", "gate|up", "up|gate", "per feature", "two inputs", "sequential", "conv1d",
        "none", plain=0.3,
    )  # fmt: skip
    network_names: str = choice(*NETWORK_NAMES, plain=0.3)
    network_bias: bool = choice(False, True)
    inner_norm: str = choice("", "layer", "rms", "softmax", "unit", "largest", plain=0.8)
    per_feature: str = choice("", "scale", "bias", "decay", "convolution", plain=0.8)
    activation: str = choice("gelu", "silu", "tanh", "squared", "in place", plain=0.5)
    experts: str = choice("", "list", "tensors", "transposed", plain=0.75)
    router: str = choice("softmax", "sigmoid", "top 1", "bias", plain=0.5)
    shared_expert: str = choice("", "plain", "gated", plain=0.7)
    seed: int = choice(0, plain=1.0)  # of weights, inputs and what else is drawn

    def __str__(self) -> str:
        return " ".join(
            f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if not is_plain(self, f)
        )


def is_plain(case: Case, each: Field[Any]) -> bool:
    return bool(getattr(case, each.name) == each.default)


def draw(seed: int, tp: int | None = None, **fixed: Any) -> Case:
    """The case of a seed; ``tp`` and ``fixed`` replace what is drawn."""
    source = random.Random(seed)
    drawn: dict[str, Any] = {"seed": seed}
    for each in fields(Case):
        values, plain = each.metadata["values"], each.metadata["plain"]
        number, other = source.random(), source.randrange(max(1, len(values) - 1))
        if each.name != "seed":
            drawn[each.name] = values[0] if number < plain else values[1:][other]
    if tp is not None:
        drawn["tp"] = tp
    return settle(Case(**{**drawn, **fixed}))


def parse(text: str) -> Case:
    """The case that ``str`` writes."""
    changes = {}
    tree = ast.parse(f"dict({', '.join(_assignments(text))})", mode="eval")
    assert isinstance(tree.body, ast.Call)
    for keyword in tree.body.keywords:
        changes[keyword.arg] = ast.literal_eval(keyword.value)
    return settle(Case(**changes))


def _assignments(text: str) -> list[str]:
    """``a=1 b='c d'`` at the spaces that are not within quotes."""
    found, quoted = [""], False
    for letter in text.strip():
        quoted ^= letter == "'"
        if letter == " " and not quoted:
            found.append("")
        else:
            found[-1] += letter
    return [each for each in found if each]


def is_plainer(case: Case, name: str, value: Any) -> bool:
    values = Case.__dataclass_fields__[name].metadata["values"]
    return bool(values.index(value) < values.index(getattr(case, name)))


def plainer(case: Case) -> Iterator[tuple[str, Any]]:
    """Fields and values for them that are plainer: first the plain value of each field, then those
    between."""
    for is_between in (False, True):
        for each in fields(case):
            values, own = each.metadata["values"], getattr(case, each.name)
            if each.name != "seed" and own in values[1:]:
                nearer = values[1 : values.index(own)] if is_between else values[:1]
                yield from ((each.name, value) for value in nearer)


def settle(case: Case) -> Case:
    """Without contradictions: what cannot be with something else becomes plain."""
    settled = _settle_once(case)
    return case if settled == case else settle(settled)


def _settle_once(case: Case) -> Case:
    for condition, plain in _contradictions:
        if condition(case):
            names = plain.split()
            case = replace(case, **{n: Case.__dataclass_fields__[n].default for n in names})
    if case.way in ("ddp", "fsdp"):
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


_OF_LOGITS = ("one", "z-loss", "classes")
MODEL_FIELDS = (
    "head_bias shared embedding logits block norm residual linear mixed time_first penalty counts "
    "model_names projection names "
    "count_names reads attention_bias head_norm before_output positions per_head scale convolution "
    "product network network_names network_bias inner_norm per_feature activation experts router "
    "shared_expert"
)

# What is put back to its plain values where a condition holds, in this order.
_contradictions: tuple[tuple[Any, str], ...] = (
    (lambda c: not _own(c), MODEL_FIELDS),
    (lambda c: not _own(c), "dropout"),
    (lambda c: not _own(c) and c.signature == "loss" and c.outputs != "one", "outputs"),
    (lambda c: not _own(c) and c.outputs not in ("one", "z-loss"), "outputs"),
    (lambda c: c.way in ("ddp", "fsdp") and c.tp != 2, "way"),
    (lambda c: c.replicas > 1 and c.tp != 2, "replicas"),
    (lambda c: c.replicas > 1, "resume dropout"),
    (lambda c: c.way in ("ddp", "fsdp"), "dropout resume compiled lora start between hooks"),
    (lambda c: c.way == "fsdp", "shared"),
    (lambda c: c.way != "parallelize", "resume autocast compiled start check"),
    (lambda c: c.between == "thaw" and c.frozen == 0, "between"),
    (lambda c: c.between != "" and c.way.startswith("zero") and c.between != "evaluate",
     "between"),
    (lambda c: c.ignored and c.outputs == "classes", "ignored"),
    (lambda c: c.logits in ("in place", "shifted") and c.signature == "logits", "logits"),
    (lambda c: c.way == "zero 3", "sequence dropout"),
    (lambda c: c.resume and c.tp != 4, "resume"),
    (lambda c: c.start == "files" and _own(c), "start"),
    (lambda c: c.start != "", "rules lora dropout frozen"),
    (lambda c: c.lora != "", "frozen resume linear between"),
    (lambda c: c.linear != "" and c.start != "", "linear"),
    (lambda c: c.checkpointing == "reentrant", "frozen lora"),
    # DeepSpeed and DistributedDataParallel themselves reduce a gradient once.
    (lambda c: c.checkpointing == "reentrant" and c.way == "ddp", "checkpointing"),
    (lambda c: c.checkpointing == "reentrant" and c.way.startswith("zero"), "shared"),
    (lambda c: c.signature == "logits" and c.outputs not in _OF_LOGITS, "outputs"),
    (lambda c: c.way != "parallelize" and c.lora == "after", "lora"),
    (lambda c: c.compiled, "dropout checkpointing hooks"),
    (lambda c: c.resume, "between"),
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
    (lambda c: c.signature == "logits" or c.replicas > 1, "penalty"),  # no mean over rows
    (lambda c: c.shared != "", "mixed"),
    (lambda c: c.layers == 1, "mixed"),
    (lambda c: c.mixed and c.rules == "own", "rules"),
    (lambda c: c.dropout or c.way != "parallelize", "twice"),
    (lambda c: c.compiled, "twice penalty counts"),
    (lambda c: c.linear == "functional" and c.way in ("ddp", "fsdp", "zero 3"), "linear"),
    (lambda c: c.dropout, "time_first mixed"),
    (lambda c: c.counts != "" and c.way in ("ddp", "fsdp"), "counts"),
    (lambda c: c.counts != "" and (c.replicas > 1 or c.resume or c.autocast), "counts"),
    (lambda c: c.dropout, "lengths resume"),
    (lambda c: c.autocast, "dropout optimizer"),
    (lambda c: c.way == "zero 0" or c.autocast, "precision"),
    (lambda c: c.precision == "float32", "optimizer"),
    (lambda c: c.optimizer == "adamw" and c.way != "parallelize", "optimizer"),
    (lambda c: not _own(c) and c.rules in ("own", "apart"), "rules"),
    (lambda c: c.rules == "apart" and c.linear == "functional", "rules"),
    (lambda c: c.check == "false" and c.rules not in ("own", "apart"), "check"),
    (lambda c: c.resume, "accumulate"),
    (lambda c: c.dropout and c.shared != "", "shared"),
    (lambda c: c.outputs == "classes", "tied head_bias logits"),
    (lambda c: c.embedding == "projected", "tied"),
    (lambda c: c.projection == "torch", "lora groups names count_names reads head_norm "
     "before_output per_head scale convolution product positions"),
    (lambda c: c.projection == "none" and c.network == "none", "network"),
    (lambda c: c.projection == "none", "groups names count_names reads head_norm attention_bias "
     "before_output per_head scale convolution product head_size heads"),
    (lambda c: c.projection == "none" and c.positions != "learned", "positions"),
    (lambda c: c.projection in ("per head", "latent"), "groups"),
    (lambda c: c.projection == "latent", "head_norm"),
    (lambda c: c.product != "manual" and c.per_head in ("sinks", "talking"), "product"),
    (lambda c: c.product != "manual" and c.per_head in ("sinks", "talking"), "per_head"),
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
