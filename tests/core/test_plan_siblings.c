/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_llama.h"

/* Whether exactly these layers, NULL at the end, are siblings of the first. */
static void
check_siblings(const fixture *f, const char *const *names)
{
    const tp_layer *layer = layer_of(f, names[0]);
    if (!CHECK(layer != NULL))
        return;
    int count = 0;
    while (names[count] != NULL)
        count++;
    CHECK_INT_EQ(layer->sibling_count, count);
    for (int i = 0; i < count && i < layer->sibling_count; i++) {
        const tp_layer *sibling = tp_plan_layer(f->plan, layer->siblings[i]);
        CHECK_TEXT_EQ(tp_model_module(f->model, sibling->module)->name, names[i]);
    }
}

static void
test_columns_of_one_block_and_one_width_are_siblings(void)
{
    fixture f = fixture_new(2);
    add_llama(&f, 2, false);
    add_llama_styles(&f);
    if (make_plan(&f)) {
        check_siblings(&f,
                       (const char *const[]){"model.layers.1.self_attn.q_proj",
                                             "model.layers.1.self_attn.k_proj",
                                             "model.layers.1.self_attn.v_proj", NULL});
        check_siblings(&f, (const char *const[]){"model.layers.0.mlp.gate_proj",
                                                 "model.layers.0.mlp.up_proj", NULL});
        check_siblings(&f, (const char *const[]){"lm_head", NULL});
        CHECK_INT_EQ(layer_of(&f, "model.layers.0.mlp.down_proj")->sibling_count, 0);
        CHECK_INT_EQ(layer_of(&f, "model.embed_tokens")->sibling_count, 0);
    }
    fixture_free(&f);
}

/* Adapters wrap every layer in a module of its own and add layers of other widths; a
 * transposed weight has its inputs first. */
static void
test_siblings_are_found_through_wrappers(void)
{
    fixture f = fixture_new(2);
    add_module(&f, "", TP_MODULE_OTHER, 0);
    add_module(&f, "block", TP_MODULE_OTHER, 0);
    add_module(&f, "block.up", TP_MODULE_OTHER, 0);
    add_linear(&f, "block.up.base", 32, 16);
    add_linear(&f, "block.up.low", 32, 4);
    add_module(&f, "block.gate", TP_MODULE_OTHER, 0);
    add_matrix(&f, "block.gate.base", TP_MODULE_CONV1D, 16, 32);
    add_linear(&f, "block.down", 16, 32);
    add_rule(&f, "a", ".*(base|low)\\.weight", TP_PARTITION_COLUMN);
    add_rule(&f, "b", ".*down\\.weight", TP_PARTITION_ROW);
    if (make_plan(&f)) {
        check_siblings(&f,
                       (const char *const[]){"block.up.base", "block.gate.base", NULL});
        check_siblings(&f, (const char *const[]){"block.up.low", NULL});
    }
    fixture_free(&f);
}

/* Without a row layer there is no block around them but the model. */
static void
test_layers_of_two_members_of_a_list_are_no_siblings(void)
{
    fixture f = fixture_new(2);
    add_module(&f, "", TP_MODULE_OTHER, 0);
    add_module(&f, "blocks", TP_MODULE_OTHER, 0);
    add_module(&f, "blocks.0", TP_MODULE_OTHER, 0);
    add_linear(&f, "blocks.0.gate", 32, 16);
    add_linear(&f, "blocks.0.up", 32, 16);
    add_module(&f, "blocks.1", TP_MODULE_OTHER, 0);
    add_linear(&f, "blocks.1.up", 32, 16);
    add_rule(&f, "a", ".*\\.weight", TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        check_siblings(&f, (const char *const[]){"blocks.0.gate", "blocks.0.up", NULL});
        check_siblings(&f, (const char *const[]){"blocks.1.up", NULL});
    }
    fixture_free(&f);
}

int
main(void)
{
    RUN(test_columns_of_one_block_and_one_width_are_siblings);
    RUN(test_siblings_are_found_through_wrappers);
    RUN(test_layers_of_two_members_of_a_list_are_no_siblings);
    return check_result();
}
