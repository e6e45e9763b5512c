/* SPDX-License-Identifier: Apache-2.0 */
#include "model/names.h"

#include "check.h"

static const char *
pattern_of(const char *name)
{
    static char out[64];
    tp_names_pattern(name, out);
    return out;
}

static void
test_a_pattern_has_a_star_for_each_part_of_digits(void)
{
    CHECK_TEXT_EQ(pattern_of("model.layers.12.mlp"), "model.layers.*.mlp");
    CHECK_TEXT_EQ(pattern_of("0.experts.10.w1"), "*.experts.*.w1");
    CHECK_TEXT_EQ(pattern_of("layers.7"), "layers.*");
    CHECK_TEXT_EQ(pattern_of("7"), "*");
    CHECK_TEXT_EQ(pattern_of("h0.w2.3x.x3"), "h0.w2.3x.x3");
    CHECK_TEXT_EQ(pattern_of("a..1."), "a..*.");
    CHECK_TEXT_EQ(pattern_of(""), "");
}

static void
test_names_are_alike_where_their_patterns_are_equal(void)
{
    static const char *const names[] = {
        "",      "0",      "12",      "a",        "a.0",  "a.1",  "a.10", "a.x",
        "a.0.b", "a.22.b", "a.0.b.1", "a.1.b.33", "a0.b", "a1.b", "0.a",  "a.",
        "a..b",  "a.0b",   "a.1b",    ".",        "0.",   "1.",
    };
    const size_t count = sizeof(names) / sizeof(names[0]);
    for (size_t i = 0; i < count; i++) {
        for (size_t j = 0; j < count; j++) {
            char a[64], b[64];
            tp_names_pattern(names[i], a);
            tp_names_pattern(names[j], b);
            CHECK(tp_names_are_alike(names[i], names[j]) == (strcmp(a, b) == 0));
        }
    }
}

static void
test_an_index_is_a_part_of_digits_alone(void)
{
    CHECK(tp_names_is_index("0"));
    CHECK(tp_names_is_index("17.mlp"));
    CHECK(!tp_names_is_index("17x.mlp"));
    CHECK(!tp_names_is_index("x17"));
    CHECK(!tp_names_is_index(""));
    CHECK(!tp_names_is_index(".1"));
}

int
main(void)
{
    RUN(test_a_pattern_has_a_star_for_each_part_of_digits);
    RUN(test_names_are_alike_where_their_patterns_are_equal);
    RUN(test_an_index_is_a_part_of_digits_alone);
    return check_result();
}
