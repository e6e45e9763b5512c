/* SPDX-License-Identifier: Apache-2.0 */
#include "base/map.h"

#include <stdint.h>
#include <stdlib.h>

#include "check.h"

static void
test_a_key_is_found_by_its_first_bytes(void)
{
    tp_error err = TP_NO_ERROR;
    tp_map *map = NULL;
    CHECK_OK(tp_map_new(4, &map, &err), &err);
    CHECK_INT_EQ(tp_map_add(map, "model.layers", 7, &err), 7);
    CHECK_INT_EQ(tp_map_add(map, "model", 3, &err), 3);
    CHECK_INT_EQ(tp_map_find(map, "model.layers.0", 12), 7);
    CHECK_INT_EQ(tp_map_find(map, "model.layers.0", 5), 3);
    CHECK_INT_EQ(tp_map_find(map, "model.layers.0", 6), -1);
    CHECK_INT_EQ(tp_map_find(map, "model.layers.0", 14), -1);
    tp_map_free(map);
}

static void
test_the_empty_key_is_a_key(void)
{
    tp_error err = TP_NO_ERROR;
    tp_map *map = NULL;
    CHECK_OK(tp_map_new(0, &map, &err), &err);
    CHECK_INT_EQ(tp_map_find(map, "", 0), -1);
    CHECK_INT_EQ(tp_map_add(map, "", 0, &err), 0);
    CHECK_INT_EQ(tp_map_find(map, "x", 0), 0);
    tp_map_free(map);
}

static void
test_a_key_that_is_there_keeps_its_value_and_says_so(void)
{
    tp_error err = TP_NO_ERROR;
    tp_map *map = NULL;
    const char again[] = "a";
    CHECK_OK(tp_map_new(1, &map, &err), &err);
    CHECK_INT_EQ(tp_map_add(map, "a", 1, &err), 1);
    CHECK_INT_EQ(tp_map_add(map, again, 2, &err), 1);
    CHECK_INT_EQ(tp_map_add(map, "ab", 2, &err), 2);
    CHECK_INT_EQ(tp_map_find(map, "a", 1), 1);
    tp_map_free(map);
}

static void
test_a_map_grows_past_its_room_and_loses_nothing(void)
{
    enum { KEYS = 20000 };
    static char keys[KEYS][32];
    tp_error err = TP_NO_ERROR;
    tp_map *map = NULL;
    CHECK_OK(tp_map_new(1, &map, &err), &err);
    for (int i = 0; i < KEYS; i++) {
        snprintf(keys[i], sizeof(keys[i]), "layers.%d.weight", i);
        if (!CHECK_INT_EQ(tp_map_add(map, keys[i], i, &err), i))
            break;
    }
    for (int i = 0; i < KEYS; i++)
        if (!CHECK_INT_EQ(tp_map_find(map, keys[i], strlen(keys[i])), i))
            break;
    CHECK_INT_EQ(tp_map_find(map, "layers.20000.weight", 19), -1);
    tp_map_free(map);
}

static void
test_more_keys_than_memory_can_hold_is_out_of_memory(void)
{
    tp_error err = TP_NO_ERROR;
    tp_map *map = NULL;
    CHECK_FAILS(tp_map_new(SIZE_MAX / 2, &map, &err), TP_MEMORY, &err, "memory");
    CHECK(map == NULL);
    tp_map_free(NULL);
}

static void
test_a_map_that_cannot_grow_keeps_what_it_has(void)
{
    static char keys[100][24];
    tp_error err = TP_NO_ERROR;
    tp_map *map = NULL;
    CHECK_OK(tp_map_new(0, &map, &err), &err);
    for (int i = 0; i < 100; i++) {
        snprintf(keys[i], sizeof(keys[i]), "layers.%d", i);
        CHECK_OK(tp_map_add(map, keys[i], i, &err) < 0 ? -1 : 0, &err);
    }
    for (int i = 0; i < 100; i++)
        CHECK_INT_EQ(tp_map_find(map, keys[i], strlen(keys[i])), i);
    tp_map_free(map);
}

int
main(void)
{
    RUN(test_a_key_is_found_by_its_first_bytes);
    RUN(test_the_empty_key_is_a_key);
    RUN(test_a_key_that_is_there_keeps_its_value_and_says_so);
    RUN(test_a_map_grows_past_its_room_and_loses_nothing);
    RUN(test_more_keys_than_memory_can_hold_is_out_of_memory);
    RUN(test_a_map_that_cannot_grow_keeps_what_it_has);
    return check_result();
}
