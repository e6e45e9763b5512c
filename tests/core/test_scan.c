/* SPDX-License-Identifier: Apache-2.0 */
#include "scan.h"

#include "check.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* The text that `pattern` requires, or NULL when it is outside the subset.
 * Valid until the next call. */
static const char *
required(const char *pattern)
{
    static char literal[256];
    size_t size = 0;
    if (!tp_scan(pattern, literal, &size))
        return NULL;
    literal[size] = '\0';
    return literal;
}

static void
test_what_both_engines_read_alike_is_in_the_subset(void)
{
    static const char *const inside[] = {
        "",
        ".*\\.self_attn\\.[qkv]_proj\\.weight$",
        "^model\\.layers\\.\\d+\\.mlp",
        "\\Amodel",
        "a|b|",
        "()",
        "(?:a|b)+?c",
        "(?=a)(?!b)\\w\\W\\s\\S\\D\\b",
        "a{2}b{2,}c{2,3}d{0,1000}?",
        "[]a]",
        "[^]a]",
        "[^a-z0-9_.-]",
        "[-a]",
        "[\\w-]",
        "[\\].\\-$()*]",
        "(.*\\.)?lm_head",
        "(?:x*)y",
        "\\_\\-\\/\\ ",
        "a-b c#d",
    };
    for (size_t i = 0; i < COUNT(inside); i++)
        if (!CHECK(required(inside[i]) != NULL))
            fprintf(stderr, "  for '%s'\n", inside[i]);
}

static void
test_everything_else_is_left_to_python(void)
{
    static const char *const outside[] = {
        /* special groups and references */
        "(?i)a",
        "(?P<n>a)",
        "(?P=n)",
        "(a)\\1",
        "(?<=a)b",
        "(?<!a)b",
        "(?>a)",
        "(?#c)",
        "(?(1)a|b)",
        "(?i:a)",
        "(*FAIL)",
        /* escapes */
        "\\Z",
        "\\z",
        "\\B",
        "\\n",
        "\\t",
        "\\x41",
        "\\u0041",
        "\\0",
        "\\Qa\\E",
        "\\K",
        "[\\b]",
        "[\\n]",
        "a\\",
        /* repeats */
        "a*+",
        "a++",
        "a?+",
        "a**",
        "a{2}{3}",
        "a{,3}",
        "a{ 2}",
        "a{2, 3}",
        "a{x}",
        "a{",
        "a}",
        "{",
        "*a",
        "^*",
        "$?",
        "\\b+",
        "(?=a)*",
        "(?!a){2}",
        "a{3,2}",
        "a{1001}",
        "a{99999999999999999999}",
        "(*)",
        "(|*)",
        /* repeats of what can match nothing */
        "(a*)*",
        "(a|)+",
        "()?",
        "(?:a?b?)+",
        "(?:(a*))*",
        "(?:^)*",
        "(?:a|b{0})*",
        /* classes */
        "[[a]",
        "[[:alpha:]]",
        "[a--b]",
        "[a&&b]",
        "[a||b]",
        "[a~~b]",
        "[+--]",
        "[\\w-a]",
        "[!-/]",
        "[a-\\d]",
        "[\\.-a]",
        "[_-z]",
        "[",
        "[]",
        "[^]",
        "[a",
        "[a-",
        "[\\",
        "]",
        /* not printable ASCII */
        "\xc3\xa9",
        "[\xc3\xa9]",
        "\n",
        "a\x7f",
        "\\\xc3\xa9",
        "[\t]",
        /* not balanced */
        "(",
        ")",
        "(a",
        "a)",
        "(?",
        "(?:",
        "a|)",
    };
    for (size_t i = 0; i < COUNT(outside); i++)
        if (!CHECK(required(outside[i]) == NULL))
            fprintf(stderr, "  for '%s'\n", outside[i]);
}

static void
test_groups_may_be_fifty_deep_and_no_deeper(void)
{
    char pattern[200] = "";
    for (int i = 0; i < 51; i++) {
        pattern[i] = '(';
        pattern[51 + i] = ')';
    }
    CHECK(required(pattern) == NULL);
    CHECK(required("(((((((((((((((((((((((((((((((((((((((((((((((((("
                   "))))))))))))))))))))))))))))))))))))))))))))))))))") != NULL);
}

static void
test_the_longest_run_of_certain_characters_is_required(void)
{
    CHECK_TEXT_EQ(required(".*\\.self_attn\\.[qkv]_proj\\.weight$"), "_proj.weight");
    CHECK_TEXT_EQ(required("lm_head"), "lm_head");
    CHECK_TEXT_EQ(required(".*"), "");
    CHECK_TEXT_EQ(required("ab\\.c.def"), "ab.c");
    CHECK_TEXT_EQ(required("abc.def"), "abc");
    CHECK_TEXT_EQ(required("a.bcd.ef"), "bcd");
    CHECK_TEXT_EQ(required("^abc$"), "abc");
}

static void
test_a_repeated_character_is_required_only_when_it_must_occur(void)
{
    CHECK_TEXT_EQ(required("abcx?y"), "abc");
    CHECK_TEXT_EQ(required("abcx*"), "abc");
    CHECK_TEXT_EQ(required("abcx{0,3}"), "abc");
    CHECK_TEXT_EQ(required("abcx*?xyzw"), "xyzw");
    CHECK_TEXT_EQ(required("ab+c"), "ab");
    CHECK_TEXT_EQ(required("ab{2}cde"), "cde");
    CHECK_TEXT_EQ(required("x?"), "");
    CHECK_TEXT_EQ(required("x?y"), "y");
}

static void
test_groups_classes_and_alternatives_require_nothing(void)
{
    CHECK_TEXT_EQ(required("ab(cdefg)hi"), "ab");
    CHECK_TEXT_EQ(required("ab(?:cdefg)?hij"), "hij");
    CHECK_TEXT_EQ(required("a(?=bcdef)b"), "a");
    CHECK_TEXT_EQ(required("(?!abc)d"), "d");
    CHECK_TEXT_EQ(required("[abc]d"), "d");
    CHECK_TEXT_EQ(required("abc|abd"), "");
    CHECK_TEXT_EQ(required("(abc|abd)ef"), "ef");
    CHECK_TEXT_EQ(required("abc|"), "");
}

int
main(void)
{
    RUN(test_what_both_engines_read_alike_is_in_the_subset);
    RUN(test_everything_else_is_left_to_python);
    RUN(test_groups_may_be_fifty_deep_and_no_deeper);
    RUN(test_the_longest_run_of_certain_characters_is_required);
    RUN(test_a_repeated_character_is_required_only_when_it_must_occur);
    RUN(test_groups_classes_and_alternatives_require_nothing);
    return check_result();
}
