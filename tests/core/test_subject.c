/* SPDX-License-Identifier: Apache-2.0 */
#include "rules/subject.h"

#include "check.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static void
test_pairs_tell_their_letters_apart(void)
{
    int found = 0;
    for (char letter = 'a'; letter <= 'z'; letter++) {
        CHECK(tp_pairs_of('.', letter) != 0);
        found += tp_pairs_of('.', letter) != tp_pairs_of(letter, '.');
    }
    /* One pair of letters in 64 may share its bit. */
    CHECK(found > 20);
}

static void
test_a_subject_has_the_pairs_of_what_it_contains(void)
{
    const char *const name = "model.layers.0.self_attn.q_proj.weight";
    const tp_pairs pairs = tp_subject_of(name, strlen(name)).pairs;
    for (size_t i = 0; i < strlen(name); i++)
        for (size_t size = 0; i + size <= strlen(name); size++)
            CHECK((tp_subject_of(name + i, size).pairs & ~pairs) == 0);
    CHECK((tp_subject_of("mlp", 3).pairs & ~pairs) != 0);
    CHECK(tp_subject_of("", 0).pairs == 0);
    CHECK(tp_subject_of("a", 1).pairs == 0);
}

static void
test_printable_ascii_alone_is_printable(void)
{
    CHECK(tp_subject_of("", 0).printable);
    CHECK(tp_subject_of(" ~", 2).printable);
    CHECK(!tp_subject_of("a\0b", 3).printable);
    CHECK(!tp_subject_of("a\n", 2).printable);
    CHECK(!tp_subject_of("\x7f", 1).printable);
    CHECK(!tp_subject_of("caf\xc3\xa9", 5).printable);
}

static void
test_a_subject_may_continue_another(void)
{
    const tp_subject module = tp_subject_of("model.up", 8);
    const char *const longer[] = {"model.up.weight",    "model.up",
                                  "model.u\x7f.weight", "model",
                                  "caf\xc3\xa9",        ""};
    for (size_t i = 0; i < COUNT(longer); i++) {
        const size_t size = strlen(longer[i]);
        const tp_subject wanted = tp_subject_of(longer[i], size);
        const tp_subject got = tp_subject_after(&module, longer[i], size);
        CHECK(got.text == longer[i] && got.size == size);
        CHECK(got.pairs == wanted.pairs && got.printable == wanted.printable);
    }
    const tp_subject strange = tp_subject_of("a\x7f", 2);
    CHECK(!tp_subject_after(&strange, "a\x7f.b", 4).printable);
}

int
main(void)
{
    RUN(test_pairs_tell_their_letters_apart);
    RUN(test_a_subject_has_the_pairs_of_what_it_contains);
    RUN(test_printable_ascii_alone_is_printable);
    RUN(test_a_subject_may_continue_another);
    return check_result();
}
