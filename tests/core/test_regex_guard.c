/* SPDX-License-Identifier: Apache-2.0 */
#include "regex_fixture.h"

/* Python is never asked, because it would not come back. */
static void
check_guarded(const char *pattern, const char *subject)
{
    tp_error err = TP_NO_ERROR;
    witness python = {.answer = 1};
    const tp_matcher fallback = matcher_of(&python);
    tp_regex *regex = NULL;
    bool matched = true;
    CHECK_OK(tp_regex_new(pattern, &fallback, &regex, &err), &err);
    const clock_t start = clock();
    CHECK_INT_EQ(match_text(regex, subject, strlen(subject), &matched, &err), -1);
    CHECK(clock() - start < CLOCKS_PER_SEC);
    CHECK(!matched);
    CHECK_INT_EQ(err.code, TP_LIMIT);
    CHECK_TEXT_HAS(tp_error_text(&err), pattern);
    CHECK_TEXT_HAS(tp_error_text(&err), subject);
    if (!CHECK_INT_EQ(python.asked, 0))
        fprintf(stderr, "  for '%s'\n", pattern);
    tp_error_clear(&err);
    tp_regex_free(regex);
}

static void
test_a_runaway_pattern_is_an_error_before_python_is_asked(void)
{
    static const char *const runaway[] = {
        "(?i)(\\w+)*[xy]", "(a*)*b",           "(?:(?:a*)*)*b",       "(?P<all>a+)+$",
        "(a|a?)+$",        "(?s)(.*)*x",       "(?i:(a+)+)$",         "(?x) (a +)+ $",
        "(a+)+\\Z",        "(?<!x)(a+)+$",     "(?:(a)|b)*\\1(a+)+$", "(a{0,9})*b",
        "(a?){30}a{30}!b", "(\\u0061+)+\\x42", "(?(1)b|(a+)+$)",
    };
    for (size_t i = 0; i < COUNT(runaway); i++)
        check_guarded(runaway[i], "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!");
}

