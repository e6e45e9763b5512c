/* SPDX-License-Identifier: Apache-2.0 */
/* Heads, groups and pairs in viewed weights and in parameters that are no layer's. */
#include "plan_fixture.h"

/* Attention of 4 query and 2 key/value heads of 4; a fused weight has groups of
 * (2 + 1 + 1) * 4 rows. */
static fixture
attention_new(int key)
{
    fixture f = fixture_new(2);
    add_module(&f, "attn", TP_MODULE_OTHER, 3, "head_dim", 4, "num_heads", 4,
               "num_key_value_heads", key);
    return f;
}

static void
check_groups(tp_spec spec, const char *runs, const char *local)
{
    fixture f = attention_new(2);
    add_linear(&f, "attn.fused", 32, 24);
    add_spec(&f, "r", ".*fused", spec);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "attn.fused.weight", 1), runs);
        CHECK_TEXT_EQ(local_of(&f, "attn.fused.weight", 1), local);
        const int64_t *heads = integer_of(&f, "attn", "num_heads");
        CHECK(heads != NULL && heads[1] == 2);
    }
    fixture_free(&f);
}

static void
test_groups_that_a_shape_names_are_sharded_by_key_value_heads(void)
{
    tp_spec spec = {
        .partition = TP_PARTITION_COLUMN, .dim = 0, .shape = {3, {2, 16, 24}, 0, {0}}};
    check_groups(spec, "1+1", "column [16, 24]");
    spec.shape.sizes[1] = -1;
    check_groups(spec, "1+1", "column [16, 24]");
}

/* Of other sizes than those of groups the heads are unknown. */
static void
test_a_shape_of_other_groups_is_sharded_as_it_says(void)
{
    static const struct {
        tp_module_kind kind;
        tp_partition partition;
        int rows, dim;
        int64_t sizes[3];
        const char *runs;
    } cases[] = {
        {TP_MODULE_LINEAR, TP_PARTITION_COLUMN, 32, 0, {4, 8, 24}, "2+2"},
        {TP_MODULE_LINEAR, TP_PARTITION_COLUMN, 32, 0, {4, -1, 24}, "2+2"},
        {TP_MODULE_LINEAR, TP_PARTITION_COLUMN, 64, 0, {4, 16, 24}, "2+2"},
        {TP_MODULE_LINEAR, TP_PARTITION_COLUMN, 24, 0, {2, 12, 24}, "1+1"},
        {TP_MODULE_LINEAR, TP_PARTITION_COLUMN, 24, 0, {2, -1, 24}, "1+1"},
        {TP_MODULE_LINEAR, TP_PARTITION_COLUMN, 32, 1, {1, 32, 24}, "16+16"},
        {TP_MODULE_LINEAR, TP_PARTITION_ROW, 32, 2, {32, 2, 12}, "6+6"},
        {TP_MODULE_CONV1D, TP_PARTITION_COLUMN, 32, 1, {32, 4, 6}, "2+2"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        fixture f = attention_new(2);
        tp_spec spec = {.partition = cases[i].partition, .dim = cases[i].dim};
        spec.shape.dims = 3;
        memcpy(spec.shape.sizes, cases[i].sizes, sizeof(cases[i].sizes));
        add_matrix(&f, "attn.fused", cases[i].kind, cases[i].rows, 24);
        add_spec(&f, "r", ".*fused", spec);
        if (make_plan(&f)) {
            CHECK_TEXT_EQ(runs_of(&f, "attn.fused.weight", 1), cases[i].runs);
            CHECK(integer_of(&f, "attn", "num_heads") == NULL);
        }
        fixture_free(&f);
    }
}

static void
test_equal_thirds_of_as_many_keys_as_queries_are_heads(void)
{
    fixture f = attention_new(4);
    const tp_spec spec = {
        .partition = TP_PARTITION_COLUMN, .dim = -1, .shape = {2, {3, -1}, 0, {0}}};
    add_linear(&f, "attn.qkv", 48, 16);
    add_spec(&f, "r", ".*qkv", spec);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "attn.qkv.weight", 1), "8+8 24+8 40+8");
        CHECK_INT_EQ(integer_of(&f, "attn", "num_key_value_heads")[0], 2);
    }
    fixture_free(&f);
}

