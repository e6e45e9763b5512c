/* SPDX-License-Identifier: Apache-2.0 */
#include "rules/preset.h"

#include "check.h"
#include "rules/regex.h"

static const tp_preset *
preset_of(const char *name)
{
    tp_error err = TP_NO_ERROR;
    const tp_preset *preset = NULL;
    CHECK_OK(tp_preset_find(name, &preset, &err), &err);
    return preset;
}

/* The spec of the only row that matches `parameter`, or NULL for none. */
static const tp_spec *
spec_for(const tp_preset *preset, const char *parameter)
{
    const tp_spec *found = NULL;
    for (int i = 0; i < preset->count; i++) {
        tp_error err = TP_NO_ERROR;
        tp_regex *regex = NULL;
        bool matched = false;
        CHECK_OK(tp_regex_new(preset->rows[i].pattern, NULL, &regex, &err), &err);
        CHECK(tp_regex_is_native(regex));
        const tp_subject subject = tp_subject_of(parameter, strlen(parameter));
        CHECK_OK(tp_regex_match(regex, &subject, &matched, &err), &err);
        tp_regex_free(regex);
        if (!matched)
            continue;
        CHECK(found == NULL);
        found = &preset->rows[i].spec;
    }
    return found;
}

static void
test_the_seven_presets_are_listed_in_order(void)
{
    const char *const want[] = {"llama",       "bloom", "chatglm", "mixtral",
                                "deepseek_v2", "qwen2", "phi3"};
    int count = 0;
    const char *const *names = tp_preset_names(&count);
    if (!CHECK(count == 7))
        return;
    for (int i = 0; i < count; i++) {
        CHECK_TEXT_EQ(names[i], want[i]);
        CHECK_TEXT_EQ(preset_of(names[i])->name, want[i]);
    }
}

static void
test_the_case_of_a_preset_does_not_count(void)
{
    CHECK(preset_of("DeepSeek_V2") == preset_of("deepseek_v2"));
}

static void
test_an_unknown_preset_names_the_nearest_or_all(void)
{
    tp_error err = TP_NO_ERROR;
    const tp_preset *preset = NULL;
    CHECK_FAILS(tp_preset_find("lama", &preset, &err), TP_VALUE, &err,
                "preset_model: unknown preset 'lama'; did you mean 'llama'?");
    CHECK_FAILS(tp_preset_find("starcoder2base", &preset, &err), TP_VALUE, &err,
                "known: llama, bloom, chatglm, mixtral, deepseek_v2, qwen2, phi3");
    CHECK(preset == NULL);
}

static void
test_every_row_passes_the_check_of_specs(void)
{
    int count = 0;
    const char *const *names = tp_preset_names(&count);
    for (int i = 0; i < count; i++) {
        const tp_preset *preset = preset_of(names[i]);
        CHECK(preset->count > 0);
        for (int row = 0; row < preset->count; row++) {
            tp_error err = TP_NO_ERROR;
            CHECK_OK(tp_spec_check(&preset->rows[row].spec, names[i], &err), &err);
        }
    }
}

