/* SPDX-License-Identifier: Apache-2.0 */
/* plan.h -- what happens to every parameter; decided once, never changed.
 *
 * The only value that passes from deciding to doing. Sharding, gathering,
 * loading, saving and reporting read these entries and derive nothing. */
#ifndef TP_PLAN_H
#define TP_PLAN_H

#include <stdbool.h>
#include <stdint.h>

#include "layout/layout.h"
#include "model/model.h"
#include "rules/rule.h"

typedef enum {
    TP_REPLICATED,     /* on every rank; its gradient is full, too */
    TP_REPLICATED_SUM, /* on every rank; the gradients are summed over ranks */
    TP_SKIPPED,        /* a rule said to leave it alone; as TP_REPLICATED */
    TP_COLUMN,     /* output features; of an embedding, columns that are not gathered */
    TP_ROW,        /* input features */
    TP_VOCABULARY, /* rows of an embedding */
    TP_HIDDEN,     /* columns of an embedding */
    TP_EXPERTS,    /* only of a layer: its output is the sum over the ranks */
    TP_WHOLE_EXPERTS,       /* only of a layer: as above, and each rank has some of the
                             * experts in the place of a shard of each */
    TP_WHOLE_EXPERT_BLOCKS, /* only of a layer: as above, of experts that are given
                             * blocks of rows, one each, and give such blocks */
    TP_EXPERTS_COLUMN, /* only of a layer: one layer of all experts, of which each rank
                        * gives a shard of the features */
    TP_EXPERTS_ROW,    /* only of a layer: as above, and takes it */
    TP_SHARE, /* only of a layer inside of experts: each rank gives its share */
    TP_ROPE,  /* only of a layer: ranks use a run of its output for their heads */
    TP_NORM,  /* only of a layer: a norm over features that are sharded */
    TP_HEADS  /* only of a layer: attention that is given something per head */
} tp_kind;

/* "replicated", "replicated+sum", "skip", "column", "row", "vocabulary", "hidden", and
 * of a layer "experts", "whole experts", "whole expert blocks", "experts column",
 * "experts row", "share", "rope", "norm", "heads". */
const char *tp_kind_name(tp_kind kind);

/* One per parameter, in the model's order. A tied parameter (tied_to >= 0)
 * repeats the entry of the parameter that it is. */
typedef struct {
    int parameter;
    tp_kind kind;
    tp_source source;
    const char *rule; /* label or pattern of the deciding rule; "" for none */
    int dim;          /* dimension of the parameter that shrinks; -1: replicated */
    int64_t outer;    /* the view [outer, layout->size, inner] of the full weight */
    int64_t inner;
    const tp_layout *layout; /* NULL: replicated */
} tp_entry;

/* One per module whose forward changes. */
typedef struct {
    int module;
    tp_kind kind; /* TP_COLUMN and those below it */
    int weight; /* entry index; of a norm, of the weight whose layout it follows; or -1
                 */
    int bias;   /* entry index or -1 */
    bool gather_output;
    bool split_input;
    bool is_large; /* a large layer that nothing else shards, sharded individually */
    bool opens_region;  /* behind it a rank has its own features, up to the next that */
    bool closes_region; /* is given these */
    const int *divided; /* entries of which each rank adds its share to the sum */
    int divided_count;
    const int
        *siblings; /* of TP_COLUMN, not of an embedding: indices of the layers, this one
                      among them, that are likely to be given the same input */
    int sibling_count;
    int64_t run_start; /* of TP_ROPE: the run of its output that all heads use */
    int64_t run_length;
    const tp_layout
        *heads; /* of TP_HEADS: which query heads each rank has; else NULL */
} tp_layer;

/* An integer attribute that becomes local: one value per rank. */
typedef struct {
    int module;
    const char *key;
    int64_t full;
    const int64_t *values;
} tp_local_integer;

typedef struct {
    const int *items; /* module indices, in order */
    int count;
} tp_modules;

/* A list of layers between which each rank has a shard of the tokens. */
typedef struct {
    int owner; /* the module that runs the layers */
    /* Tokens are sharded at the first and gathered behind the last. */
    tp_modules layers;
    tp_modules gather_input;   /* given all tokens, gathered where they begin */
    tp_modules gather_scatter; /* so are these, and tokens are sharded where they end */
    /* Row layers that give each rank the sum for its own tokens. */
    tp_modules reduce_scatter_output;
    /* Norms that the owner has behind the layers: they take tokens one by one. */
    tp_modules norms;
    /* Arguments of the layers, beside the first, that have a value for each token. */
    const char *const *token_arguments;
    int token_argument_count;
    bool streams_first; /* layers are given [streams, batch, sequence, features] */
} tp_stack;

/* Where activations are sharded between layers that open and close a region. */
typedef struct {
    tp_modules blocks; /* the nearest around the layers that open and close one */
    tp_modules replicated_dropouts; /* within a region, of what all ranks have */
    tp_modules sharded_dropouts;    /* outside of one, of a rank's own features */
} tp_regions;

