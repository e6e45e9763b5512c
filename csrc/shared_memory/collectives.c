/* SPDX-License-Identifier: Apache-2.0 */
/* collectives.c -- messages in chunks of a slot, summed and gathered. */
/* GCC 12 vectorizes no loop of unknown length below -O3. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3")
#endif

#include "shared_memory/collectives.h"

#include <string.h>

#include "shared_memory/wait.h"

/* Items whose sum is formed at once: the sum stays in the nearest cache. */
enum { kBlock = 2048 };

/* What a chunk is used for: `offset` is its first byte in the message. */
typedef void (*use_chunk)(const tp_shm *shm, uint64_t chunk, size_t offset,
                          size_t bytes, void *context);

static size_t
smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

static const char *
name_of(tp_collective kind)
{
    switch (kind) {
        case TP_SUM_F32:
            return "summed as float32";
        case TP_SUM_F64:
            return "summed as float64";
        case TP_SUM_BF16:
            return "summed as bfloat16";
        case TP_GATHER:
            break;
    }
    return "gathered";
}

static int
post_chunk(tp_shm *shm, const tp_collective_message *message, uint64_t label,
           size_t offset, double seconds, tp_error *err)
{
    _Atomic uint64_t *posted = &shm->counters[shm->rank].posted;
    const uint64_t chunk = atomic_load_explicit(posted, memory_order_relaxed);
    const size_t bytes = smaller(message->bytes - offset, shm->slot);

    if (chunk >= TP_SHM_SLOTS &&
        tp_wait(shm, TP_READ, chunk + 1 - TP_SHM_SLOTS, seconds, err) < 0)
        return -1;
    shm->counters[shm->rank].tags[chunk % TP_SHM_SLOTS] =
        (tp_shm_tag){message->bytes, message->kind, label};
    if (bytes > 0)
        memcpy(tp_shm_at(shm, shm->rank, chunk), (const char *)message->from + offset,
               bytes);
    atomic_store_explicit(posted, chunk + 1, memory_order_release);
    return 0;
}

int
tp_collective_post(tp_shm *shm, const tp_collective_message *message, double seconds,
                   tp_error *err)
{
    const size_t room = smaller(message->bytes, TP_SHM_SLOTS * shm->slot);
    const uint64_t label = shm->label | message->backward;
    size_t offset = 0;

    if (tp_shm_check_process(shm, err) < 0)
        return -1;
    /* An empty message is a chunk, too, so that it is not read as the next one. */
    do {
        if (post_chunk(shm, message, label, offset, seconds, err) < 0)
            return -1;
        offset += shm->slot;
    } while (offset < room);
    return 0;
}

/* That of a chunk which this rank has posted. */
static uint64_t
own_label(const tp_shm *shm, uint64_t chunk)
{
    return shm->counters[shm->rank].tags[chunk % TP_SHM_SLOTS].label;
}

static unsigned long
call_of(uint64_t label)
{
    return (unsigned long)(label >> 1 & ((1u << TP_SHM_CALL_BITS) - 1));
}

/* Fails for messages of one size that belong to different calls of the model. */
static int
fail_label(tp_shm *shm, uint64_t own, int rank, uint64_t others, tp_error *err)
{
    const unsigned long call = call_of(own), other_call = call_of(others);

    if (call == other_call && (own & 1) == (others & 1))
        tp_fail(
            err, TP_PEER,
            "collective mismatch: rank %d and rank %d were given different batches in "
            "call %lu of the model; all ranks of a TP group need the same batch",
            shm->rank, rank, call);
    else
        tp_fail(
            err, TP_PEER,
            "collective mismatch: rank %d is %s call %lu of the model, rank %d %s "
            "call %lu; all ranks of a TP group need the same calls in the same order, "
            "and on some of them one was left out or repeated",
            shm->rank, own & 1 ? "in the backward of" : "at", call, rank,
            others & 1 ? "in the backward of" : "at", other_call);
    return tp_shm_fail(shm);
}

/* Fails where another rank has posted another size, or for another collective or call.
 */
static int
check_same(tp_shm *shm, const tp_collective_message *message, uint64_t chunk,
           tp_error *err)
{
    const uint64_t label = own_label(shm, chunk);

    for (int rank = 0; rank < shm->ranks; rank++) {
        const tp_shm_tag *tag = &shm->counters[rank].tags[chunk % TP_SHM_SLOTS];
        if (tag->bytes == message->bytes && tag->kind == message->kind) {
            if (tag->label == label)
                continue;
            return fail_label(shm, label, rank, tag->label, err);
        }
        tp_fail(
            err, TP_PEER,
            "collective mismatch: rank %d gives %zu bytes to be %s, rank %d gives %llu "
            "to be %s; all ranks of a TP group need the same batch and the same code: "
            "outputs.logits, for example, are used on all of them or on none",
            shm->rank, message->bytes, name_of(message->kind), rank,
            (unsigned long long)tag->bytes, name_of((tp_collective)tag->kind));
        return tp_shm_fail(shm);
    }
    return 0;
}

