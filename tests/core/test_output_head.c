/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_llama.h"

static fixture
labelled_llama(int wanted)
{
    fixture f = fixture_new(2);
    f.options.vocab_parallel_lm_head = wanted;
    f.facts.takes_labels = true;
    add_llama(&f, 1, false);
    return f;
}

static void
test_a_head_sharded_along_the_vocabulary_keeps_its_logits(void)
{
    fixture f = labelled_llama(-1);
    add_llama_styles(&f);
    if (make_plan(&f)) {
        const int layer = tp_plan_logits_layer(f.plan);
        if (CHECK(layer >= 0))
            CHECK(tp_plan_layer(f.plan, layer) == layer_of(&f, "lm_head"));
    }
    fixture_free(&f);
}

static void
test_it_does_not_where_the_options_say_so(void)
{
    fixture f = labelled_llama(0);
    add_llama_styles(&f);
    if (make_plan(&f))
        CHECK_INT_EQ(tp_plan_logits_layer(f.plan), -1);
    fixture_free(&f);
}

static void
test_a_replicated_head_is_refused_only_where_it_is_asked_for(void)
{
    fixture f = labelled_llama(-1);
    add_style(&f, "layers.*.mlp.up_proj", "colwise");
    if (make_plan(&f))
        CHECK_INT_EQ(tp_plan_logits_layer(f.plan), -1);
    fixture_free(&f);
    f = labelled_llama(1);
    add_style(&f, "layers.*.mlp.up_proj", "colwise");
    CHECK_REFUSED(&f,
                  "vocab_parallel_lm_head: got true, but the plan does not shard "
                  "lm_head along the vocabulary");
}

static void
test_a_model_without_labels_or_head_is_refused_with_the_reason(void)
{
    fixture f = labelled_llama(1);
    add_llama_styles(&f);
    f.facts.takes_labels = false;
    CHECK_REFUSED(&f, "got true, but Any.forward takes no labels; leave the key out");
    f = labelled_llama(1);
    add_llama_styles(&f);
    f.facts.output_head = -1;
    CHECK_REFUSED(&f, "got true, but Any.get_output_embeddings() names no output head");
}

static void
test_a_plan_that_shards_nothing_is_refused_where_it_must(void)
{
    fixture f = fixture_new(2);
    f.options.must_shard = true;
    f.options.families = true;
    add_module(&f, "", TP_MODULE_OTHER, 0);
    add_linear(&f, "odd", 3, 3);
    CHECK_REFUSED(&f, "Any has no tensor-parallel plan of its own");
    f = fixture_new(2);
    f.options.must_shard = true;
    add_llama(&f, 1, false);
    add_rule(&f, "a", "nothing", TP_PARTITION_COLUMN);
    /* The defaults shard the embedding, which does not count. */
    CHECK_REFUSED(&f, "the rules shard nothing of Any, so that every rank would hold");
}

static void
test_a_plan_that_shards_nothing_is_told_before_its_output_head(void)
{
    fixture f = labelled_llama(1);
    f.options.must_shard = true;
    f.options.families = true;
    f.options.defaults = false;
    f.facts.model_type = NULL;
    f.facts.output_head = -1;
    CHECK_REFUSED(&f, "Any has no tensor-parallel plan of its own");
}

static void
test_a_head_that_keeps_its_logits_may_be_asked_for(void)
{
    fixture f = labelled_llama(1);
    add_llama_styles(&f);
    if (make_plan(&f))
        CHECK(tp_plan_logits_layer(f.plan) >= 0);
    fixture_free(&f);
}

/* A llama whose head has this specification. */
static fixture
llama_with_head(tp_spec spec)
{
    fixture f = labelled_llama(1);
    add_spec(&f, "head", "lm_head", spec);
    add_rule(&f, "up", ".*up_proj.*", TP_PARTITION_COLUMN);
    return f;
}

static void
test_a_head_that_is_sharded_otherwise_is_refused_with_the_reason(void)
{
    static const char otherwise[] =
        "the plan does not shard lm_head along the vocabulary and gather its output";
    fixture f = llama_with_head(
        (tp_spec){.partition = TP_PARTITION_ROW, .dim = -1, .split_input = true});
    CHECK_REFUSED(&f, otherwise);
    f = llama_with_head((tp_spec){.partition = TP_PARTITION_COLUMN, .dim = -1});
    CHECK_REFUSED(&f, otherwise);
    f = llama_with_head((tp_spec){.partition = TP_PARTITION_COLUMN,
                                  .dim = -1,
                                  .shape = {2, {3, -1}, 0, {0}},
                                  .gather_output = true});
    CHECK_REFUSED(&f, "a rank's shard of lm_head is not one run of the vocabulary");
}

static void
test_a_plan_that_shards_nothing_says_what_was_tried(void)
{
    static const struct {
        bool heuristics, large;
        const char *part;
    } cases[] = {{false, false, "without a self-check its layers are not sharded"},
                 {true, false, "without a self-check large ones are not sharded"},
                 {true, true, "none of its layers is large enough to be sharded"}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        fixture f = fixture_new(2);
        f.options.must_shard = f.options.families = true;
        f.options.heuristics = cases[i].heuristics;
        f.options.large_layers = cases[i].large;
        add_module(&f, "", TP_MODULE_OTHER, 0);
        add_linear(&f, "odd", 1, 1);
        CHECK_REFUSED(&f, cases[i].part);
    }
}

int
main(void)
{
    RUN(test_a_head_sharded_along_the_vocabulary_keeps_its_logits);
    RUN(test_it_does_not_where_the_options_say_so);
    RUN(test_a_replicated_head_is_refused_only_where_it_is_asked_for);
    RUN(test_a_model_without_labels_or_head_is_refused_with_the_reason);
    RUN(test_a_plan_that_shards_nothing_is_refused_where_it_must);
    RUN(test_a_plan_that_shards_nothing_is_told_before_its_output_head);
    RUN(test_a_head_that_keeps_its_logits_may_be_asked_for);
    RUN(test_a_head_that_is_sharded_otherwise_is_refused_with_the_reason);
    RUN(test_a_plan_that_shards_nothing_says_what_was_tried);
    return check_result();
}