/* A line for the user: a rule that matched nothing, a tie that keeps a weight
 * replicated. */
typedef struct {
    const char *text;
} tp_message;

/* What of the experts of one module each rank has. */
typedef enum {
    TP_EXPERTS_IN_WIDTH, /* a shard of every expert */
    TP_EXPERTS_WHOLE,    /* some of the experts, or fail */
    TP_EXPERTS_AUTO      /* some where shards of each would be thin */
} tp_expert_partition;

typedef struct {
    int ranks;
    int64_t grain;   /* tp_grain_size, 1: none */
    bool strict;     /* an unmatched linear layer is an error */
    bool defaults;   /* apply the rules of TP_FROM_DEFAULT */
    bool families;   /* look for blocks of the family table where no rule speaks */
    bool heuristics; /* also in models of a type that was never tried with it */
    bool
        large_layers; /* large layers that nothing else shards are sharded one by one */
    const char *const
        *large_names; /* these are large whatever they hold, and no others:
                       * `*` stands for one index; NULL: by what they hold */
    int large_name_count;
    int embedding_dim; /* 0 vocabulary, 1 hidden: where a default rule shards */
    const char *const *head_patterns; /* substrings of a head's module name */
    int head_pattern_count;
    const char *const *replicated; /* modules to replicate: `*` stands for one index */
    int replicated_count;
    const char *const *individual; /* modules whose layers are individually sharded */
    int individual_count;
    tp_expert_partition expert_partition;
    bool sequence;                 /* shard the tokens between blocks, or fail */
    const char *const *all_tokens; /* then blocks whose outputs are full: `*` stands for
                                    * one index */
    int all_tokens_count;
    bool must_shard;            /* a plan that shards nothing is an error */
    int vocab_parallel_lm_head; /* 1: the output head keeps its shard of the logits, or
                                 * fail; 0: it does not; -1: where it can */
} tp_plan_options;

typedef struct tp_plan tp_plan;

int tp_plan_ranks(const tp_plan *plan);
int tp_plan_entry_count(const tp_plan *plan);
const tp_entry *tp_plan_entry(const tp_plan *plan, int index);
int tp_plan_layer_count(const tp_plan *plan);
const tp_layer *tp_plan_layer(const tp_plan *plan, int index);
int tp_plan_integer_count(const tp_plan *plan);
const tp_local_integer *tp_plan_integer(const tp_plan *plan, int index);
int tp_plan_stack_count(const tp_plan *plan); /* 0 unless tokens are sharded */
const tp_stack *tp_plan_stack(const tp_plan *plan, int index);
const tp_regions *tp_plan_regions(const tp_plan *plan);
/* The layer that keeps its shard of the logits where labels are given, or -1. */
int tp_plan_logits_layer(const tp_plan *plan);

/* Whether nothing is sharded, and no gradient summed, because rules skip parameters and
 * none asks for anything else: the model is meant to stay as it is. */
bool tp_plan_skips_all(const tp_plan *plan);

int tp_plan_message_count(const tp_plan *plan);
const tp_message *tp_plan_message(const tp_plan *plan, int index);

/* Shape of the shard on `rank`; `shape` has room for TP_MAX_DIMS values. */
void tp_plan_local_shape(const tp_plan *plan, int entry, int rank, int64_t *shape);

/* Whether `rank` counts some of its shard in a sum over all ranks: it owns a run of it,
 * or all of them. Of a replicated parameter no rank does. */
bool tp_plan_is_counted(const tp_plan *plan, int entry, int rank);

/* Equal plans of equal models have equal hashes, on every machine: covers ranks, names,
 * shapes, dtypes, kinds, runs, local integers and stacks; not who decided. */
uint64_t tp_plan_hash(const tp_plan *plan);

/* Covers names, shapes and runs alone: what a checkpoint of the shards depends on. */
uint64_t tp_plan_layout_hash(const tp_plan *plan);

/* One row per group of parameters that differ in indices only. */
typedef struct {
    const char *pattern; /* indices as `*`; owned by the table */
    int entry;           /* the first of the group */
    int count;
    int64_t full_bytes; /* of the whole group */
} tp_plan_row;

typedef struct tp_plan_table tp_plan_table;

int tp_plan_table_new(const tp_plan *plan, tp_plan_table **out, tp_error *err);
int tp_plan_table_count(const tp_plan_table *table);
const tp_plan_row *tp_plan_table_row(const tp_plan_table *table, int index);

/* Bytes of the group's shards on `rank`. A tied parameter counts once. */
int64_t tp_plan_table_bytes(const tp_plan_table *table, int row, int rank);
void tp_plan_table_free(tp_plan_table *table);

void tp_plan_free(tp_plan *plan);

#endif
