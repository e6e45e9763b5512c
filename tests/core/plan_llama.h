/* SPDX-License-Identifier: Apache-2.0 */
/* plan_llama.h -- a small llama and its transformers plan, for tests of a plan. */
#ifndef TP_PLAN_LLAMA_H
#define TP_PLAN_LLAMA_H

#include "plan_fixture.h"

/* A llama of `layers`: hidden 16, 4 query and 2 key/value heads of 4, MLP 24,
 * vocabulary 33. `tied`: the head is the embedding. */
static inline void
add_llama(fixture *f, int layers, bool tied)
{
    char name[64];
    add_fact(f, "num_attention_heads", 4);
    add_fact(f, "num_key_value_heads", 2);
    add_fact(f, "hidden_size", 16);
    f->facts.model_type = "llama";
    add_module(f, "", TP_MODULE_OTHER, 0);
    add_module(f, "model", TP_MODULE_OTHER, 1, "vocab_size", 33);
    const int embedding =
        add_matrix(f, "model.embed_tokens", TP_MODULE_EMBEDDING, 33, 16);
    f->facts.input_embedding = tp_model_parameter(f->model, embedding)->module;
    for (int i = 0; i < layers; i++) {
        static const struct {
            const char *leaf;
            int out;
            int in;
        } linears[] = {{"self_attn.q_proj", 16, 16}, {"self_attn.k_proj", 8, 16},
                       {"self_attn.v_proj", 8, 16},  {"self_attn.o_proj", 16, 16},
                       {"mlp.gate_proj", 24, 16},    {"mlp.up_proj", 24, 16},
                       {"mlp.down_proj", 16, 24}};
        snprintf(name, sizeof(name), "model.layers.%d", i);
        add_module(f, name, TP_MODULE_OTHER, 1, "hidden_size", 16);
        snprintf(name, sizeof(name), "model.layers.%d.self_attn", i);
        add_module(f, name, TP_MODULE_OTHER, 3, "head_dim", 4, "num_key_value_groups",
                   2, "layer_idx", i);
        snprintf(name, sizeof(name), "model.layers.%d.mlp", i);
        add_module(f, name, TP_MODULE_OTHER, 1, "hidden_size", 16);
        for (size_t j = 0; j < sizeof(linears) / sizeof(linears[0]); j++) {
            snprintf(name, sizeof(name), "model.layers.%d.%s", i, linears[j].leaf);
            add_linear(f, name, linears[j].out, linears[j].in);
        }
        snprintf(name, sizeof(name), "model.layers.%d.input_layernorm", i);
        const int norm = add_module(f, name, TP_MODULE_OTHER, 0);
        add_shaped(f, norm, "weight", 1, (int64_t[]){16}, -1);
    }
    const int head = add_module(f, "lm_head", TP_MODULE_LINEAR, 0);
    add_shaped(f, head, "weight", 2, (int64_t[]){33, 16}, tied ? embedding : -1);
    f->facts.output_head = head;
}

static inline void
add_llama_styles(fixture *f)
{
    add_style(f, "model.embed_tokens", "embedding_rowwise");
    add_attention_styles(f, "layers.*.self_attn");
    add_style(f, "layers.*.mlp.gate_proj", "colwise");
    add_style(f, "layers.*.mlp.up_proj", "colwise");
    add_style(f, "layers.*.mlp.down_proj", "rowwise");
    add_style(f, "lm_head", "colwise_gather_output");
}

#endif
