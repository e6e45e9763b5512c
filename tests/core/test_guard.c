/* SPDX-License-Identifier: Apache-2.0 */
#include "rules/guard.h"

#include <stdlib.h>

#include "check.h"

static void
check_guard(const char *pattern, const char *want)
{
    tp_error err = TP_NO_ERROR;
    tp_text text = TP_NO_TEXT;
    char *got = NULL;
    tp_guard_add(&text, pattern);
    CHECK_OK(tp_text_take(&text, &got, &err), &err);
    if (!CHECK_TEXT_EQ(got, want))
        fprintf(stderr, "  for '%s'\n", pattern);
    free(got);
}

static void
test_flags_that_pcre2_does_not_have_are_left_out(void)
{
    check_guard("(?i)a", "(?i)a");
    check_guard("(?ai)a", "(?i)a");
    check_guard("(?a)a", "a");
    check_guard("(?Lu)a(?s)", "a(?s)");
    check_guard("(?a:b)", "(?:b)");
    check_guard("(?ux:b)", "(?x:b)");
    check_guard("(?m-i:b)", "(?m-i:b)");
    check_guard("(?-i:b)", "(?-i:b)");
    check_guard("(?i-:b)", "(?i:b)");
}

static void
test_what_only_looks_like_flags_stays(void)
{
    static const char *const kept[] = {
        "(?i",       "(?i!",    "(?P<i>a)", "(?=i)",    "(?:a)",
        "(a)",       "[(?a)]b", "\\(?a)",   "[^](?a)]", "[](?a)]",
        "[\\](?a)]", "[(?a)",   "\\",       "[\\",      "a(?",
    };
    for (size_t i = 0; i < sizeof(kept) / sizeof(kept[0]); i++)
        check_guard(kept[i], kept[i]);
}

static void
test_a_repeat_without_a_least_count_begins_at_0(void)
{
    check_guard("a{,3}b", "a{0,3}b");
    check_guard("a{,}", "a{0,}");
    check_guard("a{,12}?", "a{0,12}?");
    check_guard("a{2,3}", "a{2,3}");
    check_guard("a{,x}", "a{,x}");
    check_guard("a{,3", "a{,3");
    check_guard("a{3", "a{3");
    check_guard("[{,3}]\\{,3}", "[{,3}]\\{,3}");
    check_guard("\\N{DIGIT ONE}{,3}", "\\N{DIGIT ONE}{0,3}");
    check_guard("\\N{DIGIT", "\\N{DIGIT");
    check_guard("\\N{,3}{", "\\N{,3}{"); /* a name, whatever it is */
    check_guard("\\Nb", "\\Nb");
}

static void
test_repeats_and_alternatives_are_choices(void)
{
    static const struct {
        const char *pattern;
        int choices;
    } cases[] = {
        {"", 0},           {"abc", 0},      {"a*", 1},      {"a*b+", 2},
        {"a?", 1},         {"a|b", 1},      {"(a|b)*", 2},  {"(?:a)*", 1},
        {"(?P<a>b)*", 1},  {"(?=a)b", 0},   {"a+?", 1},     {"a++", 1},
        {"a*?b??", 2},     {"a{2,3}", 1},   {"a{2,3}?", 1}, {"a{,3}", 1},
        {"a{", 0},         {"a{3", 0},      {"a{3}", 0},    {"a{3}b{4}", 0},
        {"a{3}b*", 2},     {"a*|b", 2},     {"a|+", 2},     {"\\*\\+\\|", 0},
        {"[*+?{|]", 0},    {"[]*]a*", 1},   {"[^]*]", 0},   {"(?+)", 1},
        {"\\N{a|b}c*", 1}, {"a{3}+", 0},    {"a{3,}+", 1},  {"a{,}b*", 2},
        {"a{}|{,3", 1},    {"a{3}{2,}", 2}, {"a{x}*", 1},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
        if (!CHECK_INT_EQ(tp_guard_choices(cases[i].pattern), cases[i].choices))
            fprintf(stderr, "  for '%s'\n", cases[i].pattern);
}

static void
test_repeats_of_groups_and_references_are_rounds(void)
{
    static const struct {
        const char *pattern;
        int rounds;
    } cases[] = {
        {"", 1},
        {"a{300}", 1},
        {"(?i)[)]{300}", 1},
        {"\\){300}", 1},
        {"(?:(?=a){30}){3}", 90},
        {"((?=a){3,}){2,5}", 6},
        {"(?:(?=a){,9}){0}", 1},
        {"(a)\\1{7}", 7},
        {"(a?)(?P=n){70}?", 70},
        {"(a)\\12{7}b{5}", 7},
        {"(?x)(?=a) # so\n {8}", 8},
        {"(?x)a {8}", 8},
        {"(?:(?:a){20}){20}", 400},
        {"(?:(?:(?:){60000}){60000}){60000}", 5000},
        {"(?:){99999999999999999999}", 5000},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
        if (!CHECK_INT_EQ(tp_guard_rounds(cases[i].pattern, 5000), cases[i].rounds))
            fprintf(stderr, "  for '%s'\n", cases[i].pattern);
}

int
main(void)
{
    RUN(test_flags_that_pcre2_does_not_have_are_left_out);
    RUN(test_what_only_looks_like_flags_stays);
    RUN(test_a_repeat_without_a_least_count_begins_at_0);
    RUN(test_repeats_and_alternatives_are_choices);
    RUN(test_repeats_of_groups_and_references_are_rounds);
    return check_result();
}