/* Parameters of the attention module itself: one that no head divides, one of two
 * listed pieces, one with three features for each head. */
static void
test_parameters_of_attention_follow_the_heads_where_their_sizes_say_so(void)
{
    fixture f = attention_new(2);
    add_shaped(&f, 0, "odd", 1, (int64_t[]){10}, -1);
    add_shaped(&f, 0, "longer", 1, (int64_t[]){12}, -1);
    add_shaped(&f, 0, "pieces", 2, (int64_t[]){12, 4}, -1);
    add_rule(&f, "a", "attn.odd", TP_PARTITION_COLUMN);
    add_rule(&f, "b", "attn.longer", TP_PARTITION_COLUMN);
    add_spec(&f, "c", "attn.pieces",
             (tp_spec){.partition = TP_PARTITION_COLUMN,
                       .dim = -1,
                       .shape = {2, {2, -1}, 0, {0}}});
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(runs_of(&f, "attn.odd", 1), "5+5");
        CHECK_TEXT_EQ(runs_of(&f, "attn.longer", 1), "6+6");
        CHECK_TEXT_EQ(runs_of(&f, "attn.pieces", 1), "3+3 9+3");
        CHECK_INT_EQ(integer_of(&f, "attn", "num_heads")[1], 2);
    }
    fixture_free(&f);
}

/* A name alone makes no parametrization. */
static void
test_one_half_of_what_weight_norm_has_is_a_parameter_as_any(void)
{
    static const char *const leaves[] = {"weight_g", "weight_v"};
    for (int i = 0; i < 2; i++) {
        fixture f = fixture_new(2);
        add_module(&f, "w", TP_MODULE_OTHER, 0);
        add_shaped(&f, 0, leaves[i], 2, (int64_t[]){16, 8}, -1);
        add_rule(&f, "r", "w\\..*", TP_PARTITION_COLUMN);
        if (make_plan(&f))
            CHECK_INT_EQ(tp_plan_entry(f.plan, 0)->layout->shards[1].width, 8);
        fixture_free(&f);
    }
}

static void
test_a_vector_has_one_dimension(void)
{
    fixture f = fixture_new(2);
    add_module(&f, "w", TP_MODULE_OTHER, 0);
    add_shaped(&f, 0, "scale", 1, (int64_t[]){16}, -1);
    add_spec(&f, "r", "w\\..*", (tp_spec){.partition = TP_PARTITION_COLUMN, .dim = 1});
    CHECK_REFUSED(&f, "partition_dim is 1, but it has 1 dimension");
    f = fixture_new(2);
    add_module(&f, "w", TP_MODULE_OTHER, 0);
    add_shaped(&f, 0, "scale", 2, (int64_t[]){16, 4}, -1);
    add_spec(&f, "r", "w\\..*", (tp_spec){.partition = TP_PARTITION_COLUMN, .dim = 2});
    CHECK_REFUSED(&f, "partition_dim is 2, but it has 2 dimensions");
}

int
main(void)
{
    RUN(test_groups_that_a_shape_names_are_sharded_by_key_value_heads);
    RUN(test_a_shape_of_other_groups_is_sharded_as_it_says);
    RUN(test_equal_thirds_of_as_many_keys_as_queries_are_heads);
    RUN(test_parameters_of_attention_follow_the_heads_where_their_sizes_say_so);
    RUN(test_one_half_of_what_weight_norm_has_is_a_parameter_as_any);
    RUN(test_a_vector_has_one_dimension);
    return check_result();
}
