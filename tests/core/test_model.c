/* SPDX-License-Identifier: Apache-2.0 */
#include "check.h"
#include "model/model.h"

static const tp_model_facts no_facts = {.input_embedding = -1, .output_head = -1};

static tp_model *
new_model(void)
{
    tp_model *model = NULL;
    tp_error err = TP_NO_ERROR;
    CHECK_OK(tp_model_new(&model, &err), &err);
    return model;
}

static int
add_module(tp_model *model, const char *name, tp_module_kind kind)
{
    tp_error err = TP_NO_ERROR;
    int index = -1;
    const tp_module module = {.name = name, .class_name = "Any", .kind = kind};
    CHECK_OK(tp_model_add_module(model, &module, &index, &err), &err);
    return index;
}

static tp_parameter
a_parameter(const char *name, int module)
{
    return (tp_parameter){.name = name,
                          .leaf = "weight",
                          .module = module,
                          .dims = 2,
                          .shape = {4, 6},
                          .dtype = "float32",
                          .itemsize = 4,
                          .tied_to = -1};
}

static void
test_parents_are_found_by_name_and_a_missing_level_is_passed_over(void)
{
    tp_model *model = new_model();
    tp_error err = TP_NO_ERROR;
    add_module(model, "", TP_MODULE_OTHER);
    add_module(model, "layers", TP_MODULE_OTHER);
    add_module(model, "layers.0.mlp", TP_MODULE_OTHER);
    add_module(model, "layers.0.mlp.up", TP_MODULE_LINEAR);
    add_module(model, "lay", TP_MODULE_LINEAR);
    CHECK_OK(tp_model_seal(model, &no_facts, &err), &err);
    const int want[] = {-1, 0, 1, 2, 0};
    for (int i = 0; i < 5; i++)
        CHECK_INT_EQ(tp_model_module(model, i)->parent, want[i]);
    tp_model_free(model);
}

static void
test_everything_that_is_added_is_copied(void)
{
    tp_model *model = new_model();
    tp_error err = TP_NO_ERROR;
    int index = -1;
    char name[] = "mlp", key[] = "num_heads", type[] = "llama", leaf[] = "weight";
    tp_integer integer = {key, 7};
    const tp_module module = {.name = name,
                              .class_name = name,
                              .kind = TP_MODULE_LINEAR,
                              .integers = &integer,
                              .integer_count = 1};
    CHECK_OK(tp_model_add_module(model, &module, &index, &err), &err);
    tp_parameter parameter = a_parameter(name, index);
    parameter.leaf = leaf;
    CHECK_OK(tp_model_add_parameter(model, &parameter, &index, &err), &err);
    const tp_model_facts facts = {.model_type = type,
                                  .integers = &integer,
                                  .integer_count = 1,
                                  .input_embedding = -1};
    CHECK_OK(tp_model_seal(model, &facts, &err), &err);
    name[0] = key[0] = type[0] = leaf[0] = '?';
    integer.value = 0;

    CHECK_TEXT_EQ(tp_model_module(model, 0)->name, "mlp");
    CHECK_TEXT_EQ(tp_model_module(model, 0)->integers[0].key, "num_heads");
    CHECK_INT_EQ(tp_model_module(model, 0)->integers[0].value, 7);
    CHECK_TEXT_EQ(tp_model_parameter(model, 0)->leaf, "weight");
    CHECK_TEXT_EQ(tp_model_get_facts(model)->model_type, "llama");
    CHECK_TEXT_EQ(tp_model_get_facts(model)->prefix, "");
    CHECK_INT_EQ(tp_model_get_facts(model)->output_head, 0);
    tp_model_free(model);
}

static void
test_a_parameter_is_found_by_its_leaf(void)
{
    tp_model *model = new_model();
    tp_error err = TP_NO_ERROR;
    int index = -1;
    add_module(model, "a", TP_MODULE_LINEAR);
    add_module(model, "b", TP_MODULE_LINEAR);
    tp_parameter parameter = a_parameter("a.weight", 0);
    CHECK_OK(tp_model_add_parameter(model, &parameter, &index, &err), &err);
    parameter = a_parameter("a.bias", 0);
    parameter.leaf = "bias";
    CHECK_OK(tp_model_add_parameter(model, &parameter, &index, &err), &err);
    CHECK_OK(tp_model_seal(model, &no_facts, &err), &err);
    CHECK_INT_EQ(tp_model_find_parameter(model, 0, "bias"), 1);
    CHECK_INT_EQ(tp_model_find_parameter(model, 0, "scale"), -1);
    CHECK_INT_EQ(tp_model_find_parameter(model, 1, "weight"), -1);
    CHECK_INT_EQ(tp_model_module_count(model), 2);
    CHECK_INT_EQ(tp_model_parameter_count(model), 2);
    tp_model_free(model);
}

static void
test_the_first_key_that_is_there_decides(void)
{
    const tp_integer integers[] = {{"n_head", 3}, {"num_heads", 5}};
    const char *const both[] = {"num_heads", "n_head", NULL};
    const char *const neither[] = {"head_dim", NULL};
    CHECK_INT_EQ(tp_model_integer(integers, 2, both), 5);
    CHECK_INT_EQ(tp_model_integer(integers, 2, neither), -1);
    CHECK_INT_EQ(tp_model_integer(NULL, 0, both), -1);
}

