/* SPDX-License-Identifier: Apache-2.0 */
#include "regex_fixture.h"

/* 1, 0, or -1 for an error, which is cleared. */
static int
match_size(const char *pattern, const char *subject, size_t size)
{
    tp_error err = TP_NO_ERROR;
    tp_regex *regex = NULL;
    bool matched = false;
    int result = -1;
    if (CHECK_OK(tp_regex_new(pattern, NULL, &regex, &err), &err) &&
        CHECK_OK(match_text(regex, subject, size, &matched, &err), &err))
        result = matched;
    tp_regex_free(regex);
    return result;
}

static int
match(const char *pattern, const char *subject)
{
    return match_size(pattern, subject, strlen(subject));
}

static void
test_results_are_those_of_re_match(void)
{
    static const struct {
        const char *pattern;
        const char *subject;
        int matched;
    } cases[] = {
        {"", "", 1},
        {"", "a", 1},
        {"a", "", 0},
        {"weight", "weight.more", 1},
        {"weight", "a.weight", 0},
        {".*\\.q_proj\\.weight$", "model.layers.0.self_attn.q_proj.weight", 1},
        {".*\\.q_proj\\.weight$", "model.layers.0.self_attn.q_proj.weights", 0},
        {".*\\.q_proj\\.weight$", "model.layers.0.self_attn.q_projXweight", 0},
        {"a.c", "a.c", 1},
        {"a|b", "b", 1},
        {"xa|b", "ab", 0},
        {"(?:xa|b)c", "bc", 1},
        {"a$|b", "ab", 0},
        {"(?!model)\\w+", "model", 0},
        {"(?=a)b*a$", "a", 1}, /* what PCRE2's start optimisation gets wrong */
        {"a\\b", "a.b", 1},
        {"a\\b", "ab", 0},
        {"[]a]+$", "]a]", 1},
        {"[^]a]", "]", 0},
        {"[\\w-]+$", "a-b", 1},
        {"[a-c-e]+$", "b-e", 1},
        {"[a-c-e]+$", "d", 0},
        {"a{2,3}$", "aa", 1},
        {"a{2,3}$", "aaaa", 0},
        {"a{0}b", "b", 1},
        {"(a+?)(b)??$", "aab", 1},
        {"\\.\\-\\_\\ ", ".-_ ", 1},
    };
    for (size_t i = 0; i < COUNT(cases); i++)
        if (!CHECK_INT_EQ(match(cases[i].pattern, cases[i].subject), cases[i].matched))
            fprintf(stderr, "  for '%s' on '%s'\n", cases[i].pattern, cases[i].subject);
}

static void
test_an_end_is_also_before_a_last_newline_and_a_dot_is_no_newline(void)
{
    CHECK_INT_EQ(match("a$", "a\n"), 1);
    CHECK_INT_EQ(match("a$", "a\n\n"), 0);
    CHECK_INT_EQ(match("a.b", "a\nb"), 0);
    CHECK_INT_EQ(match("a.b", "a\rb"), 1);
}

static void
test_only_the_given_bytes_of_a_subject_are_read(void)
{
    CHECK_INT_EQ(match_size("ab", "abc", 1), 0);
    CHECK_INT_EQ(match_size("ab$", "abc", 2), 1);
    /* No terminator: a read behind the end is an error under ASan. */
    char *exact = malloc(40);
    if (!CHECK(exact != NULL))
        return;
    memset(exact, 'w', 40);
    CHECK_INT_EQ(match_size("\\w+$", exact, 40), 1);
    CHECK_INT_EQ(match_size("w{40}w", exact, 40), 0);
    free(exact);
}

static void
test_a_native_pattern_asks_python_only_about_other_than_printable_ascii(void)
{
    tp_error err = TP_NO_ERROR;
    witness python = {.answer = 1};
    const tp_matcher fallback = matcher_of(&python);
    tp_regex *regex = NULL;
    bool matched = false;
    CHECK_OK(tp_regex_new("a.b$", &fallback, &regex, &err), &err);
    python.released = 0; /* of attempts that failed */
    CHECK(tp_regex_is_native(regex));
    CHECK_TEXT_EQ(tp_regex_pattern(regex), "a.b$");

    CHECK_OK(match_text(regex, "a~b", 3, &matched, &err), &err);
    CHECK(matched);
    CHECK_OK(match_text(regex, "a bc", 4, &matched, &err), &err);
    CHECK(!matched);
    CHECK_INT_EQ(python.asked, 0);

    static const char *const other[] = {
        "a\xc3\xa9"
        "b",
        "axb\n",
        "a\x7f"
        "b",
        "a\x1f"
        "b"};
    for (size_t i = 0; i < COUNT(other); i++) {
        CHECK_OK(match_text(regex, other[i], strlen(other[i]), &matched, &err), &err);
        CHECK(matched);
        CHECK_INT_EQ(python.asked, i + 1);
    }
    CHECK_OK(match_text(regex, "a\0b", 3, &matched, &err), &err);
    CHECK_INT_EQ(python.asked, COUNT(other) + 1);
    CHECK_INT_EQ(python.released, 0);
    tp_regex_free(regex);
    CHECK_INT_EQ(python.released, 1);
}

