/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_fixture.h"

/* gemma3n: later layers have queries only, and are given the keys of an earlier one. */
static void
test_attention_without_keys_of_its_own_has_those_of_layers_called_alike(void)
{
    fixture f = fixture_new(4);
    for (int i = 0; i < 2; i++) {
        char name[32];
        snprintf(name, sizeof(name), "layers.%d.attn", i);
        add_module(&f, name, TP_MODULE_OTHER, 3, "head_dim", 4, "num_key_value_heads",
                   2, "num_key_value_groups", 2);
        snprintf(name, sizeof(name), "layers.%d.attn.q_proj", i);
        add_linear(&f, name, 16, 32);
        if (i == 0)
            add_linear(&f, "layers.0.attn.k_proj", 8, 32);
    }
    add_fact(&f, "num_attention_heads", 4);
    add_rule(&f, "r", ".*_proj.*", TP_PARTITION_COLUMN);
    if (make_plan(&f)) {
        CHECK_INT_EQ(integer_of(&f, "layers.1.attn", "num_key_value_groups")[3], 1);
        CHECK_INT_EQ(integer_of(&f, "layers.1.attn", "num_key_value_heads")[3], 1);
    }
    fixture_free(&f);
}

int
main(void)
{
    RUN(test_attention_without_keys_of_its_own_has_those_of_layers_called_alike);
    return check_result();
}