static void
test_a_parameter_that_cannot_be_is_refused_by_name(void)
{
    tp_model *model = new_model();
    tp_error err = TP_NO_ERROR;
    int index = -1;
    add_module(model, "m", TP_MODULE_OTHER);
    tp_parameter parameter = a_parameter("m.deep", 0);
    parameter.dims = TP_MAX_DIMS + 1;
    CHECK_FAILS(tp_model_add_parameter(model, &parameter, &index, &err), TP_VALUE, &err,
                "'m.deep' has 9 dimensions");
    parameter = a_parameter("m.huge", 0);
    parameter.shape[0] = parameter.shape[1] = INT64_MAX / 2;
    CHECK_FAILS(tp_model_add_parameter(model, &parameter, &index, &err), TP_VALUE, &err,
                "'m.huge': with it the model has more than 2^56 bytes");
    parameter.shape[0] = 0; /* products of some of the sizes are made, too */
    CHECK_FAILS(tp_model_add_parameter(model, &parameter, &index, &err), TP_VALUE, &err,
                "'m.huge'");
    parameter = a_parameter("m.lost", 3);
    CHECK_FAILS(tp_model_add_parameter(model, &parameter, &index, &err), TP_VALUE, &err,
                "module 3");
    parameter = a_parameter("m.tie", 0);
    parameter.tied_to = 0;
    CHECK_FAILS(tp_model_add_parameter(model, &parameter, &index, &err), TP_VALUE, &err,
                "tied to index 0");
    parameter = a_parameter("m.minus", 0);
    parameter.shape[1] = -1;
    CHECK_FAILS(tp_model_add_parameter(model, &parameter, &index, &err), TP_VALUE, &err,
                "shape[1] is -1");
    tp_model_free(model);
}

static void
test_parameters_that_come_to_too_much_together_are_refused(void)
{
    tp_model *model = new_model();
    tp_error err = TP_NO_ERROR;
    int index = -1;
    add_module(model, "m", TP_MODULE_OTHER);
    tp_parameter parameter = a_parameter("m.half", 0);
    parameter.itemsize = 1;
    parameter.dims = 1;
    parameter.shape[0] = TP_MOST_BYTES / 2;
    CHECK_OK(tp_model_add_parameter(model, &parameter, &index, &err), &err);
    parameter.name = "m.more";
    parameter.shape[0]++;
    CHECK_FAILS(tp_model_add_parameter(model, &parameter, &index, &err), TP_VALUE, &err,
                "'m.more': with it the model has more than 2^56 bytes");
    parameter.name = "m.rest";
    parameter.shape[0]--;
    CHECK_OK(tp_model_add_parameter(model, &parameter, &index, &err), &err);
    tp_model_free(model);
}

static void
test_ties_of_different_shapes_are_refused_naming_both(void)
{
    tp_model *model = new_model();
    tp_error err = TP_NO_ERROR;
    int index = -1;
    add_module(model, "m", TP_MODULE_OTHER);
    tp_parameter parameter = a_parameter("m.a", 0);
    CHECK_OK(tp_model_add_parameter(model, &parameter, &index, &err), &err);
    parameter = a_parameter("m.b", 0);
    parameter.tied_to = 0;
    parameter.shape[0] = 5;
    CHECK_FAILS(tp_model_add_parameter(model, &parameter, &index, &err), TP_VALUE, &err,
                "'m.b' is tied to 'm.a'");
    tp_model_free(model);
}

static void
test_two_of_one_name_are_refused(void)
{
    tp_model *model = new_model();
    tp_error err = TP_NO_ERROR;
    int index = -1;
    add_module(model, "m", TP_MODULE_OTHER);
    const tp_parameter parameter = a_parameter("m.w", 0);
    CHECK_OK(tp_model_add_parameter(model, &parameter, &index, &err), &err);
    CHECK_OK(tp_model_add_parameter(model, &parameter, &index, &err), &err);
    CHECK_FAILS(tp_model_seal(model, &no_facts, &err), TP_VALUE, &err,
                "two parameters are called 'm.w'");
    add_module(model, "m", TP_MODULE_OTHER);
    CHECK_FAILS(tp_model_seal(model, &no_facts, &err), TP_VALUE, &err,
                "two modules are called 'm'");
    tp_model_free(model);
}

static void
test_a_sealed_model_takes_nothing_more(void)
{
    tp_model *model = new_model();
    tp_error err = TP_NO_ERROR;
    int index = -1;
    CHECK_OK(tp_model_seal(model, &no_facts, &err), &err);
    const tp_module module = {.name = "late", .class_name = "Any"};
    CHECK_FAILS(tp_model_add_module(model, &module, &index, &err), TP_BUG, &err,
                "sealed");
    CHECK_FAILS(tp_model_seal(model, &no_facts, &err), TP_BUG, &err, "sealed");
    tp_model_free(model);
}