static void
test_a_pattern_outside_the_subset_is_python_alone(void)
{
    tp_error err = TP_NO_ERROR;
    witness python = {.answer = 0};
    const tp_matcher fallback = matcher_of(&python);
    tp_regex *regex = NULL;
    bool matched = true;
    CHECK_OK(tp_regex_new("(?i)A", &fallback, &regex, &err), &err);
    python.released = 0; /* of attempts that failed */
    CHECK(!tp_regex_is_native(regex));
    CHECK_OK(match_text(regex, "a", 1, &matched, &err), &err);
    CHECK(!matched);
    python.answer = 1;
    CHECK_OK(match_text(regex, "a", 1, &matched, &err), &err);
    CHECK(matched);
    CHECK_INT_EQ(python.asked, 2);

    python.answer = -1;
    CHECK_FAILS(match_text(regex, "a", 1, &matched, &err), TP_RAISED, &err, "raised");
    CHECK(!matched);
    tp_regex_free(regex);
    CHECK_INT_EQ(python.released, 1);
}

static void
test_a_pattern_too_large_for_pcre2_is_left_to_python(void)
{
    tp_error err = TP_NO_ERROR;
    witness python = {.answer = 1};
    const tp_matcher fallback = matcher_of(&python);
    tp_regex *regex = NULL;
    const char *pattern =
        "(?:(?:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa){30}u){30}";
    CHECK_OK(tp_regex_new(pattern, &fallback, &regex, &err), &err);
    python.released = 0; /* of attempts that failed */
    CHECK(!tp_regex_is_native(regex));
    tp_regex_free(regex);
    CHECK_INT_EQ(python.released, 1);
}

static void
test_without_python_a_pattern_outside_the_subset_is_refused(void)
{
    tp_error err = TP_NO_ERROR;
    tp_regex *regex = NULL;
    CHECK_FAILS(tp_regex_new("(?i)a", NULL, &regex, &err), TP_BUG, &err, "'(?i)a'");
    CHECK(regex == NULL);
    CHECK_FAILS(tp_regex_new("(a", NULL, &regex, &err), TP_BUG, &err, "'(a'");
    tp_regex_free(NULL);
}

static void
test_a_runaway_pattern_is_an_error_within_a_second(void)
{
    static const char *const runaway[] = {
        "(\\w+)*[xy]",       "(\\w+\\.?)+$\\b[xy]", "(a|a)*[xy]",
        "(?:a|aa)+[xy]",     "(?:(?:a+)+)+[xy]",    "\\w*\\w*\\w*\\w*\\w*\\w*[xy]",
        "(.+)+[xy]",         "(?:a+?)+?[xy]",       "(?:a{1,9}){1,50}[xy]",
        "(?=(?:a+)+[xy])aa", "(?!(?:a+)+[xy])aa",
    };
    static const size_t sizes[] = {60, 400};
    char subject[401];
    memset(subject, 'a', 400);
    subject[400] = '\0';
    for (size_t i = 0; i < COUNT(runaway); i++) {
        for (size_t j = 0; j < COUNT(sizes); j++) {
            tp_error err = TP_NO_ERROR;
            tp_regex *regex = NULL;
            bool matched = true;
            CHECK_OK(tp_regex_new(runaway[i], NULL, &regex, &err), &err);
            const clock_t start = clock();
            CHECK_INT_EQ(match_text(regex, subject, sizes[j], &matched, &err), -1);
            CHECK(clock() - start < CLOCKS_PER_SEC);
            CHECK(!matched);
            CHECK_INT_EQ(err.code, TP_LIMIT);
            CHECK_TEXT_HAS(tp_error_text(&err), runaway[i]);
            CHECK_TEXT_HAS(tp_error_text(&err), "'aaaaaaaaaa");
            tp_error_clear(&err);
            tp_regex_free(regex);
        }
    }
}