static void
test_a_native_pattern_that_runs_away_on_other_letters_is_an_error_as_well(void)
{
    static const char letters[] =
        "\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9"
        "\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9"
        "\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9"
        "\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9"
        "\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9";
    check_guarded("(\\w+)*[xy]", letters);
    check_guarded("(\\w+\\.?)+$\\b[xy]", letters);
    check_guarded(".*.*.*.*.*.*.*.*[xy]", letters);
    check_guarded("(a+)+$", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\xc3\xa9");
}

static void
test_whatever_else_the_guard_says_python_decides(void)
{
    /* Refused by PCRE2, not matched by it, and no UTF-8. */
    static const char *const patterns[] = {"\\N{DIGIT ONE}", "(?i)b", "(?i)a"};
    static const char *const subjects[] = {"1", "a", "a\xff"};
    for (size_t i = 0; i < COUNT(patterns); i++) {
        tp_error err = TP_NO_ERROR;
        witness python = {.answer = 1};
        const tp_matcher fallback = matcher_of(&python);
        tp_regex *regex = NULL;
        bool matched = false;
        CHECK_OK(tp_regex_new(patterns[i], &fallback, &regex, &err), &err);
        CHECK_OK(match_text(regex, subjects[i], strlen(subjects[i]), &matched, &err),
                 &err);
        CHECK(matched);
        CHECK_INT_EQ(python.asked, 1);
        tp_regex_free(regex);
    }
}

static void
test_what_pcre2_does_not_read_may_have_one_repeat(void)
{
    static const struct {
        const char *pattern;
        bool refused;
    } cases[] = {
        {"\\N{DIGIT ONE}", false},         {"\\N{DIGIT ONE}a*", false},
        {"\\N{DIGIT ONE}a{3}b{3}", false}, {"\\N{DIGIT ONE}a*b", false},
        {"\\N{DIGIT ONE}a*b*", true},      {"\\N{DIGIT ONE}(a|b)*", true},
        {"\\N{DIGIT ONE}a{3}b*", true},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        tp_error err = TP_NO_ERROR;
        witness python = {.answer = 1};
        const tp_matcher fallback = matcher_of(&python);
        tp_regex *regex = NULL;
        if (cases[i].refused)
            CHECK_FAILS(tp_regex_new(cases[i].pattern, &fallback, &regex, &err),
                        TP_VALUE, &err, "may backtrack without end");
        else
            CHECK_OK(tp_regex_new(cases[i].pattern, &fallback, &regex, &err), &err);
        CHECK((regex == NULL) == cases[i].refused);
        CHECK((python.released > 0) || !cases[i].refused);
        tp_regex_free(regex);
    }
}

static void
test_what_only_python_repeats_takes_steps_as_well(void)
{
    tp_error err = TP_NO_ERROR;
    witness python = {.answer = 1};
    const tp_matcher fallback = matcher_of(&python);
    tp_regex *regex = NULL;
    bool matched = false;
    char subject[2000];
    memset(subject, 'a', sizeof(subject));
    CHECK_FAILS(tp_regex_new("(?:(?=a){65535}){65535}", &fallback, &regex, &err),
                TP_VALUE, &err, "repeats groups at least 50000 times");
    CHECK_FAILS(tp_regex_new("(?:(?:(?:){30}){30}){2}", &fallback, &regex, &err),
                TP_VALUE, &err, "repeats groups 1800 times");
    CHECK_OK(tp_regex_new("(?:(?=a){500}a)*", &fallback, &regex, &err), &err);
    CHECK_OK(match_text(regex, subject, 3, &matched, &err), &err);
    CHECK_INT_EQ(python.asked, 1);
    CHECK_FAILS(match_text(regex, subject, sizeof(subject), &matched, &err), TP_LIMIT,
                &err, "too many steps");
    CHECK_INT_EQ(python.asked, 1);
    tp_regex_free(regex);
}

static void
test_a_search_that_needs_more_memory_than_a_bound_is_an_error(void)
{
    /* Each step back keeps the places of 3,000 groups. */
    enum { GROUPS = 3000, LETTERS = 8000 };
    static char pattern[16 + 4 * GROUPS], subject[LETTERS + 1];
    size_t used = (size_t)snprintf(pattern, sizeof(pattern), "(?i)(?:a|b)*c");
    for (int i = 0; i < GROUPS; i++)
        used += (size_t)snprintf(pattern + used, sizeof(pattern) - used, "(x)");
    memset(subject, 'a', LETTERS);

    tp_error err = TP_NO_ERROR;
    witness python = {.answer = 1};
    const tp_matcher fallback = matcher_of(&python);
    tp_regex *regex = NULL;
    bool matched = true;
    CHECK_OK(tp_regex_new(pattern, &fallback, &regex, &err), &err);
    CHECK_FAILS(match_text(regex, subject, LETTERS, &matched, &err), TP_LIMIT, &err,
                "(?i)(?:a|b)*c");
    CHECK_INT_EQ(python.asked, 0);
    tp_regex_free(regex);
}

static void
test_a_fallback_that_needs_too_many_long_matches_is_not_asked(void)
{
    tp_error err = TP_NO_ERROR;
    witness python = {.answer = 1};
    const tp_matcher fallback = matcher_of(&python);
    tp_regex *regex = NULL;
    bool matched = true;
    const char *text = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!";
    const tp_subject subject = tp_subject_of(text, strlen(text));
    tp_long_matches matches = {1};
    CHECK_OK(tp_regex_new("(?i)A*A*A*[xy]", &fallback, &regex, &err), &err);
    CHECK_INT_EQ(tp_regex_match_counted(regex, &subject, &matches, &matched, &err), 0);
    CHECK_INT_EQ(matches.left, 0);
    CHECK_INT_EQ(python.asked, 1);
    CHECK_FAILS(tp_regex_match_counted(regex, &subject, &matches, &matched, &err),
                TP_LIMIT, &err, "all long matches of the plan together");
    CHECK_INT_EQ(python.asked, 1);
    tp_regex_free(regex);
}

int
main(void)
{
    RUN(test_a_runaway_pattern_is_an_error_before_python_is_asked);
    RUN(test_a_native_pattern_that_runs_away_on_other_letters_is_an_error_as_well);
    RUN(test_whatever_else_the_guard_says_python_decides);
    RUN(test_what_pcre2_does_not_read_may_have_one_repeat);
    RUN(test_what_only_python_repeats_takes_steps_as_well);
    RUN(test_a_search_that_needs_more_memory_than_a_bound_is_an_error);
    RUN(test_a_fallback_that_needs_too_many_long_matches_is_not_asked);
    return check_result();
}
