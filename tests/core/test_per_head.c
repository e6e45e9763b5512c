/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_fixture.h"

/* T5's names; the table is [distances, heads]. */
static fixture
t5_new(void)
{
    fixture made = fixture_new(2);
    fixture *f = &made;
    f->options.families = f->options.heuristics = true;
    f->facts.model_type = "t5";
    f->facts.prefix = "";
    add_module(f, "layer.0.SelfAttention", TP_MODULE_OTHER, 3, "n_heads", 3,
               "key_value_proj_dim", 4, "inner_dim", 12);
    add_linear(f, "layer.0.SelfAttention.q", 12, 16);
    add_linear(f, "layer.0.SelfAttention.k", 12, 16);
    add_linear(f, "layer.0.SelfAttention.v", 12, 16);
    add_linear(f, "layer.0.SelfAttention.o", 16, 12);
    add_matrix(f, "layer.0.SelfAttention.relative_attention_bias", TP_MODULE_EMBEDDING,
               8, 3);
    return made;
}

static void
test_a_table_with_a_column_for_each_head_follows_the_heads(void)
{
    const char *table = "layer.0.SelfAttention.relative_attention_bias.weight";
    fixture f = t5_new();
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, table, 0), "column [8, 2]");
        CHECK_TEXT_EQ(runs_of(&f, table, 1), "2+1");
        CHECK_TEXT_EQ(runs_of(&f, "layer.0.SelfAttention.q.weight", 1), "8+4");
        CHECK_INT_EQ(entry_of(&f, table)->source, TP_FROM_FAMILY);
        const tp_layer *layer =
            layer_of(&f, "layer.0.SelfAttention.relative_attention_bias");
        CHECK(layer != NULL && layer->kind == TP_COLUMN && !layer->gather_output);
        CHECK_INT_EQ(layer->sibling_count, 0);
        CHECK_INT_EQ(layer_of(&f, "layer.0.SelfAttention.q")->sibling_count, 3);
    }
    fixture_free(&f);
}

static void
test_a_table_stays_replicated_where_the_heads_are_not_those_of_a_rank(void)
{
    const char *table = "layer.0.SelfAttention.relative_attention_bias.weight";
    fixture f = t5_new();
    f.options.individual = (const char *const[]){"layer.*.SelfAttention"};
    f.options.individual_count = 1;
    if (make_plan(&f))
        CHECK_INT_EQ(entry_of(&f, table)->kind, TP_REPLICATED);
    fixture_free(&f);

    f = t5_new();
    f.options.replicated =
        (const char *const[]){"layer.*.SelfAttention.relative_attention_bias"};
    f.options.replicated_count = 1;
    if (make_plan(&f))
        CHECK_INT_EQ(entry_of(&f, table)->kind, TP_REPLICATED);
    fixture_free(&f);
}

/* gpt_oss: the heads of attention that is sharded by a rule, too. */
static void
test_a_number_for_each_head_follows_the_heads(void)
{
    for (int apart = 0; apart < 2; apart++) {
        fixture f = fixture_new(2);
        f.options.individual = (const char *const[]){"attn"};
        f.options.individual_count = apart;
        const int module =
            add_module(&f, "attn", TP_MODULE_OTHER, 2, "head_dim", 4, "num_heads", 3);
        add_shaped(&f, module, "sinks", 1, (int64_t[]){3}, -1);
        add_shaped(&f, module, "scales", 1, (int64_t[]){3}, -1);
        add_linear(&f, "attn.q_proj", 12, 16);
        add_linear(&f, "attn.o_proj", 16, 12);
        add_style(&f, "attn.q_proj", "colwise");
        add_style(&f, "attn.o_proj", "rowwise");
        if (make_plan(&f)) {
            CHECK_TEXT_EQ(local_of(&f, "attn.sinks", 0),
                          apart ? "replicated [3]" : "column [2]");
            CHECK_TEXT_EQ(runs_of(&f, "attn.sinks", 1), apart ? "" : "2+1");
            CHECK_INT_EQ(entry_of(&f, "attn.scales")->kind, TP_REPLICATED);
            CHECK(layer_of(&f, "attn") == NULL);
        }
        fixture_free(&f);
    }
}

int
main(void)
{
    RUN(test_a_number_for_each_head_follows_the_heads);
    RUN(test_a_table_with_a_column_for_each_head_follows_the_heads);
    RUN(test_a_table_stays_replicated_where_the_heads_are_not_those_of_a_rank);
    return check_result();
}
