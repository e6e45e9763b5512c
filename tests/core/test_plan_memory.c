/* SPDX-License-Identifier: Apache-2.0 */
/* Plans of models with many parts of one kind: tables and messages grow while the plan
 * is made, and with FAIL_ALLOCATIONS each time without memory. */
#include "plan/plan_form.h"
#include "plan_fixture.h"

/* MANY is past the room that any table begins with; of towers, which take longest,
 * fewer are. */
enum { MANY = 40, TOWERS = 20 };

/* "a0", "b0", ..., "b1": names that differ in more than an index. */
static const char *
letters(int i)
{
    static char text[3];
    text[0] = (char)('a' + i % 26);
    text[1] = (char)('a' + i / 26);
    text[2] = '\0';
    return text;
}

static void
test_many_lists_between_which_tokens_are_sharded(void)
{
    fixture f = fixture_new(2);
    char name[64];
    f.options.sequence = true;
    add_module(&f, "", TP_MODULE_OTHER, 0);
    for (int i = 0; i < MANY; i++) {
        snprintf(name, sizeof(name), "%s", letters(i));
        add_module(&f, name, TP_MODULE_OTHER, 0);
        snprintf(name, sizeof(name), "%s.0", letters(i));
        add_module(&f, name, TP_MODULE_OTHER, 0);
        snprintf(name, sizeof(name), "%s.0.up", letters(i));
        add_linear(&f, name, 8, 4);
        snprintf(name, sizeof(name), "%s.0.down", letters(i));
        add_linear(&f, name, 4, 8);
    }
    add_rule(&f, "a", ".*up\\.weight", TP_PARTITION_COLUMN);
    add_rule(&f, "b", ".*down\\.weight", TP_PARTITION_ROW);
    if (make_plan(&f) && CHECK_INT_EQ(tp_plan_stack_count(f.plan), MANY)) {
        for (int i = 0; i < MANY; i++) {
            const tp_stack *stack = tp_plan_stack(f.plan, i);
            CHECK_INT_EQ(stack->layers.count, 1);
            CHECK_INT_EQ(stack->gather_input.count, 1);
            CHECK_INT_EQ(stack->reduce_scatter_output.count, 1);
            CHECK_INT_EQ(stack->gather_scatter.count, 0);
        }
    }
    fixture_free(&f);
}

/* Attention of one head, which two ranks cannot share, under many names. */
static void
add_single_heads(fixture *f, const char *around, int count)
{
    static const char *const leaves[] = {"q_proj", "k_proj", "v_proj", "o_proj"};
    char name[64];
    for (int i = 0; i < count; i++) {
        snprintf(name, sizeof(name), "%s%s", around, letters(i));
        add_module(f, name, TP_MODULE_OTHER, 2, "num_heads", 1, "head_dim", 4);
        for (int j = 0; j < 4; j++) {
            snprintf(name, sizeof(name), "%s%s.%s", around, letters(i), leaves[j]);
            add_linear(f, name, 4, 4);
        }
    }
}

static void
test_many_blocks_that_cannot_be_sharded_are_each_told(void)
{
    fixture f = fixture_new(2);
    f.options.families = f.options.heuristics = true;
    add_single_heads(&f, "", MANY);
    if (make_plan(&f)) {
        CHECK_INT_EQ(tp_plan_message_count(f.plan), MANY);
        CHECK_TEXT_HAS(tp_plan_message(f.plan, MANY - 1)->text,
                       "is not sharded as one");
        CHECK_INT_EQ(tp_plan_layer_count(f.plan), 0);
    }
    fixture_free(&f);
}

