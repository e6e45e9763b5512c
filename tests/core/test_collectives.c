/* SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L

#include "shm_ranks.h"

/* Item `i` of message `round` of a rank: a number that sums exactly. */
static double
item_of(int rank, size_t i, int round)
{
    return (double)((i * 7 + (size_t)rank * 3 + (size_t)round) % 32) - 10;
}

static double
total_of(int ranks, size_t i, int round)
{
    double total = 0;
    for (int rank = 0; rank < ranks; rank++)
        total += item_of(rank, i, round);
    return total;
}

/* Messages of nothing, of less than a slot, of a slot, and of many. */
static size_t
count_of(int round)
{
    static const size_t counts[] = {1, 0, 7, 1024, 1023, 1025, 2048, 2049, 9000, 30000};
    return counts[(size_t)round % (sizeof(counts) / sizeof(counts[0]))];
}

static int
sum_floats(tp_shm *shm, int rank, int ranks)
{
    static float x[MOST];
    tp_error err = TP_NO_ERROR;

    for (int round = 0; round < 200; round++) {
        const size_t count = count_of(round);
        const tp_collective_message message = {x, count * sizeof(float), TP_SUM_F32,
                                               false};
        for (size_t i = 0; i < count; i++)
            x[i] = (float)item_of(rank, i, round);
        if (tp_collective_post(shm, &message, PATIENCE, &err) < 0)
            return 1;
        if (tp_collective_sum(shm, &message, 0, count, x, PATIENCE, &err) < 0)
            return 2;
        for (size_t i = 0; i < count; i++)
            if (x[i] != (float)total_of(ranks, i, round))
                return 3;
    }
    return 0;
}

static int
sum_doubles_for_each(tp_shm *shm, int rank, int ranks)
{
    static double x[MOST];
    static double own[MOST];
    tp_error err = TP_NO_ERROR;

    for (int round = 0; round < 40; round++) {
        const size_t count = count_of(round);
        const size_t first = count * (size_t)rank / (size_t)ranks;
        const size_t mine = count * (size_t)(rank + 1) / (size_t)ranks - first;
        const tp_collective_message message = {x, count * sizeof(double), TP_SUM_F64,
                                               false};
        for (size_t i = 0; i < count; i++)
            x[i] = item_of(rank, i, round);
        if (tp_collective_post(shm, &message, PATIENCE, &err) < 0)
            return 1;
        if (tp_collective_sum(shm, &message, first, mine, own, PATIENCE, &err) < 0)
            return 2;
        for (size_t i = 0; i < mine; i++)
            if (own[i] != total_of(ranks, first + i, round))
                return 3;
    }
    return 0;
}

static int
gather_floats(tp_shm *shm, int rank, int ranks)
{
    static float x[MOST];
    static float all[4 * MOST];
    tp_error err = TP_NO_ERROR;

    for (int round = 0; round < 40; round++) {
        const size_t count = count_of(round);
        const tp_collective_message message = {x, count * sizeof(float), TP_GATHER,
                                               false};
        for (size_t i = 0; i < count; i++)
            x[i] = (float)item_of(rank, i, round);
        if (tp_collective_post(shm, &message, PATIENCE, &err) < 0)
            return 1;
        if (tp_collective_gather(shm, &message, all, PATIENCE, &err) < 0)
            return 2;
        for (int from = 0; from < ranks; from++)
            for (size_t i = 0; i < count; i++)
                if (all[(size_t)from * count + i] != (float)item_of(from, i, round))
                    return 3;
    }
    return 0;
}

static void
test_every_rank_gets_the_sum_of_messages_of_any_length(void)
{
    for (int ranks = 2; ranks <= 4; ranks++)
        CHECK_INT_EQ(run_ranks(ranks, sum_floats), 0);
}

static void
test_a_rank_can_read_its_part_of_a_sum(void)
{
    for (int ranks = 2; ranks <= 4; ranks++)
        CHECK_INT_EQ(run_ranks(ranks, sum_doubles_for_each), 0);
}

static void
test_every_rank_gets_the_messages_of_all(void)
{
    for (int ranks = 2; ranks <= 4; ranks++)
        CHECK_INT_EQ(run_ranks(ranks, gather_floats), 0);
}

/* The bits of bfloat16 numbers and of their sum over three ranks. */
static int
sum_bf16_numbers(tp_shm *shm, int rank, int ranks)
{
    static const uint16_t given[3][5] = {
        {0x3f80, 0x4000, 0x7f80, 0x7fc1, 0x3f80}, /* 1, 2, inf, nan, 1 */
        {0x3b80, 0x3b00, 0xff80, 0x3f80, 0x3b80}, /* 2^-8, 2^-9, -inf, 1, 2^-8 */
        {0x0000, 0x3b00, 0x3f80, 0x3f80, 0x3b80}, /* 0, 2^-9, 1, 1, 2^-8 */
    };
    /* 1 + 2^-8 is a tie, which goes to the even 1; what float32 holds of 2 + 2^-8 goes
     * down to 2; 1 + 2^-7 is exact, where a sum in bfloat16 would have stayed at 1. */
    static const uint16_t expected[] = {0x3f80, 0x4000, 0x7fc0, 0x7fc0, 0x3f81};
    tp_error err = TP_NO_ERROR;
    uint16_t sum[5];
    const tp_collective_message message = {given[rank], sizeof(sum), TP_SUM_BF16,
                                           false};

    (void)ranks;
    if (tp_collective_post(shm, &message, PATIENCE, &err) < 0 ||
        tp_collective_sum(shm, &message, 0, 5, sum, PATIENCE, &err) < 0)
        return 1;
    return memcmp(sum, expected, sizeof(sum)) != 0 ? 2 : 0;
}

static void
test_bfloat16_is_summed_in_float32_and_rounded_to_the_nearest(void)
{
    CHECK_INT_EQ(run_ranks(3, sum_bf16_numbers), 0);
}

int
main(void)
{
    RUN(test_every_rank_gets_the_sum_of_messages_of_any_length);
    RUN(test_a_rank_can_read_its_part_of_a_sum);
    RUN(test_every_rank_gets_the_messages_of_all);
    RUN(test_bfloat16_is_summed_in_float32_and_rounded_to_the_nearest);
    return check_result();
}
