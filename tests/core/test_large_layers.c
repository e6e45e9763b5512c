/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_fixture.h"

/* A mixer whose names pair with nothing beside a block that they do. */
static fixture
mixer_new(int ranks)
{
    fixture made = fixture_new(ranks);
    fixture *f = &made;
    f->options.families = f->options.heuristics = f->options.large_layers = true;
    f->facts.prefix = "";
    add_module(f, "layers.0", TP_MODULE_OTHER, 0);
    add_linear(f, "layers.0.expand", 48, 16);
    add_linear(f, "layers.0.shrink", 16, 48);
    add_linear(f, "layers.0.gate", 2, 16);
    add_linear(f, "layers.0.fc1", 24, 16);
    add_linear(f, "layers.0.fc2", 16, 24);
    add_matrix(f, "positions", TP_MODULE_EMBEDDING, 32, 16);
    return made;
}

static void
test_what_nothing_shards_is_sharded_with_full_activations_around_it(void)
{
    fixture f = mixer_new(2);
    if (make_plan(&f)) {
        CHECK_TEXT_EQ(local_of(&f, "layers.0.expand.weight", 1), "column [24, 16]");
        CHECK(layer_of(&f, "layers.0.expand")->gather_output);
        CHECK_TEXT_EQ(local_of(&f, "layers.0.shrink.weight", 1), "row [16, 24]");
        CHECK(layer_of(&f, "layers.0.shrink")->split_input);
        CHECK_TEXT_EQ(local_of(&f, "positions.weight", 0), "hidden [32, 8]");
        CHECK_INT_EQ(entry_of(&f, "layers.0.shrink.weight")->source, TP_FROM_HEURISTIC);
        CHECK(!layer_of(&f, "layers.0.fc1")->gather_output);
    }
    fixture_free(&f);
}

static void
test_what_is_small_stays_replicated_unless_many_are_called_alike(void)
{
    fixture f = mixer_new(2);
    if (make_plan(&f))
        CHECK_INT_EQ(entry_of(&f, "layers.0.gate.weight")->kind, TP_REPLICATED);
    fixture_free(&f);

    f = mixer_new(2);
    add_module(&f, "layers.1", TP_MODULE_OTHER, 0);
    add_linear(&f, "layers.1.gate", 2, 16);
    add_module(&f, "layers.2", TP_MODULE_OTHER, 0);
    add_linear(&f, "layers.2.gate", 2, 16);
    if (make_plan(&f))
        CHECK_INT_EQ(entry_of(&f, "layers.0.gate.weight")->kind, TP_ROW);
    fixture_free(&f);
}

static void
test_nothing_is_individually_sharded_where_somebody_else_decides(void)
{
    fixture f = mixer_new(2);
    f.options.replicated = (const char *const[]){"layers.*.expand"};
    f.options.replicated_count = 1;
    add_style(&f, "layers.*.shrink", "replicated_with_grad_allreduce");
    if (make_plan(&f)) {
        CHECK_INT_EQ(entry_of(&f, "layers.0.expand.weight")->kind, TP_REPLICATED);
        CHECK(layer_of(&f, "layers.0.shrink") == NULL);
        CHECK(layer_of(&f, "positions") != NULL);
    }
    fixture_free(&f);

    f = mixer_new(2);
    add_rule(&f, "r", ".*fc1.*", TP_PARTITION_COLUMN);
    if (make_plan(&f))
        CHECK(layer_of(&f, "layers.0.expand") == NULL);
    fixture_free(&f);

    f = mixer_new(2);
    f.options.large_layers = false;
    if (make_plan(&f))
        CHECK_INT_EQ(tp_plan_layer_count(f.plan), 2);
    fixture_free(&f);
}

static void
test_a_layer_of_an_individually_sharded_block_is_sharded_alone_where_no_rule_speaks_of_it(
    void)
{
    fixture f = mixer_new(2);
    f.options.individual = (const char *const[]){"layers.*"};
    f.options.individual_count = 1;
    if (make_plan(&f)) {
        CHECK(layer_of(&f, "layers.0.fc1")->gather_output);
        CHECK(layer_of(&f, "layers.0.expand")->gather_output);
        CHECK(layer_of(&f, "layers.0.gate") == NULL);
    }
    fixture_free(&f);
}

static void
test_a_model_of_unknown_names_alone_is_individually_sharded_and_that_is_said(void)
{
    fixture f = fixture_new(2);
    f.options.families = f.options.heuristics = f.options.large_layers = true;
    f.options.must_shard = true;
    add_linear(&f, "give", 48, 16);
    add_linear(&f, "take", 16, 48);
    if (make_plan(&f)) {
        CHECK(layer_of(&f, "give")->gather_output);
        CHECK(layer_of(&f, "take")->split_input);
        CHECK_INT_EQ(tp_plan_message_count(f.plan), 1);
        CHECK_TEXT_HAS(tp_plan_message(f.plan, 0)->text,
                       "no layers whose names are known");
    }
    fixture_free(&f);
}

static void
test_a_layer_without_features_for_every_rank_stays_replicated(void)
{
    fixture f = mixer_new(20);
    if (make_plan(&f)) {
        CHECK(layer_of(&f, "layers.0.expand") != NULL);
        CHECK(layer_of(&f, "positions") == NULL);
    }
    fixture_free(&f);
}

static void
test_a_tensor_of_two_layers_is_not_individually_sharded(void)
{
    fixture f = mixer_new(2);
    const int first = add_linear(&f, "one", 16, 16);
    const int other = add_module(&f, "other", TP_MODULE_LINEAR, 0);
    add_shaped(&f, other, "weight", 2, (int64_t[]){16, 16}, first);
    if (make_plan(&f))
        CHECK(layer_of(&f, "one") == NULL && layer_of(&f, "other") == NULL);
    fixture_free(&f);
}

static void
test_layers_that_are_named_are_large_whatever_they_hold(void)
{
    static const char *const names[] = {"layers.*.gate", "positions"};
    fixture f = mixer_new(2);
    f.options.large_names = names;
    f.options.large_name_count = 2;
    if (make_plan(&f)) {
        CHECK(layer_of(&f, "layers.0.gate")->is_large);
        CHECK(layer_of(&f, "positions")->is_large);
        CHECK(layer_of(&f, "layers.0.expand") == NULL);
    }
    fixture_free(&f);
}

int
main(void)
{
    RUN(test_layers_that_are_named_are_large_whatever_they_hold);
    RUN(test_what_nothing_shards_is_sharded_with_full_activations_around_it);
    RUN(test_what_is_small_stays_replicated_unless_many_are_called_alike);
    RUN(test_nothing_is_individually_sharded_where_somebody_else_decides);
    RUN(test_a_layer_of_an_individually_sharded_block_is_sharded_alone_where_no_rule_speaks_of_it);
    RUN(test_a_model_of_unknown_names_alone_is_individually_sharded_and_that_is_said);
    RUN(test_a_layer_without_features_for_every_rank_stays_replicated);
    RUN(test_a_tensor_of_two_layers_is_not_individually_sharded);
    return check_result();
}