static void
test_every_preset_shards_the_weights_of_its_family(void)
{
    const struct {
        const char *preset;
        const char *parameter;
        const char *partition; /* NULL: no row */
    } rows[] = {
        {"llama", "model.layers.0.self_attn.q_proj.weight", "column"},
        {"llama", "model.layers.0.self_attn.k_proj.weight", "column"},
        {"llama", "model.layers.11.self_attn.o_proj.weight", "row"},
        {"llama", "model.layers.0.mlp.gate_proj.weight", "column"},
        {"llama", "model.layers.0.mlp.up_proj.weight", "column"},
        {"llama", "model.layers.0.mlp.down_proj.weight", "row"},
        {"llama", "model.layers.0.self_attn.o_proj.bias", NULL},
        {"llama", "model.embed_tokens.weight", NULL},
        {"bloom", "transformer.h.0.self_attention.query_key_value.weight", "column"},
        {"bloom", "transformer.h.0.self_attention.dense.weight", "row"},
        {"bloom", "transformer.h.0.mlp.dense_h_to_4h.weight", "column"},
        {"bloom", "transformer.h.0.mlp.dense_4h_to_h.weight", "row"},
        {"chatglm", "encoder.layers.0.self_attention.dense.weight", "row"},
        {"chatglm", "encoder.layers.0.mlp.dense_4h_to_h.weight", "row"},
        {"mixtral", "model.layers.0.self_attn.v_proj.weight", "column"},
        {"mixtral", "model.layers.0.self_attn.o_proj.weight", "row"},
        {"mixtral", "model.layers.0.block_sparse_moe.experts.7.w1.weight", "column"},
        {"mixtral", "model.layers.0.block_sparse_moe.experts.10.w3.weight", "column"},
        {"mixtral", "model.layers.0.block_sparse_moe.experts.7.w2.weight", "row"},
        {"mixtral", "model.layers.0.block_sparse_moe.gate.weight", "skip"},
        {"deepseek_v2", "model.layers.1.self_attn.q_a_proj.weight", "skip"},
        {"deepseek_v2", "model.layers.1.self_attn.kv_a_proj_with_mqa.weight", "skip"},
        {"deepseek_v2", "model.layers.1.self_attn.q_b_proj.weight", "column"},
        {"deepseek_v2", "model.layers.1.self_attn.kv_b_proj.weight", "column"},
        {"deepseek_v2", "model.layers.1.self_attn.o_proj.weight", "row"},
        {"deepseek_v2", "model.layers.1.mlp.experts.63.up_proj.weight", "column"},
        {"deepseek_v2", "model.layers.1.mlp.experts.63.down_proj.weight", "row"},
        {"deepseek_v2", "model.layers.1.mlp.shared_experts.gate_proj.weight", "column"},
        {"deepseek_v2", "model.layers.1.mlp.shared_experts.down_proj.weight", "row"},
        {"deepseek_v2", "model.layers.1.mlp.gate.weight", "skip"},
        {"qwen2", "model.layers.0.self_attn.q_proj.weight", "column"},
        {"qwen2", "model.layers.0.self_attn.o_proj.weight", "row"},
        {"qwen2", "model.layers.0.mlp.up_proj.weight", "column"},
        {"qwen2", "model.layers.0.mlp.down_proj.weight", "row"},
        {"phi3", "model.layers.0.self_attn.o_proj.weight", "row"},
        {"phi3", "model.layers.0.mlp.down_proj.weight", "row"},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        const tp_spec *spec = spec_for(preset_of(rows[i].preset), rows[i].parameter);
        CHECK_TEXT_EQ(spec == NULL ? NULL : tp_partition_name(spec->partition),
                      rows[i].partition);
    }
}

static void
test_a_fused_qkv_is_a_column_without_a_shape(void)
{
    const char *const rows[][2] = {
        {"phi3", "model.layers.0.self_attn.qkv_proj.weight"},
        {"chatglm", "encoder.layers.0.self_attention.query_key_value.weight"},
        {"bloom", "transformer.h.0.self_attention.query_key_value.weight"},
    };
    for (int i = 0; i < 3; i++) {
        const tp_spec *spec = spec_for(preset_of(rows[i][0]), rows[i][1]);
        if (!CHECK(spec != NULL))
            continue;
        CHECK_INT_EQ(spec->partition, TP_PARTITION_COLUMN);
        CHECK_INT_EQ(spec->shape.dims, 0);
    }
}

static void
test_a_fused_gate_and_up_is_two_equal_pieces(void)
{
    const char *const rows[][2] = {
        {"phi3", "model.layers.0.mlp.gate_up_proj.weight"},
        {"chatglm", "encoder.layers.0.mlp.dense_h_to_4h.weight"},
    };
    for (int i = 0; i < 2; i++) {
        const tp_spec *spec = spec_for(preset_of(rows[i][0]), rows[i][1]);
        if (!CHECK(spec != NULL))
            continue;
        CHECK_INT_EQ(spec->partition, TP_PARTITION_COLUMN);
        CHECK_INT_EQ(spec->dim, 0);
        CHECK_INT_EQ(spec->shape.dims, 2);
        CHECK_INT_EQ(spec->shape.sizes[0], 2);
        CHECK_INT_EQ(spec->shape.sizes[1], -1);
    }
}

int
main(void)
{
    RUN(test_the_seven_presets_are_listed_in_order);
    RUN(test_the_case_of_a_preset_does_not_count);
    RUN(test_an_unknown_preset_names_the_nearest_or_all);
    RUN(test_every_row_passes_the_check_of_specs);
    RUN(test_every_preset_shards_the_weights_of_its_family);
    RUN(test_a_fused_qkv_is_a_column_without_a_shape);
    RUN(test_a_fused_gate_and_up_is_two_equal_pieces);
    return check_result();
}