static void
test_many_modules_of_few_heads_stay_replicated_and_are_each_told(void)
{
    fixture f = fixture_new(2);
    add_single_heads(&f, "tower_", TOWERS);
    add_module(&f, "mlp", TP_MODULE_OTHER, 0);
    add_linear(&f, "mlp.up", 400, 400);
    add_module(&f, "attn", TP_MODULE_OTHER, 2, "num_heads", 2, "head_dim", 4);
    add_linear(&f, "attn.q_proj", 8, 4);
    add_style(&f, "mlp.up", "colwise");
    add_style(&f, "attn.q_proj", "colwise");
    add_style(&f, "*.q_proj", "colwise");
    add_style(&f, "*.k_proj", "colwise");
    add_style(&f, "*.v_proj", "colwise");
    add_style(&f, "*.o_proj", "rowwise");
    if (make_plan(&f)) {
        /* The first is about the patterns. */
        CHECK_INT_EQ(tp_plan_message_count(f.plan), TOWERS + 1);
        CHECK_TEXT_HAS(tp_plan_message(f.plan, 1)->text,
                       "tower_aa stays replicated: it has 1 query");
        CHECK_INT_EQ(tp_plan_layer_count(f.plan), 2);
    }
    fixture_free(&f);
}

static void
test_many_large_layers_are_each_sharded_individually(void)
{
    fixture f = fixture_new(2);
    char name[64];
    f.options.families = f.options.heuristics = f.options.large_layers = true;
    for (int i = 0; i < MANY; i++) {
        snprintf(name, sizeof(name), "large_%s", letters(i));
        add_linear(&f, name, 16, 8);
    }
    if (make_plan(&f))
        CHECK_INT_EQ(tp_plan_layer_count(f.plan), MANY);
    fixture_free(&f);
}

/* Experts whose features are sharded, viewed by the module around them. */
static void
test_many_modules_of_experts_each_have_local_integers(void)
{
    fixture f = fixture_new(2);
    char name[64];
    f.options.families = f.options.heuristics = true;
    for (int i = 0; i < MANY; i++) {
        snprintf(name, sizeof(name), "%s", letters(i));
        add_module(&f, name, TP_MODULE_OTHER, 1, "ffn_hidden_size", 6);
        snprintf(name, sizeof(name), "%s.mlp", letters(i));
        const int at = add_module(&f, name, TP_MODULE_OTHER, 1, "moe_num_experts", 3);
        add_shaped(&f, at, "w1", 2, (int64_t[]){18, 8}, -1);
        add_shaped(&f, at, "v1", 2, (int64_t[]){18, 8}, -1);
        add_shaped(&f, at, "w2", 2, (int64_t[]){18, 8}, -1);
    }
    if (make_plan(&f)) {
        CHECK_INT_EQ(tp_plan_layer_count(f.plan), MANY);
        CHECK_INT_EQ(tp_plan_integer_count(f.plan), MANY);
        CHECK_INT_EQ(integer_of(&f, letters(MANY - 1), "ffn_hidden_size")[1], 3);
    }
    fixture_free(&f);
}

/* Attention of 2 to 41 heads: each has other local integers. */
static void
test_many_counts_of_heads_each_have_their_own_integers(void)
{
    fixture f = fixture_new(2);
    char name[64];
    for (int i = 0; i < MANY; i++) {
        snprintf(name, sizeof(name), "%s", letters(i));
        add_module(&f, name, TP_MODULE_OTHER, 2, "num_heads", i + 2, "head_dim", 4);
        snprintf(name, sizeof(name), "%s.q_proj", letters(i));
        add_linear(&f, name, 4 * (i + 2), 8);
    }
    add_rule(&f, "q", ".*q_proj", TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        for (int i = 0; i < MANY; i++) {
            const int64_t *heads = integer_of(&f, letters(i), "num_heads");
            CHECK(heads != NULL && heads[0] == (i + 3) / 2 && heads[1] == (i + 2) / 2);
        }
    }
    fixture_free(&f);
}

