/* SPDX-License-Identifier: Apache-2.0 */
/* Names: indices as stars, what adapters make of them, and near ones. */
#include "base/did_you_mean.h"
#include "base/dtype.h"
#include "base/map.h"
#include "input.h"
#include "model/adapters.h"
#include "model/names.h"

enum { MOST_NAMES = 8 };

/* A name and its pattern, which is the pattern of itself. */
static void
check_pattern(const char *name, char *pattern)
{
    char *again = malloc(strlen(name) + 1);
    REQUIRE(again != NULL);
    tp_names_pattern(name, pattern);
    tp_names_pattern(pattern, again);
    REQUIRE(strlen(pattern) <= strlen(name) && strcmp(pattern, again) == 0);
    free(again);
}

static void
check_two(const char *a, const char *b)
{
    char *pattern_a = malloc(strlen(a) + 1), *pattern_b = malloc(strlen(b) + 1);
    REQUIRE(pattern_a != NULL && pattern_b != NULL);
    check_pattern(a, pattern_a);
    check_pattern(b, pattern_b);
    /* "*" in a name is no index. */
    if (strchr(a, '*') == NULL && strchr(b, '*') == NULL)
        REQUIRE(tp_names_are_alike(a, b) == (strcmp(pattern_a, pattern_b) == 0));
    REQUIRE(tp_names_are_alike(a, b) == tp_names_are_alike(b, a));
    free(pattern_a);
    free(pattern_b);
}

/* A name without the parts of adapters is no longer than it was, and is the name
 * itself where it has none. */
static void
check_adapters(const char *name)
{
    char room[TP_LONGEST_NAME], small[8];
    tp_adapted part;
    const char *plain = tp_adapters_plain(name, room, &part);
    REQUIRE(strlen(plain) <= strlen(name));
    REQUIRE((part == TP_ADAPTED_NONE) == (plain == name));
    tp_adapters_name(name, small, sizeof(small));
    REQUIRE(strlen(small) < sizeof(small));
    tp_adapters_is_copy(name);
    tp_adapters_is_list(name);
    REQUIRE(strstr(name, tp_names_leaf(name)) != NULL);
}

static void
check_near(const char *name, const char *const *names, int count)
{
    int found[MOST_NAMES];
    tp_text text = TP_NO_TEXT;
    for (int limit = 0; limit <= 3; limit++) {
        const int near = tp_did_you_mean(name, names, count, limit, found);
        REQUIRE(near >= 0 && near <= limit && near <= count);
        for (int i = 0; i < near; i++) {
            REQUIRE(found[i] >= 0 && found[i] < count);
            for (int k = 0; k < i; k++)
                REQUIRE(found[k] != found[i]);
        }
        for (int i = 0; i < count && limit > 0 && strlen(name) <= 128; i++)
            if (strcmp(name, names[i]) == 0)
                REQUIRE(near > 0 && tp_text_same(names[found[0]], name));
    }
    tp_did_you_mean_add(&text, name, names, count);
    REQUIRE(!text.failed);
    tp_text_free(&text);
}

/* A map finds what was added, and the first value of a name that comes twice. */
static void
check_map(const char *const *names, int count)
{
    tp_error err = TP_NO_ERROR;
    tp_map *map = NULL;
    REQUIRE(tp_map_new(0, &map, &err) == 0);
    for (int i = 0; i < count; i++) {
        const int before = tp_map_find(map, names[i], strlen(names[i]));
        REQUIRE(tp_map_add(map, names[i], i, &err) == (before < 0 ? i : before));
    }
    tp_map_free(map);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = input_of(data, size);
    tp_error err = TP_NO_ERROR;
    const char *names[MOST_NAMES] = {""}, *dtype = NULL;
    int count = 0;
    while (in.left > 0 && count < MOST_NAMES)
        names[count++] = take_line(&in);
    for (int i = 0; i < count; i++) {
        check_two(names[0], names[i]);
        check_adapters(names[i]);
    }
    check_near(names[0], names + 1, count > 0 ? count - 1 : 0);
    check_map(names, count);
    if (is_done(tp_dtype_name(names[0], "dtype", &dtype, &err), &err)) {
        const char *again = NULL;
        REQUIRE(tp_dtype_name(dtype, "dtype", &again, &err) == 0 && again == dtype);
    }
    input_end(&in);
    return 0;
}
