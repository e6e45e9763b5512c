/* SPDX-License-Identifier: Apache-2.0 */
#include "passes/pass.h"
#include "plan_fixture.h"

static const unsigned all = (1U << TP_PART_COUNT) - 1;

static const int one_sibling = 0;

/* Every part of a build for a model of one module and one parameter. */
typedef struct {
    tp_plan plan;
    tp_build build;
    tp_choice choice;
    tp_decision decision;
    tp_stars stars;
    bool matched, experts;
    int module_rule, attention, stacked, next_name;
    tp_entry entry;
    tp_layer layer;
    tp_local_integer integer;
    tp_stack stack;
    tp_message message;
} everything;

static void
fill(everything *parts, const fixture *f)
{
    *parts = (everything){.message = {"a"}};
    parts->layer.siblings = &one_sibling;
    parts->plan = (tp_plan){.entries = &parts->entry,
                            .entry_count = 1,
                            .layers = &parts->layer,
                            .layer_count = 1,
                            .integers = &parts->integer,
                            .integer_count = 1,
                            .stacks = &parts->stack,
                            .stack_count = 1,
                            .messages = &parts->message,
                            .message_count = 1};
    parts->build = (tp_build){.model = f->model,
                              .rules = f->rules,
                              .options = &f->options,
                              .plan = &parts->plan,
                              .choices = &parts->choice,
                              .next_name = &parts->next_name,
                              .decisions = &parts->decision,
                              .stars = &parts->stars,
                              .matched = &parts->matched,
                              .module_rules = &parts->module_rule,
                              .experts = &parts->experts,
                              .stacked = &parts->stacked,
                              .attentions = &parts->attention};
}

static int
write_nothing(tp_build *build, tp_error *err)
{
    (void)build;
    (void)err;
    return 0;
}

static int
write_choice(tp_build *build, tp_error *err)
{
    (void)err;
    build->choices[0].reason = TP_REASON_DEFAULT;
    return 0;
}

static int
write_layout(tp_build *build, tp_error *err)
{
    const tp_piece piece = {4, 1, TP_PIECE_PLAIN};
    const tp_layout *layout = NULL;
    return tp_layout_cache_get(build->layouts, &piece, 1, (tp_heads){0, 0}, &layout,
                               err);
}

static void
write_geometry(tp_build *build)
{
    const tp_geometry guessed = {.heads = {4, 4}, .head_size = 2, .guessed = true};
    tp_geometries_set(build->geometries, 0, &guessed);
}

/* A byte of each part, but for layouts and geometries; NULL there. */
static unsigned char *
byte_of(everything *parts, tp_build_part part)
{
    void *const bytes[TP_PART_COUNT] = {
        [TP_PART_FIXED] = &parts->next_name,
        [TP_PART_CHOICES] = &parts->choice.reason,
        [TP_PART_STARS] = &parts->stars,
        [TP_PART_MATCHED] = &parts->matched,
        [TP_PART_MODULE_RULES] = &parts->module_rule,
        [TP_PART_ATTENTIONS] = &parts->attention,
        [TP_PART_PAIRED] = &parts->build.paired,
        [TP_PART_STACKED] = &parts->stacked,
        [TP_PART_DECISIONS] = &parts->decision.shards_keys,
        [TP_PART_EXPERTS] = &parts->experts,
        [TP_PART_ENTRIES] = &parts->entry.dim,
        [TP_PART_LAYERS] = &parts->layer.run_length,
        [TP_PART_SIBLINGS] = &parts->layer.sibling_count,
        [TP_PART_STACKS] = &parts->stack.owner,
        [TP_PART_REGIONS] = &parts->layer.opens_region,
        [TP_PART_INTEGERS] = &parts->integer.full,
        [TP_PART_LOGITS] = &parts->plan.logits_layer,
        [TP_PART_HASH] = &parts->plan.hash,
        [TP_PART_MESSAGES] = &parts->message.text,
    };
    return bytes[part];
}

/* A sealed model of one linear layer, and one rule. */
static fixture
small(void)
{
    fixture f = fixture_new(2);
    add_linear(&f, "up", 8, 4);
    add_rule(&f, "r", "up", TP_PARTITION_COLUMN);
    CHECK_OK(tp_model_seal(f.model, &f.facts, &f.err), &f.err);
    return f;
}

