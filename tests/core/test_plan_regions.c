/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_llama.h"

static void
check_region(const fixture *f, const char *name, bool opens, bool closes)
{
    const tp_layer *layer = layer_of(f, name);
    if (!CHECK(layer != NULL))
        return;
    CHECK_INT_EQ(layer->opens_region, opens);
    CHECK_INT_EQ(layer->closes_region, closes);
}

static void
test_columns_open_a_region_and_the_row_of_their_block_closes_it(void)
{
    fixture f = fixture_new(2);
    add_llama(&f, 2, false);
    add_llama_styles(&f);
    if (make_plan(&f)) {
        const tp_regions *regions = tp_plan_regions(f.plan);
        check_region(&f, "model.layers.0.self_attn.q_proj", true, false);
        check_region(&f, "model.layers.1.self_attn.v_proj", true, false);
        check_region(&f, "model.layers.1.mlp.up_proj", true, false);
        check_region(&f, "model.layers.0.self_attn.o_proj", false, true);
        check_region(&f, "model.layers.1.mlp.down_proj", false, true);
        check_region(&f, "lm_head", false, false);
        check_region(&f, "model.embed_tokens", false, false);
        check_modules(&f, &regions->blocks,
                      NAMES("model.layers.0.self_attn", "model.layers.0.mlp",
                            "model.layers.1.self_attn", "model.layers.1.mlp"));
        CHECK_INT_EQ(regions->replicated_dropouts.count, 0);
        CHECK_INT_EQ(regions->sharded_dropouts.count, 0);
    }
    fixture_free(&f);
}

/* As BERT: the row layer is in a module beside the columns. And a list has no forward:
 * what runs its layers is around it. */
static void
test_a_block_is_the_nearest_module_with_a_forward_around_column_and_row(void)
{
    fixture f = fixture_new(2);
    add_module(&f, "", TP_MODULE_OTHER, 0);
    add_module(&f, "block", TP_MODULE_OTHER, 0);
    add_module(&f, "block.self", TP_MODULE_OTHER, 0);
    add_linear(&f, "block.self.up", 32, 16);
    add_class(&f, "block.self.pos_dropout", "Dropout");
    add_module(&f, "block.output", TP_MODULE_OTHER, 0);
    add_linear(&f, "block.output.down", 16, 32);
    add_class(&f, "block.output.dropout", "Dropout");
    add_module(&f, "runs", TP_MODULE_OTHER, 0);
    add_class(&f, "runs.list", "ModuleList");
    add_class(&f, "runs.list.0", "ModuleDict");
    add_linear(&f, "runs.list.0.up", 32, 16);
    add_linear(&f, "runs.list.0.down", 16, 32);
    add_class(&f, "runs.pos_dropout_of_another", "Dropout");
    add_rule(&f, "a", ".*up\\.weight", TP_PARTITION_COLUMN);
    add_rule(&f, "b", ".*down\\.weight", TP_PARTITION_ROW);
    if (make_plan(&f)) {
        const tp_regions *regions = tp_plan_regions(f.plan);
        check_modules(&f, &regions->blocks, NAMES("block", "runs"));
        check_modules(&f, &regions->replicated_dropouts,
                      NAMES("block.self.pos_dropout"));
    }
    fixture_free(&f);
}

/* What an adapter drops is the input of its layer: full before a column layer, which
 * has opened a region by then, and sharded before a row layer, which has closed it. */
static void
test_adapters_drop_full_inputs_of_columns_and_sharded_ones_of_rows(void)
{
    fixture f = fixture_new(2);
    static const char *const wrappers[] = {"mlp.up", "mlp.down", "mlp.gate"};
    add_module(&f, "", TP_MODULE_OTHER, 0);
    add_module(&f, "mlp", TP_MODULE_OTHER, 0);
    for (int i = 0; i < 3; i++) {
        char name[64];
        const int out = i == 1 ? 16 : 32;
        add_module(&f, wrappers[i], TP_MODULE_OTHER, 0);
        snprintf(name, sizeof(name), "%s.base_layer", wrappers[i]);
        add_linear(&f, name, out, 48 - out);
        snprintf(name, sizeof(name), "%s.lora_dropout", wrappers[i]);
        add_class(&f, name, "ModuleDict");
        snprintf(name, sizeof(name), "%s.lora_dropout.default", wrappers[i]);
        add_class(&f, name, i == 2 ? "Identity" : "Dropout");
        snprintf(name, sizeof(name), "%s.lora_A", wrappers[i]);
        add_class(&f, name, "ModuleDict");
        snprintf(name, sizeof(name), "%s.lora_A.default", wrappers[i]);
        add_linear(&f, name, 4, 48 - out);
    }
    add_rule(&f, "a", ".*(up|gate)\\.base_layer\\.weight", TP_PARTITION_COLUMN);
    add_rule(&f, "b", ".*down\\.(base_layer|lora_A.*)\\.weight", TP_PARTITION_ROW);
    if (make_plan(&f)) {
        const tp_regions *regions = tp_plan_regions(f.plan);
        check_region(&f, "mlp.down.lora_A.default", false, true);
        check_modules(&f, &regions->blocks, NAMES("mlp"));
        check_modules(&f, &regions->replicated_dropouts,
                      NAMES("mlp.up.lora_dropout.default"));
        check_modules(&f, &regions->sharded_dropouts,
                      NAMES("mlp.down.lora_dropout.default"));
    }
    fixture_free(&f);
}

static void
test_layers_with_full_inputs_and_outputs_have_no_region(void)
{
    fixture f = fixture_new(2);
    add_module(&f, "", TP_MODULE_OTHER, 0);
    add_module(&f, "mlp", TP_MODULE_OTHER, 0);
    add_linear(&f, "mlp.up", 32, 16);
    add_linear(&f, "mlp.down", 16, 32);
    add_style(&f, "mlp.up", "colwise_gather_output");
    add_style(&f, "mlp.down", "rowwise_split_input");
    if (make_plan(&f)) {
        check_region(&f, "mlp.up", false, false);
        check_region(&f, "mlp.down", false, false);
        CHECK_INT_EQ(tp_plan_regions(f.plan)->blocks.count, 0);
    }
    fixture_free(&f);
}

int
main(void)
{
    RUN(test_columns_open_a_region_and_the_row_of_their_block_closes_it);
    RUN(test_a_block_is_the_nearest_module_with_a_forward_around_column_and_row);
    RUN(test_adapters_drop_full_inputs_of_columns_and_sharded_ones_of_rows);
    RUN(test_layers_with_full_inputs_and_outputs_have_no_region);
    return check_result();
}