static void
test_a_missing_required_text_ends_a_runaway_pattern_before_it_starts(void)
{
    CHECK_INT_EQ(match("(\\w+)*xy", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"),
                 0);
}

static void
test_a_deep_match_needs_no_deep_stack(void)
{
    /* More than the 32 KiB on which JIT code runs. */
    const size_t size = 20000;
    char *subject = malloc(size);
    if (!CHECK(subject != NULL))
        return;
    for (size_t i = 0; i < size; i++)
        subject[i] = i % 2 == 0 ? 'a' : '.';
    CHECK_INT_EQ(match_size("(?:\\w\\.|b)*$", subject, size), 1);
    CHECK_INT_EQ(match_size("(?:\\w\\.|b)*$", subject, size - 1), 0);
    free(subject);
}

static void
test_a_long_pattern_and_a_long_subject_are_truncated_in_messages(void)
{
    tp_error err = TP_NO_ERROR;
    tp_regex *regex = NULL;
    bool matched;
    char subject[5000];
    memset(subject, 'a', sizeof(subject));
    CHECK_OK(tp_regex_new("(\\w+)*[xy]", NULL, &regex, &err), &err);
    CHECK_INT_EQ(match_text(regex, subject, sizeof(subject), &matched, &err), -1);
    CHECK(strlen(tp_error_text(&err)) < 600);
    tp_error_clear(&err);
    tp_regex_free(regex);
}

static void
test_a_pattern_has_a_longest_size(void)
{
    enum { MOST = 65536 };
    tp_error err = TP_NO_ERROR;
    char *pattern = malloc(MOST + 2);
    if (!CHECK(pattern != NULL))
        return;
    memset(pattern, 'a', MOST + 1);
    pattern[MOST + 1] = '\0';
    CHECK_FAILS(tp_regex_check_size(pattern, &err), TP_VALUE, &err,
                "has 65537 bytes, expected at most 65536");
    pattern[MOST] = '\0';
    CHECK_OK(tp_regex_check_size(pattern, &err), &err);
    free(pattern);
}

static void
test_a_subject_has_a_longest_size(void)
{
    enum { MOST = 32768 };
    tp_error err = TP_NO_ERROR;
    tp_regex *regex = NULL;
    bool matched = false;
    char *subject = malloc(MOST + 1);
    if (!CHECK(subject != NULL))
        return;
    memset(subject, 'a', MOST + 1);
    CHECK_OK(tp_regex_new("a+$", NULL, &regex, &err), &err);
    CHECK_OK(match_text(regex, subject, MOST, &matched, &err), &err);
    CHECK(matched);
    CHECK_FAILS(match_text(regex, subject, MOST + 1, &matched, &err), TP_VALUE, &err,
                "of 32769 bytes, expected a name of at most 32768");
    CHECK(!matched);
    tp_regex_free(regex);
    free(subject);
}

/* What is left of `left` after one match, which fails with `text` unless that is NULL.
 */
static int
left_after(const char *pattern, const char *subject, int left, const char *text)
{
    tp_error err = TP_NO_ERROR;
    tp_regex *regex = NULL;
    tp_long_matches matches = {left};
    bool matched = false;
    CHECK_OK(tp_regex_new(pattern, NULL, &regex, &err), &err);
    const tp_subject at = tp_subject_of(subject, strlen(subject));
    const int result = tp_regex_match_counted(regex, &at, &matches, &matched, &err);
    if (text == NULL)
        CHECK_OK(result, &err);
    else
        CHECK_FAILS(result, TP_LIMIT, &err, text);
    tp_regex_free(regex);
    return matches.left;
}

static void
test_long_matches_are_counted_by_their_steps_and_refused_when_too_many(void)
{
    static const char text[] =
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!";
    static const char together[] = "all long matches of the plan together";
    CHECK_INT_EQ(left_after("a+!$", text, 20, NULL), 20);
    /* More than 2,500 steps, more than 25,000, more than 250,000. */
    CHECK_INT_EQ(left_after("a*a*a*[xy]", text, 20, NULL), 19);
    CHECK_INT_EQ(left_after("a*a*a*[xy]", text, 0, together), 0);
    CHECK_INT_EQ(left_after("a*a*a*a*[xy]", text, 20, NULL), 9);
    CHECK_INT_EQ(left_after("a*a*a*a*[xy]", text, 10, together), 9);
    CHECK_INT_EQ(left_after("(?:a+)+[xy]", text, 200, "after too many steps"), 89);
}

int
main(void)
{
    RUN(test_results_are_those_of_re_match);
    RUN(test_an_end_is_also_before_a_last_newline_and_a_dot_is_no_newline);
    RUN(test_only_the_given_bytes_of_a_subject_are_read);
    RUN(test_a_native_pattern_asks_python_only_about_other_than_printable_ascii);
    RUN(test_a_pattern_outside_the_subset_is_python_alone);
    RUN(test_a_pattern_too_large_for_pcre2_is_left_to_python);
    RUN(test_without_python_a_pattern_outside_the_subset_is_refused);
    RUN(test_a_runaway_pattern_is_an_error_within_a_second);
    RUN(test_a_missing_required_text_ends_a_runaway_pattern_before_it_starts);
    RUN(test_a_deep_match_needs_no_deep_stack);
    RUN(test_a_long_pattern_and_a_long_subject_are_truncated_in_messages);
    RUN(test_a_pattern_has_a_longest_size);
    RUN(test_a_subject_has_a_longest_size);
    RUN(test_long_matches_are_counted_by_their_steps_and_refused_when_too_many);
    return check_result();
}
