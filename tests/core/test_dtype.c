/* SPDX-License-Identifier: Apache-2.0 */
#include "base/dtype.h"

#include <ctype.h>

#include "check.h"

static const struct {
    const char *spelling;
    const char *name;
} known[] = {
    {"float16", "float16"},   {"half", "float16"},  {"fp16", "float16"},
    {"bfloat16", "bfloat16"}, {"bf16", "bfloat16"}, {"float32", "float32"},
    {"float", "float32"},     {"fp32", "float32"},  {"float64", "float64"},
    {"double", "float64"},    {"fp64", "float64"},
};

static const char *
name_of(const char *spelling)
{
    tp_error err = TP_NO_ERROR;
    const char *name = NULL;
    CHECK_OK(tp_dtype_name(spelling, "dtype", &name, &err), &err);
    return name;
}

static void
test_every_spelling_has_its_name_in_every_dress(void)
{
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        char dressed[64];
        CHECK_TEXT_EQ(name_of(known[i].spelling), known[i].name);
        snprintf(dressed, sizeof(dressed), "torch.%s", known[i].spelling);
        CHECK_TEXT_EQ(name_of(dressed), known[i].name);
        for (char *at = dressed; *at != '\0'; at++)
            *at = (char)toupper((unsigned char)*at);
        CHECK_TEXT_EQ(name_of(dressed), known[i].name);
        snprintf(dressed, sizeof(dressed), " \t%s\n ", known[i].spelling);
        CHECK_TEXT_EQ(name_of(dressed), known[i].name);
    }
}

static void
test_an_unknown_spelling_names_place_value_and_nearest(void)
{
    tp_error err = TP_NO_ERROR;
    const char *name = NULL;
    CHECK_FAILS(tp_dtype_name("bfloat61", "tensor_parallel.dtype", &name, &err),
                TP_VALUE, &err,
                "tensor_parallel.dtype: 'bfloat61' is not a dtype; did you mean "
                "'bfloat16'");
    CHECK_FAILS(tp_dtype_name("torch.int8quantised", "dtype", &name, &err), TP_VALUE,
                &err, "; known: float16, half, fp16, bfloat16");
}

static void
test_blanks_and_prefixes_alone_are_no_dtype(void)
{
    static const char *const bad[] = {
        "", "   ", "torch.", "auto", "float 16", "torch.torch.half", "bf16x", "xbf16",
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        tp_error err = TP_NO_ERROR;
        const char *name = NULL;
        CHECK_FAILS(tp_dtype_name(bad[i], "dtype", &name, &err), TP_VALUE, &err,
                    "is not a dtype");
        CHECK(name == NULL);
    }
}

int
main(void)
{
    RUN(test_every_spelling_has_its_name_in_every_dress);
    RUN(test_an_unknown_spelling_names_place_value_and_nearest);
    RUN(test_blanks_and_prefixes_alone_are_no_dtype);
    return check_result();
}