static void
test_facts_about_modules_that_are_not_there_are_refused(void)
{
    tp_model *model = new_model();
    tp_error err = TP_NO_ERROR;
    const tp_model_facts facts = {.input_embedding = 4, .output_head = -1};
    CHECK_FAILS(tp_model_seal(model, &facts, &err), TP_VALUE, &err,
                "input_embedding 4");
    tp_model_free(model);
}

static void
test_numbers_below_zero_are_refused(void)
{
    tp_model *model = new_model();
    tp_error err = TP_NO_ERROR;
    int index = -1;
    add_module(model, "m", TP_MODULE_OTHER);
    tp_parameter parameter = a_parameter("m.w", 0);
    parameter.dims = -1;
    CHECK_FAILS(tp_model_add_parameter(model, &parameter, &index, &err), TP_VALUE, &err,
                "'m.w' has -1 dimensions");
    parameter = a_parameter("m.w", -1);
    CHECK_FAILS(tp_model_add_parameter(model, &parameter, &index, &err), TP_VALUE, &err,
                "is in module -1");
    const tp_model_facts facts = {.input_embedding = -1, .output_head = 1};
    CHECK_FAILS(tp_model_seal(model, &facts, &err), TP_VALUE, &err, "output_head 1");
    tp_model_free(model);
}

/* Each text needs memory of its own, and is as long as no name is. */
static void
test_every_text_and_list_of_a_model_is_copied_or_the_model_stays_as_it_was(void)
{
    enum { SIZE = 1 << 20, COUNT = 70000 };
    static char texts[8][SIZE + 1];
    static tp_integer integers[COUNT];
    for (int i = 0; i < 8; i++)
        memset(texts[i], 'a' + i, SIZE);
    for (int i = 0; i < COUNT; i++)
        integers[i] = (tp_integer){"key", i};
    integers[COUNT - 1].key = texts[0];
    tp_model *model = new_model();
    tp_error err = TP_NO_ERROR;
    int index = -1;
    const tp_module module = {.name = texts[1],
                              .class_name = texts[2],
                              .integers = integers,
                              .integer_count = COUNT};
    CHECK_OK(tp_model_add_module(model, &module, &index, &err), &err);
    tp_parameter parameter = a_parameter(texts[3], 0);
    parameter.leaf = texts[4];
    parameter.dtype = texts[5];
    CHECK_OK(tp_model_add_parameter(model, &parameter, &index, &err), &err);
    const tp_model_facts facts = {.prefix = texts[6],
                                  .model_type = texts[7],
                                  .integers = integers,
                                  .integer_count = COUNT,
                                  .input_embedding = -1,
                                  .output_head = -1};
    CHECK_OK(tp_model_seal(model, &facts, &err), &err);
    const tp_module *held = tp_model_module(model, 0);
    CHECK(strcmp(held->name, texts[1]) == 0 && strcmp(held->class_name, texts[2]) == 0);
    CHECK_INT_EQ(held->integer_count, COUNT);
    CHECK_INT_EQ(held->integers[COUNT - 1].value, COUNT - 1);
    CHECK(strcmp(held->integers[COUNT - 1].key, texts[0]) == 0);
    const tp_parameter *at = tp_model_parameter(model, 0);
    CHECK(strcmp(at->leaf, texts[4]) == 0 && strcmp(at->dtype, texts[5]) == 0);
    CHECK(strcmp(tp_model_get_facts(model)->model_type, texts[7]) == 0);
    tp_model_free(model);
}

static void
test_a_sealed_model_takes_no_parameter(void)
{
    tp_model *model = new_model();
    tp_error err = TP_NO_ERROR;
    int index = -1;
    add_module(model, "m", TP_MODULE_OTHER);
    CHECK_OK(tp_model_seal(model, &no_facts, &err), &err);
    const tp_parameter parameter = a_parameter("m.w", 0);
    CHECK_FAILS(tp_model_add_parameter(model, &parameter, &index, &err), TP_BUG, &err,
                "sealed");
    CHECK_INT_EQ(tp_model_parameter_count(model), 0);
    tp_model_free(model);
    tp_model_free(NULL);
}

int
main(void)
{
    RUN(test_parents_are_found_by_name_and_a_missing_level_is_passed_over);
    RUN(test_everything_that_is_added_is_copied);
    RUN(test_a_parameter_is_found_by_its_leaf);
    RUN(test_the_first_key_that_is_there_decides);
    RUN(test_a_parameter_that_cannot_be_is_refused_by_name);
    RUN(test_parameters_that_come_to_too_much_together_are_refused);
    RUN(test_ties_of_different_shapes_are_refused_naming_both);
    RUN(test_two_of_one_name_are_refused);
    RUN(test_a_sealed_model_takes_nothing_more);
    RUN(test_facts_about_modules_that_are_not_there_are_refused);
    RUN(test_numbers_below_zero_are_refused);
    RUN(test_every_text_and_list_of_a_model_is_copied_or_the_model_stays_as_it_was);
    RUN(test_a_sealed_model_takes_no_parameter);
    return check_result();
}