static void
test_many_rules_that_match_nothing_are_each_told(void)
{
    fixture f = fixture_new(2);
    char name[64];
    add_module(&f, "", TP_MODULE_OTHER, 0);
    for (int i = 0; i < MANY; i++) {
        snprintf(name, sizeof(name), "layer_%s", letters(i));
        add_linear(&f, name, 8, 8);
        snprintf(name, sizeof(name), "layer_%s_x\\.weight", letters(i));
        add_rule(&f, "r", name, TP_PARTITION_COLUMN);
    }
    if (make_plan(&f)) {
        CHECK_INT_EQ(tp_plan_message_count(f.plan), MANY);
        CHECK_TEXT_HAS(tp_plan_message(f.plan, 0)->text, "'layer_aa.weight'");
    }
    fixture_free(&f);
}

/* `count` layers under different names, of which no plan is made yet. */
static fixture
layers_new(int count, bool sequence)
{
    fixture f = fixture_new(2);
    char name[64];
    f.options.sequence = sequence;
    add_module(&f, "", TP_MODULE_OTHER, 0);
    add_module(&f, "list", TP_MODULE_OTHER, 0);
    add_module(&f, "list.0", TP_MODULE_OTHER, 0);
    for (int i = 0; i < count; i++) {
        snprintf(name, sizeof(name), "list.0.attn_%s", letters(i));
        add_module(&f, name, TP_MODULE_OTHER, 3, "num_heads", 4, "head_dim", 2,
                   "num_key_value_heads", 4);
        snprintf(name, sizeof(name), "list.0.attn_%s.up", letters(i));
        add_linear(&f, name, 8, 4);
        snprintf(name, sizeof(name), "list.0.attn_%s.down", letters(i));
        add_linear(&f, name, 4, 8);
    }
    add_rule(&f, "a", ".*up\\.weight", TP_PARTITION_COLUMN);
    add_rule(&f, "b", ".*down\\.weight", TP_PARTITION_ROW);
    return f;
}

/* Without failing allocations: each of them makes all of a large plan anew, and those
 * of one plan and one difference fail below. */
static char *
difference_once(const fixture *one, const fixture *other)
{
    tp_error err = TP_NO_ERROR;
    tp_text why = TP_NO_TEXT;
    const int result = tp_plan_form_difference(one->plan, other->plan, &why, &err);
    CHECK_OK(result, &err);
    return why.data;
}

static char *
difference(const fixture *one, const fixture *other)
{
    tp_error err = TP_NO_ERROR;
    tp_text why = TP_NO_TEXT;
    CHECK_OK((tp_text_free(&why),
              tp_plan_form_difference(one->plan, other->plan, &why, &err)),
             &err);
    return why.data;
}

static void
test_the_forms_of_large_plans_differ_in_what_one_of_them_has(void)
{
    fixture few = layers_new(MANY - 1, true), many = layers_new(MANY, true),
            again = layers_new(MANY, true), full = layers_new(MANY, false);
    make_plan(&many);
    CHECK(try_plan_once(&few) == 0);
    CHECK(try_plan_once(&again) == 0);
    CHECK(try_plan_once(&full) == 0);
    CHECK(difference_once(&many, &again) == NULL);
    char *why = difference(&few, &many);
    CHECK_TEXT_HAS(why, "list.*.attn_nb");
    free(why);
    why = difference_once(&many, &full);
    CHECK_TEXT_EQ(why, "the model, sharded tokens");
    free(why);
    fixture *const all[] = {&few, &many, &again, &full};
    for (int i = 0; i < 4; i++)
        fixture_free(all[i]);
}

int
main(void)
{
    RUN(test_many_lists_between_which_tokens_are_sharded);
    RUN(test_many_blocks_that_cannot_be_sharded_are_each_told);
    RUN(test_many_modules_of_few_heads_stay_replicated_and_are_each_told);
    RUN(test_many_large_layers_are_each_sharded_individually);
    RUN(test_many_modules_of_experts_each_have_local_integers);
    RUN(test_many_counts_of_heads_each_have_their_own_integers);
    RUN(test_many_rules_that_match_nothing_are_each_told);
    RUN(test_the_forms_of_large_plans_differ_in_what_one_of_them_has);
    return check_result();
}
