/* SPDX-License-Identifier: Apache-2.0 */
#include "plan/rank_share.h"

#include <stdlib.h>

#include "plan/samples.h"
#include "plan_llama.h"

enum { LAYER = 16 * 16 * 2 + 8 * 16 * 2 + 3 * 24 * 16 + 16, HEAD = 33 * 16 };

static void
test_a_tied_parameter_counts_once(void)
{
    fixture f = fixture_new(2);
    add_llama(&f, 2, true);
    add_llama_styles(&f);
    if (make_plan(&f)) {
        CHECK_INT_EQ(tp_plan_parameters(f.plan), 2 * LAYER + HEAD);
        const int64_t norms = 2 * 16;
        const int64_t first = (2 * LAYER - norms) / 2 + norms + 16 * 16;
        CHECK_INT_EQ(tp_plan_rank_parameters(f.plan, 0), first);
        CHECK_INT_EQ(tp_plan_rank_parameters(f.plan, 1), first + 16);
    }
    fixture_free(&f);
}

/* The warning of a llama of which a rule shards the layers called `leaf`. */
static char *
warning_of(const char *pattern, int ranks)
{
    fixture f = fixture_new(ranks);
    tp_text text = TP_NO_TEXT;
    char *copy = NULL;
    f.options.defaults = false;
    add_llama(&f, 2, false);
    add_rule(&f, "a", pattern, TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        CHECK_OK((tp_text_free(&text), tp_plan_warn_replicated(f.plan, &text, &f.err)),
                 &f.err);
        copy = text.size == 0 ? NULL : fixture_copy(text.data);
    }
    tp_text_free(&text);
    fixture_free(&f);
    return copy;
}

static void
test_the_largest_replicated_parameters_are_named_with_a_rule_for_them(void)
{
    char *text = warning_of(".*k_proj\\.weight", 2);
    if (CHECK(text != NULL)) {
        CHECK(strstr(text, "a rank holds 0.97 of the parameters") != NULL);
        /* Equal ones in the order of the model; the embedding is smaller. */
        CHECK(strstr(text,
                     "model.layers.*.mlp.gate_proj.weight (0.16), "
                     "model.layers.*.mlp.up_proj.weight (0.16), "
                     "model.layers.*.mlp.down_proj.weight (0.16). ") != NULL);
        CHECK(strstr(text,
                     "[\"model\\\\.layers\\\\.[0-9]+\\\\.mlp\\\\.gate_proj"
                     "\\\\.weight$\"]") != NULL);
    }
    free(text);
}

static void
test_nothing_is_said_where_a_rank_gains_or_there_is_one(void)
{
    char *gains = warning_of(".*_proj\\.weight", 2);
    char *single = warning_of(".*k_proj\\.weight", 1);
    CHECK(gains == NULL && single == NULL);
    free(gains);
    free(single);
}

static void
test_samples_are_the_ends_of_each_pattern_and_what_is_replicated(void)
{
    fixture f = fixture_new(2);
    int found[64];
    int count = 0;
    add_llama(&f, 3, false);
    add_llama_styles(&f);
    if (make_plan(&f)) {
        CHECK_OK(tp_plan_samples(f.plan, found, &count, &f.err), &f.err);
        /* The embedding, 8 parameters of layer 0 and of layer 2, the head; and of
         * layer 1, parameters 9 to 16, those that are replicated. */
        int at = 0;
        for (int i = 0; i < tp_plan_entry_count(f.plan); i++)
            if (i < 9 || i > 16 || tp_plan_entry(f.plan, i)->layout == NULL)
                CHECK_INT_EQ(found[at++], i);
        CHECK_INT_EQ(count, at);
    }
    fixture_free(&f);
}

/* More kinds of replicated parameters than the message has room for, with letters that
 * are not ASCII, which stand for themselves in the rule. */
static void
test_many_replicated_parameters_are_grouped_and_the_largest_named(void)
{
    enum { COUNT = 100 };
    fixture f = fixture_new(2);
    tp_text text = TP_NO_TEXT;
    char name[64];
    for (int i = 0; i < COUNT; i++) {
        snprintf(name, sizeof(name), "caf\xc3\xa9_%c%c", 'a' + i % 26, 'a' + i / 26);
        add_linear(&f, name, 8 + i, 8);
    }
    add_rule(&f, "a", ".*_aa", TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        CHECK_OK((tp_text_free(&text), tp_plan_warn_replicated(f.plan, &text, &f.err)),
                 &f.err);
        CHECK_TEXT_HAS(text.data, "parameters: caf\xc3\xa9_vd.weight (0.0");
        CHECK_TEXT_HAS(text.data, "[\"caf\xc3\xa9_vd\\\\.weight$\"]");
    }
    tp_text_free(&text);
    fixture_free(&f);
}

int
main(void)
{
    RUN(test_a_tied_parameter_counts_once);
    RUN(test_the_largest_replicated_parameters_are_named_with_a_rule_for_them);
    RUN(test_nothing_is_said_where_a_rank_gains_or_there_is_one);
    RUN(test_samples_are_the_ends_of_each_pattern_and_what_is_replicated);
    RUN(test_many_replicated_parameters_are_grouped_and_the_largest_named);
    return check_result();
}
