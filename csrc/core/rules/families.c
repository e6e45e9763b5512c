/* SPDX-License-Identifier: Apache-2.0 */
/* families.c -- the blocks that models are made of, recognised by the names of layers.
 */
#include "rules/families.h"

#include <stddef.h>

#include "base/text.h"

const tp_family_block tp_family_blocks[] = {
    /* Of one family. codegen reshapes its features to four parts, one for each device
     * that it was first trained on, and splits each into query, value and key. */
    {"out_proj", {"qkv_proj"}, true, "codegen", 4},
    {"feed_forward.value", {"feed_forward.key"}, false, "rwkv", 0},

    /* Attention with layers of their own for queries, keys and values. */
    {"o_proj", {"q_proj", "k_proj", "v_proj"}, true, NULL, 0},
    {"out_proj", {"q_proj", "k_proj", "v_proj"}, true, NULL, 0},
    {"o_proj.linear",
     {"q_proj.linear", "k_proj.linear", "v_proj.linear"},
     true,
     NULL,
     0},
    {"out_proj", {"query_proj", "key_proj", "value_proj"}, true, NULL, 0},
    {"output.dense", {"self.query", "self.key", "self.value"}, true, NULL, 0},
    {"output.dense",
     {"self.query_proj", "self.key_proj", "self.value_proj"},
     true,
     NULL,
     0},
    {"output.dense",
     {"self_attention.query", "self_attention.key", "self_attention.value"},
     true,
     NULL,
     0},
    {"out_lin", {"q_lin", "k_lin", "v_lin"}, true, NULL, 0},
    {"wo", {"wq", "wk", "wv"}, true, NULL, 0},
    {"Wo", {"q_proj", "k_proj", "v_proj"}, true, NULL, 0},
    {"dense", {"Wq", "Wk", "Wv"}, true, NULL, 0},
    {"dense", {"query", "key", "value"}, true, NULL, 0},
    {"o", {"q", "k", "v"}, true, NULL, 0},
    {"out_proj", {"query", "key", "value"}, true, NULL, 0},
    {"attention_out", {"project_q", "project_k", "project_v"}, true, NULL, 0},
    {"to_out.0", {"to_q", "to_k", "to_v"}, true, NULL, 0},
    {"to_out", {"to_q", "to_k", "to_v"}, true, NULL, 0},

    /* Attention with one layer for all three. */
    {"c_proj", {"c_attn"}, true, NULL, 0},
    {"dense", {"query_key_value"}, true, NULL, 0},
    {"o_proj", {"qkv_proj"}, true, NULL, 0},
    {"out_proj", {"qkv_proj"}, true, NULL, 0},
    {"out_proj", {"Wqkv"}, true, NULL, 0},
    {"Wo", {"Wqkv"}, true, NULL, 0},
    {"out_proj", {"in_proj"}, true, NULL, 0},
    {"out_proj", {"qkv"}, true, NULL, 0},
    {"proj", {"qkv"}, true, NULL, 0},
    {"wo", {"wqkv"}, true, NULL, 0},
    {"o_proj", {"W_pack"}, true, NULL, 0},
    {"attn_out", {"att_proj"}, true, NULL, 0},

    /* What follows attention; one input of twice the features is a gate beside them. */
    {"down_proj", {"gate_proj", "up_proj"}, false, NULL, 0},
    {"down_proj", {"gate_up_proj"}, false, NULL, 0},
    {"down_proj", {"up_proj"}, false, NULL, 0},
    {"proj_down", {"proj_up_gate", "proj_up"}, false, NULL, 0},
    {"w2", {"w1", "w3"}, false, NULL, 0},
    {"w2", {"w1"}, false, NULL, 0},
    {"output_linear", {"input_linear"}, false, NULL, 0},
    {"w_out", {"w_in.w_0", "w_in.w_1"}, false, NULL, 0},
    {"wo", {"wi_0", "wi_1"}, false, NULL, 0},
    {"wo", {"wi"}, false, NULL, 0},
    {"Wo", {"Wi"}, false, NULL, 0},
    {"fc2", {"fc1"}, false, NULL, 0},
    {"fc_out", {"fc_in"}, false, NULL, 0},
    {"c_proj", {"c_fc"}, false, NULL, 0},
    {"dense_4h_to_h", {"dense_h_to_4h"}, false, NULL, 0},
    {"output.dense", {"intermediate.dense"}, false, NULL, 0},
    {"output.dense", {"dense.dense"}, false, NULL, 0},
    {"output", {"intermediate"}, false, NULL, 0},
    {"ffn_output", {"ffn"}, false, NULL, 0},
    {"lin2", {"lin1"}, false, NULL, 0},
    {"linear2", {"linear1"}, false, NULL, 0},
    {"layer_2", {"layer_1"}, false, NULL, 0},
    {"ffn.2", {"ffn.0"}, false, NULL, 0},
    {"mlp.2", {"mlp.0"}, false, NULL, 0},
};

