/* SPDX-License-Identifier: Apache-2.0 */
#include "plan/plan_form.h"

#include "plan_llama.h"

/* The difference between a llama of two layers and `other`, owned by the caller; both
 * are made and freed here. NULL: they have one form. */
static char *
difference(fixture *other)
{
    fixture f = fixture_new(other->options.ranks);
    add_llama(&f, 2, false);
    add_llama_styles(&f);
    tp_text why = TP_NO_TEXT;
    if (make_plan(&f) && make_plan(other)) {
        CHECK_OK((tp_text_free(&why),
                  tp_plan_form_difference(f.plan, other->plan, &why, &f.err)),
                 &f.err);
        tp_text back = TP_NO_TEXT;
        CHECK_OK((tp_text_free(&back),
                  tp_plan_form_difference(other->plan, f.plan, &back, &f.err)),
                 &f.err);
        CHECK((why.size == 0) == (back.size == 0));
        tp_text_free(&back);
    }
    fixture_free(&f);
    fixture_free(other);
    return why.data;
}

static fixture
llama_of(int layers, bool tied, int ranks)
{
    fixture f = fixture_new(ranks);
    add_llama(&f, layers, tied);
    add_llama_styles(&f);
    return f;
}

static void
test_the_number_of_layers_is_not_part_of_the_form(void)
{
    fixture other = llama_of(5, false, 2);
    CHECK(difference(&other) == NULL);
}

static void
test_a_tie_is(void)
{
    fixture other = llama_of(2, true, 2);
    char *why = difference(&other);
    CHECK_TEXT_HAS(why, "lm_head.weight");
    free(why);
}

static void
test_a_layer_of_another_kind_is(void)
{
    fixture other = llama_of(2, false, 2);
    add_linear(&other, "model.layers.1.mlp.extra", 16, 16);
    char *why = difference(&other);
    CHECK_TEXT_HAS(why, "model.layers.*.mlp.extra, a ");
    free(why);
}

static void
test_a_layer_that_stays_replicated_is(void)
{
    static const char *const names[] = {"model.layers.*.mlp"};
    fixture other = llama_of(2, false, 2);
    other.options.replicated = names;
    other.options.replicated_count = 1;
    char *why = difference(&other);
    CHECK_TEXT_HAS(why, "model.layers.*.mlp.");
    free(why);
}

static void
test_unequal_shards_are(void)
{
    fixture other = llama_of(2, false, 2);
    other.options.grain = 16; /* 24 features in units of 16 */
    char *why = difference(&other);
    CHECK_TEXT_HAS(why, "equal shards");
    free(why);
}

int
main(void)
{
    RUN(test_the_number_of_layers_is_not_part_of_the_form);
    RUN(test_a_tie_is);
    RUN(test_a_layer_of_another_kind_is);
    RUN(test_a_layer_that_stays_replicated_is);
    RUN(test_unequal_shards_are);
    return check_result();
}
