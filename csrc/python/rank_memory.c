/* SPDX-License-Identifier: Apache-2.0 */
/* rank_memory.c -- the method Plan.rank_memory: bytes of weights, gradients, optimizer.
 */
#include "python/rank_memory.h"

#include "core/cost/traffic.h"
#include "python/args.h"

/* The arguments as Python gave them; NULL where it gave none. */
typedef struct {
    PyObject *rank, *stage, *replicas, *states, *trains, *reduce_bucket, *persistence,
        *max_live, *sub_group, *overlap_comm;
} arguments;

const char py_rank_memory_doc[] =
    "rank_memory($self, rank, *, stage, replicas, states, trains=None,\n"
    "            reduce_bucket=500000000, persistence=100000, max_live=1000000000,\n"
    "            sub_group=1000000000, overlap_comm=False)\n--\n\n"
    "What a TP rank holds with DeepSpeed, in bytes, of its data-parallel ranks the one "
    "that\nholds most.";

static int
parse(PyObject *args, PyObject *kwargs, arguments *given)
{
    static const char *const names[] = {"rank",         "stage",    "replicas",
                                        "states",       "trains",   "reduce_bucket",
                                        "persistence",  "max_live", "sub_group",
                                        "overlap_comm", NULL};
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "O|$OOOOOOOOO:rank_memory", (char **)names, &given->rank,
            &given->stage, &given->replicas, &given->states, &given->trains,
            &given->reduce_bucket, &given->persistence, &given->max_live,
            &given->sub_group, &given->overlap_comm))
        return -1;
    return py_check_required(given->stage, "stage") < 0 ||
                   py_check_required(given->replicas, "replicas") < 0 ||
                   py_check_required(given->states, "states") < 0
               ? -1
               : 0;
}

static int
read_options(const arguments *given, tp_memory_options *options)
{
    options->reduce_bucket = TP_REDUCE_BUCKET;
    options->persistence = TP_PERSISTENCE_THRESHOLD;
    options->max_live = TP_MAX_LIVE_PARAMETERS;
    options->sub_group = TP_SUB_GROUP;
    if (py_read_int(given->stage, "stage", &options->stage) < 0 ||
        py_read_int64(given->replicas, "replicas", &options->replicas) < 0 ||
        py_read_int(given->states, "states", &options->states) < 0 ||
        py_read_int64(given->reduce_bucket, "reduce_bucket", &options->reduce_bucket) <
            0 ||
        py_read_int64(given->persistence, "persistence", &options->persistence) < 0 ||
        py_read_int64(given->max_live, "max_live", &options->max_live) < 0 ||
        py_read_int64(given->sub_group, "sub_group", &options->sub_group) < 0 ||
        py_read_flag(given->overlap_comm, "overlap_comm", &options->overlap_comm) < 0)
        return -1;
    return 0;
}

/* New array of one flag per entry, to be freed with PyMem_Free. */
static bool *
read_trains(const tp_plan *plan, PyObject *given)
{
    bool *trains = NULL;
    PyObject *items = py_read_sequence(given, "trains"); /* new */
    if (items == NULL)
        return NULL;
    const Py_ssize_t count = PyTuple_Size(items);
    if (count != tp_plan_entry_count(plan)) {
        PyErr_Format(PyExc_ValueError,
                     "trains: got %zd flags, expected %d, one per entry", count,
                     tp_plan_entry_count(plan));
        goto done;
    }
    trains = PyMem_Calloc((size_t)count + 1, sizeof(*trains));
    if (trains == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        if (py_read_flag(PyTuple_GetItem(items, i), "trains", &trains[i]) < 0) {
            PyMem_Free(trains);
            trains = NULL;
            break;
        }
    }
done:
    Py_DECREF(items);
    return trains;
}

static PyObject *
traffic_tuple(const tp_memory_options *options, const tp_rank_memory *memory)
{
    tp_replica_traffic rows[TP_REPLICA_TRAFFIC];
    const int count = tp_replica_traffic_of(options, memory, rows);
    PyObject *result = PyTuple_New(count);
    for (int i = 0; result != NULL && i < count; i++)
        py_tuple_put(&result, i,
                     Py_BuildValue("sLs", tp_collective_name(rows[i].kind),
                                   (long long)rows[i].bytes, rows[i].purpose));
    return result;
}

static PyObject *
result_of(const tp_memory_options *options, const tp_rank_memory *memory)
{
    return Py_BuildValue(
        "{s:L,s:L,s:L,s:L,s:L,s:L,s:L,s:L,s:d,s:L,s:L,s:N}", "parameters",
        (long long)memory->parameters, "gathered", (long long)memory->gathered,
        "gradients", (long long)memory->gradients, "master", (long long)memory->master,
        "states", (long long)memory->states, "buckets", (long long)memory->buckets,
        "kept_buckets", (long long)memory->kept_buckets, "step",
        (long long)memory->step, "share", memory->share, "elements",
        (long long)memory->elements, "trained", (long long)memory->trained, "traffic",
        traffic_tuple(options, memory));
}

PyObject *
py_rank_memory(const tp_plan *plan, PyObject *args, PyObject *kwargs)
{
    arguments given = {0};
    tp_memory_options options = {0};
    tp_rank_memory memory;
    tp_error err = TP_NO_ERROR;
    PyObject *result = NULL;
    bool *trains = NULL;
    int rank = 0;
    if (parse(args, kwargs, &given) < 0 || py_read_int(given.rank, "rank", &rank) < 0 ||
        read_options(&given, &options) < 0)
        return NULL;
    if (given.trains != NULL && given.trains != Py_None) {
        trains = read_trains(plan, given.trains);
        if (trains == NULL)
            return NULL;
        options.trains = trains;
    }
    if (tp_rank_memory_of(plan, rank, &options, &memory, &err) < 0)
        py_raise(&err);
    else
        result = result_of(&options, &memory);
    PyMem_Free(trains);
    return result;
}