const int tp_family_block_count =
    (int)(sizeof(tp_family_blocks) / sizeof(tp_family_blocks[0]));

const tp_family_experts tp_family_experts_rows[] = {
    {"down_proj", {"gate_up_proj"}, TP_EXPERT_TENSORS, "gpt_oss", true},
    {"down_proj", {"gate_up_proj"}, TP_EXPERT_TENSORS, "openai_privacy_filter", true},
    {"down_proj", {"gate_up_proj"}, TP_EXPERT_TENSORS, NULL, false},
    {"output_linear", {"input_linear"}, TP_EXPERT_MODULES, NULL, false},
    {"w2", {"w1", "v1"}, TP_EXPERT_STACKS, NULL, false},
};

const int tp_family_experts_count =
    (int)(sizeof(tp_family_experts_rows) / sizeof(tp_family_experts_rows[0]));

static const char *const tried[] = {"albert",
                                    "bart",
                                    "bert",
                                    "bert-generation",
                                    "bigbird_pegasus",
                                    "biogpt",
                                    "bitnet",
                                    "blenderbot",
                                    "blenderbot-small",
                                    "bloom",
                                    "camembert",
                                    "codegen",
                                    "cpmant",
                                    "ctrl",
                                    "data2vec-text",
                                    "deberta-v2",
                                    "distilbert",
                                    "electra",
                                    "ernie",
                                    "falcon",
                                    "falcon_mamba",
                                    "fuyu",
                                    "gpt-sw3",
                                    "gpt2",
                                    "gpt_bigcode",
                                    "gpt_neo",
                                    "gpt_neox_japanese",
                                    "gptj",
                                    "jetmoe",
                                    "mamba",
                                    "mamba2",
                                    "marian",
                                    "mbart",
                                    "megatron-bert",
                                    "modernbert",
                                    "modernbert-decoder",
                                    "moshi",
                                    "mpt",
                                    "mt5",
                                    "mvp",
                                    "openai-gpt",
                                    "opt",
                                    "pegasus",
                                    "persimmon",
                                    "plbart",
                                    "rembert",
                                    "roberta",
                                    "roberta-prelayernorm",
                                    "roc_bert",
                                    "roformer",
                                    "rwkv",
                                    "stablelm",
                                    "t5",
                                    "umt5",
                                    "whisper",
                                    "xglm",
                                    "xlm",
                                    "xlm-roberta",
                                    "xlm-roberta-xl"};

static const char *const give_heads[] = {
    "bloom",
    "cpmant",
    "falcon",
    "mpt",
};

/* DeBERTa's embeddings of relative positions, behind the queries of a token. */
static const char *const drop_shared[] = {"pos_dropout"};

static bool
has_text(const char *const *texts, size_t count, const char *text)
{
    for (size_t i = 0; text != NULL && i < count; i++) {
        if (tp_text_same(texts[i], text))
            return true;
    }
    return false;
}

bool
tp_family_is_tried(const char *model_type)
{
    return has_text(tried, sizeof(tried) / sizeof(tried[0]), model_type);
}

bool
tp_family_gives_heads(const char *model_type)
{
    return has_text(give_heads, sizeof(give_heads) / sizeof(give_heads[0]),
                    model_type) ||
           !tp_family_is_tried(model_type);
}

bool
tp_family_drops_shared(const char *leaf)
{
    return has_text(drop_shared, sizeof(drop_shared) / sizeof(drop_shared[0]), leaf);
}
