/* SPDX-License-Identifier: Apache-2.0 */
/* preset.c -- DeepSpeed's seven presets as one table. */
#include "rules/preset.h"

#include "base/did_you_mean.h"

#define COLUMN                                      \
    {                                               \
        .partition = TP_PARTITION_COLUMN, .dim = -1 \
    }
#define ROW                                      \
    {                                            \
        .partition = TP_PARTITION_ROW, .dim = -1 \
    }
#define SKIP                                      \
    {                                             \
        .partition = TP_PARTITION_SKIP, .dim = -1 \
    }
#define GATE_UP                                                \
    {                                                          \
        .partition = TP_PARTITION_COLUMN, .dim = 0, .shape = { \
            .dims = 2,                                         \
            .sizes = {2, -1}                                   \
        }                                                      \
    }

/* A fused q|k|v has no shape here on purpose: its pieces are equal only where
 * there are as many key/value heads as query heads, so equal thirds would split
 * through heads of a model with grouped-query attention, and BLOOM has them
 * head by head. The plan finds the pieces from the head counts of the module
 * and of the model's configuration. */
#define FUSED_QKV COLUMN

static const tp_preset_row llama_rows[] = {
    {".*\\.self_attn\\.o_proj\\.weight$", ROW},
    {".*\\.self_attn\\.[qkv]_proj\\.weight$", COLUMN},
    {".*\\.mlp\\.down_proj\\.weight$", ROW},
    {".*\\.mlp\\.(up|gate)_proj\\.weight$", COLUMN},
};

static const tp_preset_row bloom_rows[] = {
    {".*\\.self_attention\\.dense\\.weight$", ROW},
    {".*\\.self_attention\\.query_key_value\\.weight$", FUSED_QKV},
    {".*\\.mlp\\.dense_4h_to_h\\.weight$", ROW},
    {".*\\.mlp\\.dense_h_to_4h\\.weight$", COLUMN},
};

static const tp_preset_row chatglm_rows[] = {
    {".*\\.self_attention\\.dense\\.weight$", ROW},
    {".*\\.self_attention\\.query_key_value\\.weight$", FUSED_QKV},
    {".*\\.mlp\\.dense_4h_to_h\\.weight$", ROW},
    {".*\\.mlp\\.dense_h_to_4h\\.weight$", GATE_UP},
};

static const tp_preset_row mixtral_rows[] = {
    {".*\\.self_attn\\.o_proj\\.weight$", ROW},
    {".*\\.self_attn\\.[qkv]_proj\\.weight$", COLUMN},
    {".*\\.block_sparse_moe\\.experts\\.\\d+\\.w2\\.weight$", ROW},
    {".*\\.block_sparse_moe\\.experts\\.\\d+\\.w[13]\\.weight$", COLUMN},
    {".*\\.block_sparse_moe\\.gate\\.weight$", SKIP},
};

static const tp_preset_row deepseek_v2_rows[] = {
    {".*\\.self_attn\\.o_proj\\.weight$", ROW},
    {".*\\.self_attn\\.(q_a_proj|kv_a_proj_with_mqa)\\.weight$", SKIP},
    {".*\\.self_attn\\.(q_b_proj|kv_b_proj)\\.weight$", COLUMN},
    {".*\\.mlp\\.experts\\.\\d+\\.down_proj\\.weight$", ROW},
    {".*\\.mlp\\.experts\\.\\d+\\.(up|gate)_proj\\.weight$", COLUMN},
    {".*\\.mlp\\.gate\\.weight$", SKIP},
    {".*\\.mlp\\.shared_experts\\.down_proj\\.weight$", ROW},
    {".*\\.mlp\\.shared_experts\\.(up|gate)_proj\\.weight$", COLUMN},
};

static const tp_preset_row qwen2_rows[] = {
    {".*\\.self_attn\\.o_proj\\.weight$", ROW},
    {".*\\.self_attn\\.[qkv]_proj\\.weight$", COLUMN},
    {".*\\.mlp\\.down_proj\\.weight$", ROW},
    {".*\\.mlp\\.(up|gate)_proj\\.weight$", COLUMN},
};

static const tp_preset_row phi3_rows[] = {
    {".*\\.self_attn\\.o_proj\\.weight$", ROW},
    {".*\\.self_attn\\.qkv_proj\\.weight$", FUSED_QKV},
    {".*\\.mlp\\.down_proj\\.weight$", ROW},
    {".*\\.mlp\\.gate_up_proj\\.weight$", GATE_UP},
};

/* The one list of presets; names and table come from it. */
#define PRESETS(X) \
    X(llama) X(bloom) X(chatglm) X(mixtral) X(deepseek_v2) X(qwen2) X(phi3)

#define NAME(name) #name,
#define TABLE_ROW(name) \
    {#name, name##_rows, sizeof(name##_rows) / sizeof(name##_rows[0])},

static const char *const names[] = {PRESETS(NAME)};
static const tp_preset presets[] = {PRESETS(TABLE_ROW)};

enum { PRESET_COUNT = sizeof(presets) / sizeof(presets[0]) };

const char *const *
tp_preset_names(int *count)
{
    *count = PRESET_COUNT;
    return names;
}

int
tp_preset_find(const char *name, const tp_preset **out, tp_error *err)
{
    for (int i = 0; i < PRESET_COUNT; i++) {
        if (tp_text_same(name, names[i])) {
            *out = &presets[i];
            return 0;
        }
    }
    tp_text text = TP_NO_TEXT;
    tp_text_add(&text, "preset_model: unknown preset '%s'", name);
    tp_did_you_mean_add(&text, name, names, PRESET_COUNT);
    return tp_text_fail(&text, TP_VALUE, err);
}