/* Read chunk after chunk, and post what there was no room for. */
static int
read_chunks(tp_shm *shm, const tp_collective_message *message, use_chunk use,
            void *context, double seconds, tp_error *err)
{
    _Atomic uint64_t *chunks_read = &shm->counters[shm->rank].read;
    const size_t ahead = TP_SHM_SLOTS * shm->slot;

    size_t offset = 0;

    do {
        const uint64_t chunk = atomic_load_explicit(chunks_read, memory_order_relaxed);
        if (tp_wait(shm, TP_POSTED, chunk + 1, seconds, err) < 0 ||
            check_same(shm, message, chunk, err) < 0)
            return -1;
        const uint64_t label = own_label(shm, chunk);
        use(shm, chunk, offset, smaller(message->bytes - offset, shm->slot), context);
        atomic_store_explicit(chunks_read, chunk + 1, memory_order_release);
        if (offset + ahead < message->bytes &&
            post_chunk(shm, message, label, offset + ahead, seconds, err) < 0)
            return -1;
        offset += shm->slot;
    } while (offset < message->bytes);
    return 0;
}

typedef struct {
    tp_collective kind;
    size_t item;
    size_t first; /* byte of the message that is the first to be wanted */
    size_t end;
    char *to; /* borrowed; of the first byte */
} wanted_sum;

/* Adds one rank's items to the sum of those before it. */
#define DEFINE_SUM(type)                                                            \
    static void sum_##type(const tp_shm *shm, uint64_t chunk, size_t offset,        \
                           size_t count, type *restrict to)                         \
    {                                                                               \
        const type *restrict a = (const void *)(tp_shm_at(shm, 0, chunk) + offset); \
        const type *restrict b = (const void *)(tp_shm_at(shm, 1, chunk) + offset); \
        for (size_t i = 0; i < count; i++)                                          \
            to[i] = a[i] + b[i];                                                    \
        for (int rank = 2; rank < shm->ranks; rank++) {                             \
            a = (const void *)(tp_shm_at(shm, rank, chunk) + offset);               \
            for (size_t i = 0; i < count; i++)                                      \
                to[i] += a[i];                                                      \
        }                                                                           \
    }

DEFINE_SUM(float)
DEFINE_SUM(double)

static float
widened(uint16_t bits)
{
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof(value));
    return value;
}

/* To the nearest, ties to even; NaN stays NaN. */
static uint16_t
narrowed(float value)
{
    uint32_t wide;
    memcpy(&wide, &value, sizeof(wide));
    const uint32_t rounded = (wide + 0x7fffu + (wide >> 16 & 1)) >> 16;
    return (uint16_t)(value == value ? rounded : 0x7fc0u);
}

static void
sum_bf16(const tp_shm *shm, uint64_t chunk, size_t offset, size_t count,
         uint16_t *restrict to)
{
    float sum[kBlock] = {0};

    for (int rank = 0; rank < shm->ranks; rank++) {
        const uint16_t *x = (const void *)(tp_shm_at(shm, rank, chunk) + offset);
        for (size_t i = 0; i < count; i++)
            sum[i] += widened(x[i]);
    }
    for (size_t i = 0; i < count; i++)
        to[i] = narrowed(sum[i]);
}

static void
use_sum(const tp_shm *shm, uint64_t chunk, size_t offset, size_t bytes, void *context)
{
    const wanted_sum *want = context;
    const size_t begin = offset > want->first ? offset : want->first;
    const size_t end = smaller(offset + bytes, want->end);
    const size_t step = kBlock * want->item;

    for (size_t at = begin; at < end; at += step) {
        const size_t count = smaller(end - at, step) / want->item;
        void *to = want->to + (at - want->first);
        if (want->kind == TP_SUM_F32)
            sum_float(shm, chunk, at - offset, count, to);
        else if (want->kind == TP_SUM_F64)
            sum_double(shm, chunk, at - offset, count, to);
        else
            sum_bf16(shm, chunk, at - offset, count, to);
    }
}

static size_t
item_bytes(tp_collective kind)
{
    if (kind == TP_SUM_F64)
        return sizeof(double);
    return kind == TP_SUM_F32 ? sizeof(float) : sizeof(uint16_t);
}

int
tp_collective_sum(tp_shm *shm, const tp_collective_message *message, size_t first,
                  size_t count, void *to, double seconds, tp_error *err)
{
    const size_t item = item_bytes(message->kind);
    wanted_sum want = {message->kind, item, first * item, (first + count) * item, to};

    return read_chunks(shm, message, use_sum, &want, seconds, err);
}

typedef struct {
    size_t bytes; /* of a message */
    char *to;     /* borrowed */
} wanted_all;

static void
use_all(const tp_shm *shm, uint64_t chunk, size_t offset, size_t bytes, void *context)
{
    const wanted_all *want = context;

    for (int rank = 0; rank < shm->ranks; rank++)
        if (bytes > 0)
            memcpy(want->to + (size_t)rank * want->bytes + offset,
                   tp_shm_at(shm, rank, chunk), bytes);
}

int
tp_collective_gather(tp_shm *shm, const tp_collective_message *message, void *to,
                     double seconds, tp_error *err)
{
    wanted_all want = {message->bytes, to};

    return read_chunks(shm, message, use_all, &want, seconds, err);
}