static void
test_every_part_is_seen_to_change_alone(void)
{
    fixture f = small();
    everything parts;
    tp_arena *arena = NULL;
    fill(&parts, &f);
    CHECK_OK(tp_arena_new(&arena, &f.err), &f.err);
    CHECK_OK(tp_layout_cache_new(arena, 2, &parts.build.layouts, &f.err), &f.err);
    CHECK_OK(tp_geometries_new(f.model, &parts.build.geometries, &f.err), &f.err);
    int written = 0;
    for (int part = 0; part < TP_PART_COUNT; part++) {
        uint64_t before[TP_PART_COUNT], after[TP_PART_COUNT];
        tp_parts_hash(&parts.build, before);
        unsigned char *byte = byte_of(&parts, (tp_build_part)part);
        if (part == TP_PART_GEOMETRIES) {
            write_geometry(&parts.build);
        } else if (byte == NULL) {
            CHECK_OK(write_layout(&parts.build, &f.err), &f.err);
        } else {
            *byte ^= 1;
            written++;
        }
        tp_parts_hash(&parts.build, after);
        for (int other = 0; other < TP_PART_COUNT; other++)
            CHECK((before[other] != after[other]) == (other == part));
    }
    CHECK_INT_EQ(written, TP_PART_COUNT - 2);
    tp_geometries_free(parts.build.geometries);
    tp_layout_cache_free(parts.build.layouts);
    tp_arena_free(arena);
    fixture_free(&f);
}

static int
run_with_layouts(const tp_pass *passes, int count, bool check, tp_error *err)
{
    fixture f = small();
    everything parts;
    tp_arena *arena = NULL;
    fill(&parts, &f);
    CHECK_OK(tp_arena_new(&arena, err), err);
    CHECK_OK(tp_layout_cache_new(arena, 2, &parts.build.layouts, err), err);
    CHECK_OK(tp_geometries_new(f.model, &parts.build.geometries, err), err);
    const int result = tp_passes_run(&parts.build, passes, count, check, err);
    tp_geometries_free(parts.build.geometries);
    tp_layout_cache_free(parts.build.layouts);
    tp_arena_free(arena);
    fixture_free(&f);
    return result;
}

static void
test_a_pass_that_writes_what_it_does_not_declare_is_found(void)
{
    tp_error err = TP_NO_ERROR;
    const unsigned others = all & ~(1U << TP_PART_CHOICES);
    const tp_pass wrong[] = {{"first", write_nothing, 0, others},
                             {"second", write_choice, 0, others}};
    CHECK_FAILS(run_with_layouts(wrong, 2, true, &err), TP_BUG, &err,
                "pass 'second' writes 'choices'");
    CHECK_OK(run_with_layouts(wrong, 2, false, &err), &err);
    const tp_pass right[] = {{"first", write_choice, 0, 1U << TP_PART_CHOICES}};
    CHECK_OK(run_with_layouts(right, 1, true, &err), &err);
    const tp_pass layout[] = {{"third", write_layout, 0, 1U << TP_PART_CHOICES}};
    CHECK_FAILS(run_with_layouts(layout, 1, true, &err), TP_BUG, &err,
                "pass 'third' writes 'layouts'");
    tp_error_clear(&err);
}

static void
test_a_pass_that_reads_what_nobody_wrote_is_found(void)
{
    tp_error err = TP_NO_ERROR;
    const tp_pass wrong[] = {
        {"first", write_choice, 0, 1U << TP_PART_CHOICES},
        {"second", write_nothing, 1U << TP_PART_LAYERS, 0},
        {"third", write_nothing, 0, 1U << TP_PART_LAYERS},
    };
    CHECK_FAILS(run_with_layouts(wrong, 3, true, &err), TP_BUG, &err,
                "pass 'second' reads 'layers'");
    const tp_pass right[] = {wrong[2], wrong[1], wrong[0]};
    CHECK_OK(run_with_layouts(right, 3, true, &err), &err);
    tp_error_clear(&err);
}

static int
fail(tp_build *build, tp_error *err)
{
    (void)build;
    return tp_fail(err, TP_VALUE, "the pass failed");
}

static void
test_the_first_failure_ends_the_run(void)
{
    tp_error err = TP_NO_ERROR;
    const tp_pass passes[] = {{"first", fail, 0, 0}, {"second", write_choice, 0, 0}};
    CHECK_FAILS(run_with_layouts(passes, 2, true, &err), TP_VALUE, &err,
                "the pass failed");
    CHECK_FAILS(run_with_layouts(passes, 2, false, &err), TP_VALUE, &err,
                "the pass failed");
    tp_error_clear(&err);
}

static void
test_parts_have_names(void)
{
    for (int i = 0; i < TP_PART_COUNT; i++) {
        CHECK(tp_part_name((tp_build_part)i)[0] != '\0');
        for (int j = 0; j < i; j++)
            CHECK(strcmp(tp_part_name((tp_build_part)i),
                         tp_part_name((tp_build_part)j)) != 0);
    }
}

int
main(void)
{
    RUN(test_every_part_is_seen_to_change_alone);
    RUN(test_a_pass_that_writes_what_it_does_not_declare_is_found);
    RUN(test_a_pass_that_reads_what_nobody_wrote_is_found);
    RUN(test_the_first_failure_ends_the_run);
    RUN(test_parts_have_names);
    return check_result();
}
