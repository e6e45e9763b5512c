/* SPDX-License-Identifier: Apache-2.0 */
#include "model/adapters.h"

#include "check.h"

static void
check_name(const char *name, const char *plain, tp_adapted part)
{
    char out[128];
    CHECK_INT_EQ(tp_adapters_name(name, out, sizeof(out)), part);
    CHECK_TEXT_EQ(out, plain);
}

static void
test_names_lose_what_an_adapter_adds_to_them(void)
{
    check_name("base_model.model.model.layers.0.q_proj.base_layer.weight",
               "model.layers.0.q_proj.weight", TP_ADAPTED_LAYER);
    check_name("base_model.model.lm_head.weight", "lm_head.weight", TP_ADAPTED_ROOT);
    check_name("h.0.attn.c_attn.lora_A.default.weight", "h.0.attn.c_attn.weight",
               TP_ADAPTED_DOWN);
    check_name("h.0.attn.c_attn.lora_B.my adapter", "h.0.attn.c_attn", TP_ADAPTED_UP);
    check_name("head.modules_to_save.default.bias", "head.bias", TP_ADAPTED_LAYER);
    check_name("head.original_module", "head", TP_ADAPTED_LAYER);
    /* An adapter may be called like a part. */
    check_name("q.lora_B.base_layer.weight", "q.weight", TP_ADAPTED_UP);
}

static void
test_lists_of_adapters_are_known_by_name(void)
{
    CHECK(tp_adapters_is_list("q_proj.lora_A") &&
          tp_adapters_is_list("modules_to_save"));
    CHECK(!tp_adapters_is_list("q_proj") && !tp_adapters_is_list("q_proj.base_layer"));
}

static void
test_other_names_stay_as_they_are(void)
{
    check_name("model.layers.0.q_proj.weight", "model.layers.0.q_proj.weight",
               TP_ADAPTED_NONE);
    check_name("model.lora_Bs.base_layers", "model.lora_Bs.base_layers",
               TP_ADAPTED_NONE);
    check_name("", "", TP_ADAPTED_NONE);
}

static void
test_a_name_that_is_too_long_is_left_alone(void)
{
    char out[12];
    CHECK_INT_EQ(tp_adapters_name("q.base_layer", out, sizeof(out)), TP_ADAPTED_NONE);
    CHECK_TEXT_EQ(out, "");
    CHECK_INT_EQ(tp_adapters_name("base_layer", out, sizeof(out)), TP_ADAPTED_LAYER);
}

int
main(void)
{
    RUN(test_names_lose_what_an_adapter_adds_to_them);
    RUN(test_lists_of_adapters_are_known_by_name);
    RUN(test_other_names_stay_as_they_are);
    RUN(test_a_name_that_is_too_long_is_left_alone);
    return check_result();
}
