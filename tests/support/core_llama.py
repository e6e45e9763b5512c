# SPDX-License-Identifier: Apache-2.0
"""A small llama as ``_core`` is given it, and the rules of a preset."""

from collections.abc import Mapping

from deepspeed_autotp._core import Model, Rules

HIDDEN, HEADS, KEY_HEADS, LAYERS = 64, 4, 2, 3
HEAD = HIDDEN // HEADS
ROOT_MODULE: tuple[str, str, str, Mapping[str, int]] = ("", "Net", "other", {})


def llama(*, layers: int = LAYERS, key_heads: int = KEY_HEADS, tied: bool = True) -> Model:
    """A llama as ``planning.model_description`` gives it to the core."""
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": key_heads, "head_dim": HEAD}
    modules: list[tuple[str, str, str, Mapping[str, int]]] = [
        ("", "LlamaForCausalLM", "other", {}),
        ("model", "LlamaModel", "other", {}),
        ("model.embed_tokens", "Embedding", "embedding", {"num_embeddings": 128}),
    ]
    parameters: list[tuple[str, str, int, tuple[int, ...], str, int, int]] = [
        ("model.embed_tokens.weight", "weight", 2, (128, HIDDEN), "float32", 4, -1)
    ]

    def linear(name: str, rows: int, columns: int) -> None:
        modules.append((name, "Linear", "linear", {"in_features": columns, "out_features": rows}))
        shape = (rows, columns)
        parameters.append((f"{name}.weight", "weight", len(modules) - 1, shape, "float32", 4, -1))

    for layer in range(layers):
        block = f"model.layers.{layer}"
        modules.append((block, "LlamaDecoderLayer", "other", {"hidden_size": HIDDEN}))
        modules.append((f"{block}.self_attn", "LlamaAttention", "other", heads))
        linear(f"{block}.self_attn.q_proj", HIDDEN, HIDDEN)
        linear(f"{block}.self_attn.k_proj", key_heads * HEAD, HIDDEN)
        linear(f"{block}.self_attn.v_proj", key_heads * HEAD, HIDDEN)
        linear(f"{block}.self_attn.o_proj", HIDDEN, HIDDEN)
        modules.append((f"{block}.mlp", "LlamaMLP", "other", {}))
        linear(f"{block}.mlp.gate_proj", 4 * HIDDEN, HIDDEN)
        linear(f"{block}.mlp.up_proj", 4 * HIDDEN, HIDDEN)
        linear(f"{block}.mlp.down_proj", HIDDEN, 4 * HIDDEN)
    modules.append(("lm_head", "Linear", "linear", {}))
    head = len(modules) - 1
    tie = 0 if tied else -1
    parameters.append(("lm_head.weight", "weight", head, (128, HIDDEN), "float32", 4, tie))
    return Model(
        modules,
        parameters,
        model_type="llama",
        prefix="model",
        integers=heads,
        input_embedding=2,
        output_head=head,
    )


def preset(name: str = "llama") -> Rules:
    rules = Rules()
    rules.add_preset(name)
    return rules
