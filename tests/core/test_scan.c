/* SPDX-License-Identifier: Apache-2.0 */
#include "rules/scan.h"

#include <stdarg.h>

#include "check.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static bool
is_inside(const char *pattern)
{
    tp_pairs required;
    return tp_scan(pattern, &required);
}

/* Whether `pattern` requires the pairs of all `count` texts, and nothing else. */
static bool requires(const char *pattern, int count, ...)
{
    tp_pairs required = 0, wanted = 0;
    va_list texts;
    va_start(texts, count);
    for (int i = 0; i < count; i++) {
        const char *text = va_arg(texts, const char *);
        for (; text[1] != '\0'; text++)
            wanted |= tp_pairs_of(text[0], text[1]);
    }
    va_end(texts);
    return tp_scan(pattern, &required) && required == wanted;
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
        if (!CHECK(is_inside(inside[i])))
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
        if (!CHECK(!is_inside(outside[i])))
            fprintf(stderr, "  for '%s'\n", outside[i]);
}

static void
test_groups_may_be_fifty_deep_and_no_deeper(void)
{
    for (int depth = 50; depth <= 51; depth++) {
        char pattern[200] = "";
        memset(pattern, '(', (size_t)depth);
        memset(pattern + depth, ')', (size_t)depth);
        CHECK_INT_EQ(is_inside(pattern), depth == 50);
    }
}

static void
test_certain_characters_in_a_row_are_required(void)
{
    CHECK(requires(".*\\.self_attn\\.[qkv]_proj\\.weight$", 2, ".self_attn.",
                   "_proj.weight"));
    CHECK(requires("lm_head", 1, "lm_head"));
    CHECK(requires(".*", 0));
    CHECK(requires("ab\\.c.def", 2, "ab.c", "def"));
    CHECK(requires("^abc$", 1, "abc"));
    CHECK(requires("a.b", 0));
    CHECK(requires("", 0));
}

static void
test_a_repeated_character_is_required_only_when_it_must_occur(void)
{
    CHECK(requires("abcx?y", 1, "abc"));
    CHECK(requires("abcx*", 1, "abc"));
    CHECK(requires("abcx{0,3}", 1, "abc"));
    CHECK(requires("abcx*?yz", 2, "abc", "yz"));
    CHECK(requires("ab+c", 1, "ab"));
    CHECK(requires("ab{2}cde", 2, "ab", "cde"));
    CHECK(requires("x?yz", 1, "yz"));
}

static void
test_groups_classes_and_alternatives_require_nothing(void)
{
    CHECK(requires("ab(cdefg)hi", 2, "ab", "hi"));
    CHECK(requires("ab(?:cdefg)?hij", 2, "ab", "hij"));
    CHECK(requires("ab(?=bcdef)cd", 2, "ab", "cd"));
    CHECK(requires("(?!abc)de", 1, "de"));
    CHECK(requires("[abc]de", 1, "de"));
    CHECK(requires("abc|abd", 0));
    CHECK(requires("(abc|abd)ef", 1, "ef"));
    CHECK(requires("abc|", 0));
}

int
main(void)
{
    RUN(test_what_both_engines_read_alike_is_in_the_subset);
    RUN(test_everything_else_is_left_to_python);
    RUN(test_groups_may_be_fifty_deep_and_no_deeper);
    RUN(test_certain_characters_in_a_row_are_required);
    RUN(test_a_repeated_character_is_required_only_when_it_must_occur);
    RUN(test_groups_classes_and_alternatives_require_nothing);
    return check_result();
}
