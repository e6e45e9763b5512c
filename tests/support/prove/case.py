# SPDX-License-Identifier: Apache-2.0
"""What can vary between two cases: one field each, the plainest value first.

A case is a pure function of its seed. It is written as the fields that are not plain, which is also
how one case is asked for. Smaller cases are those with a field nearer to its plain value; a library
that shrinks (hypothesis) would do so by the hundreds, while here each try costs a second.
"""

from dataclasses import Field, dataclass, field, fields
from typing import Any

from tests.support.prove.names import COUNT_NAMES, ENCODERS, FAMILIES, NAMES, NETWORK_NAMES


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
    precision: str = choice("float64", "float32", "bfloat16", plain=0.7)
    optimizer: str = choice("sgd", "adamw", plain=0.5)
    # Groups of parameters: vectors without decay, or embeddings with another learning rate.
    settings: str = choice("one", "decay", "rates", plain=0.75)
    schedule: bool = choice(False, True, plain=0.8)
    clip: str = choice("", "norm", "value")
    accumulate: int = choice(1, 2, plain=0.7)
    checkpointing: str = choice("", "not reentrant", "reentrant", plain=0.75)
    lora: str = choice("", "before", "after", plain=0.85)
    frozen: int = choice(0, 1, 2, 3, plain=0.75)  # which third of the parameters is frozen
    autocast: bool = choice(False, True, plain=0.93)
    sequence: bool = choice(False, True, plain=0.8)
    rules: str = choice("", "own", "apart", "random", plain=0.65)
    start: str = choice("", "rank 0", "files", plain=0.85)  # where the weights are at first
    resume: int = choice(0, 2, 3, 4, plain=0.85)  # the last step goes on at this TP size
    check: str = choice("auto", "false", plain=0.9)
    compiled: str = choice("", "aot_eager", "inductor", plain=0.99)
    expert_partition: str = choice("", "experts", "auto", plain=0.7)
    # What is done with the model between the second and the third step.
    between: str = choice("", "gather", "reload", "evaluate", "thaw", plain=0.75)
    hooks: str = choice("", "forward", "backward", plain=0.85)
    twice: bool = choice(False, True, plain=0.9)  # two forwards before a backward
    backward: str = choice("once", "twice", plain=0.9)  # through one graph
    # By torch.func with parameters that are made of the model's, as in meta-learning.
    functional: bool = choice(False, True, plain=0.95)
    lengths: bool = choice(False, True, plain=0.8)  # a shorter batch in the second step
    skipped: str = choice("", "block", "head", plain=0.9)  # what the second step does not use
    # Whether what comes before the second block trains with the rest.
    trunk: str = choice("", "detached", "no grad", plain=0.93)
    # Sizes.
    rows: int = choice(2, 4, 1, plain=0.7)
    length: int = choice(6, 5, 8, 9, plain=0.4)
    layers: int = choice(1, 2, 3, plain=0.4)
    heads: int = choice(4, 2, 1, 3, 5, 6, 8, plain=0.3)
    groups: int = choice(0, 1, 2, 3, 4, plain=0.5)  # key/value heads; 0: as many as heads
    head_size: int = choice(4, 2, 6, 8, plain=0.4)
    hidden: int = choice(16, 24, 20, 30, 14, plain=0.4)
    inner: int = choice(32, 24, 20, 30, 13, plain=0.4)
    vocabulary: int = choice(64, 61, 66, 48, plain=0.4)
    # A family of transformers, or a model of the user's own.
    family: str = choice("", *FAMILIES, *ENCODERS, plain=0.7)
    # The model. An output layer may be the embedding's weight without a module of its own.
    tied: str = choice("", "weight", "functional")
    head_bias: bool = choice(False, True, plain=0.8)
    shared: str = choice("", "block", "attention", "network", "weight", plain=0.8)
    outputs: str = choice(
        "one", "two heads", "value head", "z-loss", "hidden loss", "classes", plain=0.6
    )
    signature: str = choice("loss", "labels", "logits", plain=0.4)
    embedding: str = choice("", "scaled", "norm", "projected", plain=0.7)
    logits: str = choice("", "scaled", "capped", "in place", "shifted", plain=0.75)
    # Targets that count for nothing: some of each row, or in the second step all of a row.
    ignored: str = choice("", "some", "row", plain=0.8)
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
        "latent", "torch", "k is v", "tensors", "none", plain=0.3,
    )  # fmt: skip
    names: str = choice(*NAMES, plain=0.3)
    count_names: str = choice(*COUNT_NAMES, plain=0.4)
    # What the forward uses to reshape.
    reads: str = choice("counts", "sizes", "widths", "einops", plain=0.6)
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
    activation: str = choice(
        "gelu", "silu", "tanh", "squared", "in place", "own backward", "vmap", plain=0.5
    )
    experts: str = choice("", "list", "tensors", "transposed", plain=0.75)
    router: str = choice("softmax", "sigmoid", "top 1", "bias", plain=0.5)
    shared_expert: str = choice("", "plain", "gated", plain=0.7)
    # At the end, so that the fields above are as ever for a seed.
    offload: bool = choice(False, True, plain=0.85)
    # All forwards of a step before its backward passes.
    forwards_first: bool = choice(False, True, plain=0.85)
    # Squares of all parameters in what is differentiated, of a rank's shards.
    squares: bool = choice(False, True, plain=0.85)
    seed: int = choice(0, plain=1.0)  # of weights, inputs and what else is drawn

    def __str__(self) -> str:
        return " ".join(
            f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if not is_plain(self, f)
        )


def is_plain(case: Case, each: Field[Any]) -> bool:
    return bool(getattr(case, each.name) == each.default)
