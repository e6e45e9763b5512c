# SPDX-License-Identifier: Apache-2.0
"""Time of a plan for a model of 50,000 parameters, against a target of 150 ms.

A mixture of experts is described in the form that the core takes, so neither torch nor the model
is needed. Two sets of rules are tried: 20 regular expressions as a user writes them, and the
entries of a transformers tp_plan. Figures are medians; the target is for model and plan together.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from deepspeed_autotp._core import Model, Plan, Rules

TARGET_MS = 150
HIDDEN, FEATURES, HEADS, KEY_HEADS, HEAD_DIM, VOCABULARY = 4096, 1536, 32, 8, 128, 151936

COLUMN = {"partition_type": "column"}
ROW = {"partition_type": "row"}
SKIP = {"partition_type": "skip"}
SUM = {"partition_type": "skip", "sum_gradient": True}
GATHER = {"partition_type": "column", "gather_output": True}

PATTERNS: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"model\.layers\.[0-2]\.mlp\.experts\.\d+\.down_proj\.weight$", SKIP),
    (r".*\.(input|post_attention)_layernorm\.weight$", SKIP),
    (r".*\.self_attn\.q_norm\.weight$", SUM),
    (r".*\.self_attn\.k_norm\.weight$", SUM),
    (r".*\.self_attn\.q_proj\.(weight|bias)$", COLUMN),
    (r".*\.self_attn\.k_proj\.(weight|bias)$", COLUMN),
    (r".*\.self_attn\.v_proj\.(weight|bias)$", COLUMN),
    (r".*\.self_attn\.o_proj\.weight$", ROW),
    (r".*\.mlp\.gate\.weight$", SKIP),
    (r".*\.mlp\.shared_expert_gate\.weight$", SKIP),
    (r".*\.mlp\.shared_expert\.gate_proj\.weight$", COLUMN),
    (r".*\.mlp\.shared_expert\.up_proj\.weight$", COLUMN),
    (r".*\.mlp\.shared_expert\.down_proj\.weight$", ROW),
    (r".*\.mlp\.experts\.\d+\.gate_proj\.weight$", COLUMN),
    (r".*\.mlp\.experts\.\d+\.up_proj\.weight$", COLUMN),
    (r".*\.mlp\.experts\.\d+\.down_proj\.weight$", ROW),
    (r"^model\.norm\.weight$", SKIP),
    (r"model\.embed_tokens\.weight$", ROW),
    (r"lm_head\.weight$", GATHER),
    (r".*norm.*", SKIP),
)

STYLES = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
    "layers.*.mlp.experts.*.gate_proj": "colwise",
    "layers.*.mlp.experts.*.up_proj": "colwise",
    "layers.*.mlp.experts.*.down_proj": "rowwise",
    "layers.*.mlp.shared_expert.gate_proj": "colwise",
    "layers.*.mlp.shared_expert.up_proj": "colwise",
    "layers.*.mlp.shared_expert.down_proj": "rowwise",
    "lm_head": "colwise_gather_output",
}


class Description:
    """The modules and parameters of a mixture of experts, as Model takes them."""

    def __init__(self, *, layers: int, experts: int) -> None:
        self.modules: list[tuple[str, str, str, dict[str, int]]] = []
        self.parameters: list[tuple[str, str, int, tuple[int, ...], str, int, int]] = []
        self._module("", "MoeForCausalLM", "other")
        self._module("model", "MoeModel", "other")
        self._leaf("model.embed_tokens", "embedding", VOCABULARY, HIDDEN)
        self._module("model.layers", "ModuleList", "other")
        for layer in range(layers):
            self._layer(f"model.layers.{layer}", experts)
        self._leaf("model.norm", "other", HIDDEN)
        self._leaf("lm_head", "linear", VOCABULARY, HIDDEN)

    def _module(self, name: str, class_name: str, kind: str, **integers: int) -> None:
        self.modules.append((name, class_name, kind, integers))

    def _leaf(self, name: str, kind: str, *shape: int, bias: bool = False) -> None:
        """A module with a weight."""
        self._module(name, "Leaf", kind)
        index = len(self.modules) - 1
        self.parameters.append((f"{name}.weight", "weight", index, shape, "bfloat16", 2, -1))
        if bias:
            self.parameters.append((f"{name}.bias", "bias", index, shape[:1], "bfloat16", 2, -1))

    def _gated(self, name: str) -> None:
        self._module(name, "MoeMLP", "other", hidden_size=HIDDEN, intermediate_size=FEATURES)
        self._leaf(f"{name}.gate_proj", "linear", FEATURES, HIDDEN)
        self._leaf(f"{name}.up_proj", "linear", FEATURES, HIDDEN)
        self._leaf(f"{name}.down_proj", "linear", HIDDEN, FEATURES)

    def _layer(self, name: str, experts: int) -> None:
        """16 parameters, and 3 for each expert."""
        self._module(name, "MoeDecoderLayer", "other", hidden_size=HIDDEN)
        attention = f"{name}.self_attn"
        groups = HEADS // KEY_HEADS
        self._module(
            attention, "MoeAttention", "other", head_dim=HEAD_DIM, num_key_value_groups=groups
        )
        for leaf, heads in (("q", HEADS), ("k", KEY_HEADS), ("v", KEY_HEADS)):
            self._leaf(f"{attention}.{leaf}_proj", "linear", heads * HEAD_DIM, HIDDEN, bias=True)
        self._leaf(f"{attention}.o_proj", "linear", HIDDEN, HEADS * HEAD_DIM)
        self._leaf(f"{attention}.q_norm", "other", HEAD_DIM)
        self._leaf(f"{attention}.k_norm", "other", HEAD_DIM)
        self._module(f"{name}.mlp", "MoeBlock", "other", num_experts=experts, top_k=8)
        self._leaf(f"{name}.mlp.gate", "linear", experts, HIDDEN)
        self._module(f"{name}.mlp.experts", "ModuleList", "other")
        for expert in range(experts):
            self._gated(f"{name}.mlp.experts.{expert}")
        self._gated(f"{name}.mlp.shared_expert")
        self._leaf(f"{name}.mlp.shared_expert_gate", "linear", 1, HIDDEN)
        self._leaf(f"{name}.input_layernorm", "other", HIDDEN)
        self._leaf(f"{name}.post_attention_layernorm", "other", HIDDEN)

    def model(self) -> Model:
        return Model(
            self.modules,
            self.parameters,
            model_type="qwen2_moe",
            prefix="model",
            integers={
                "hidden_size": HIDDEN,
                "num_attention_heads": HEADS,
                "num_key_value_heads": KEY_HEADS,
            },
            input_embedding=2,
            output_head=len(self.modules) - 1,
        )


def pattern_rules() -> Rules:
    rules = Rules()
    for index, (pattern, spec) in enumerate(PATTERNS):
        rules.add([pattern], spec, label=f"layer_specs[{index}]")
    return rules


def style_rules() -> Rules:
    rules = Rules()
    for pattern, style in STYLES.items():
        rules.add_style(pattern, style)
    return rules


def milliseconds(make: Callable[[], object], *, repeats: int) -> float:
    """Median time of a call, without the time to free what it returns."""

    def times() -> Iterator[float]:
        for _ in range(repeats):
            start = time.perf_counter()
            made = make()
            yield (time.perf_counter() - start) * 1e3
            del made

    return statistics.median(times())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=173)
    parser.add_argument("--experts", type=int, default=91, help="per layer")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()

    description = Description(layers=options.layers, experts=options.experts)
    model = description.model()
    model_ms = milliseconds(description.model, repeats=options.repeats)
    table = Table(title=f"plan of {len(description.parameters):,} parameters, TP {options.ranks}")
    table.add_column("rules")
    for column in ("Model ms", "Rules ms", "Plan ms", "total ms", f"of {TARGET_MS} ms"):
        table.add_column(column, justify="right")
    for name, make in (("patterns", pattern_rules), ("tp_plan", style_rules)):
        rules = make()
        rules_ms = milliseconds(make, repeats=options.repeats)
        plan_ms = milliseconds(
            partial(Plan, model, rules, ranks=options.ranks), repeats=options.repeats
        )
        total = model_ms + rules_ms + plan_ms
        cells = [f"{value:.1f}" for value in (model_ms, rules_ms, plan_ms, total)]
        table.add_row(f"{len(rules)} {name}", *cells, f"{total / TARGET_MS:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
