/* SPDX-License-Identifier: Apache-2.0 */
#include "base/did_you_mean.h"

#include <stdlib.h>

#include "check.h"

#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

static const char *const presets[] = {"llama",       "bloom", "chatglm", "mixtral",
                                      "deepseek_v2", "qwen2", "phi3"};

/* The first near name, or NULL. */
static const char *
nearest(const char *name, const char *const *names, int count)
{
    int found[1];
    return tp_did_you_mean(name, names, count, 1, found) == 1 ? names[found[0]] : NULL;
}

static bool
is_near(const char *a, const char *b)
{
    const char *const names[] = {b};
    return nearest(a, names, 1) != NULL;
}

static void
test_one_wrong_letter_finds_the_name(void)
{
    CHECK_TEXT_EQ(nearest("lama", presets, COUNT(presets)), "llama");
    CHECK_TEXT_EQ(nearest("mixtrall", presets, COUNT(presets)), "mixtral");
    CHECK_TEXT_EQ(nearest("bloon", presets, COUNT(presets)), "bloom");
    CHECK_TEXT_EQ(nearest("bolom", presets, COUNT(presets)), "bloom");
}

static void
test_case_does_not_count(void)
{
    const char *const names[] = {"Column", "ROW"};
    CHECK_TEXT_EQ(nearest("COLUMN", names, 2), "Column");
    CHECK_TEXT_EQ(nearest("row", names, 2), "ROW");
}

static void
test_a_swap_of_neighbours_is_one_edit(void)
{
    /* Two edits each way, or four replacements, which would be too many. */
    CHECK(is_near("abcdef", "badcef"));
    CHECK(!is_near("abcdef", "bxdyef"));
    /* No part is edited twice, so "ca" is three edits from "abc", not two. */
    CHECK(!is_near("ca", "abc"));
}

static void
test_nearest_names_come_first_and_equal_ones_in_order(void)
{
    const char *const names[] = {"weighs", "weight", "freight", "weigh", "bias"};
    int found[5];
    const int count = tp_did_you_mean("weight", names, 5, 5, found);
    CHECK_INT_EQ(count, 4);
    CHECK_INT_EQ(found[0], 1);
    CHECK_INT_EQ(found[1], 0);
    CHECK_INT_EQ(found[2], 3);
    CHECK_INT_EQ(found[3], 2);
}

static void
test_a_limit_keeps_the_nearest_wherever_they_stand(void)
{
    const char *const names[] = {"weighs", "weighty", "freight", "weight"};
    int found[2] = {-1, -1};
    CHECK_INT_EQ(tp_did_you_mean("weight", names, 4, 2, found), 2);
    CHECK_INT_EQ(found[0], 3);
    CHECK_INT_EQ(found[1], 0);
    CHECK_INT_EQ(tp_did_you_mean("weight", names, 4, 0, found), 0);
}

static void
test_the_bound_is_a_third_of_the_longer_name_and_at_least_two(void)
{
    CHECK(is_near("ab", "xy"));
    CHECK(!is_near("abc", "xyz"));
    CHECK(is_near("abcdefghi", "xyzdefghi"));
    CHECK(!is_near("abcdefghi", "xyzwefghi"));
    CHECK(!is_near("abcdefgh", "xyzdefgh"));
}

static void
test_a_name_inside_the_other_is_near_at_any_distance(void)
{
    CHECK(is_near("q_proj", "model.layers.0.self_attn.Q_PROJ.weight"));
    CHECK(is_near("model.layers.0.self_attn.q_proj.weight", "q_proj"));
    CHECK(!is_near("", "weight"));
}

static void
test_names_over_128_bytes_are_never_near(void)
{
    char long_name[130];
    memset(long_name, 'n', sizeof(long_name));
    long_name[129] = '\0';
    CHECK(!is_near(long_name, long_name));
    CHECK(!is_near("nnn", long_name));
    long_name[128] = '\0';
    CHECK(is_near(long_name, long_name));
    CHECK(is_near("nnn", long_name));
}

static void
check_added(const char *name, const char *const *names, int count, const char *want)
{
    tp_error err = TP_NO_ERROR;
    tp_text text = TP_NO_TEXT;
    char *out = NULL;
    tp_did_you_mean_add(&text, name, names, count);
    CHECK_OK(tp_text_take(&text, &out, &err), &err);
    CHECK_TEXT_EQ(out, want);
    free(out);
}

static void
test_a_hint_names_what_is_near_or_else_everything(void)
{
    const char *const ab[] = {"alpha1", "alpha2", "alpha3", "alpha4"};
    check_added("lama", presets, COUNT(presets), "; did you mean 'llama'?");
    check_added("alpha", ab, 2, "; did you mean 'alpha1' or 'alpha2'?");
    check_added("alpha", ab, 4, "; did you mean 'alpha1', 'alpha2' or 'alpha3'?");
    check_added("zzzzzzz", ab, 2, "; known: alpha1, alpha2");
    check_added("zzzzzzz", ab, 0, "");
}

int
main(void)
{
    RUN(test_one_wrong_letter_finds_the_name);
    RUN(test_case_does_not_count);
    RUN(test_a_swap_of_neighbours_is_one_edit);
    RUN(test_nearest_names_come_first_and_equal_ones_in_order);
    RUN(test_a_limit_keeps_the_nearest_wherever_they_stand);
    RUN(test_the_bound_is_a_third_of_the_longer_name_and_at_least_two);
    RUN(test_a_name_inside_the_other_is_near_at_any_distance);
    RUN(test_names_over_128_bytes_are_never_near);
    RUN(test_a_hint_names_what_is_near_or_else_everything);
    return check_result();
}
