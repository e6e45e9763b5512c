/* SPDX-License-Identifier: Apache-2.0 */
/* pass.c -- one step of making a plan, and what it reads and writes. */
#include "passes/pass.h"

static int
check_reads(const tp_pass *passes, int count, tp_error *err)
{
    unsigned written = 0;
    for (int i = 0; i < count; i++) {
        for (int part = 0; part < TP_PART_COUNT; part++) {
            if ((passes[i].reads & ~written) >> part & 1)
                return tp_fail(err, TP_BUG,
                               "pass '%s' reads '%s', which no pass before it writes",
                               passes[i].name, tp_part_name(part));
        }
        written |= passes[i].writes;
    }
    return 0;
}

static int
run_checked(tp_build *build, const tp_pass *pass, tp_error *err)
{
    uint64_t before[TP_PART_COUNT], after[TP_PART_COUNT];
    tp_parts_hash(build, before);
    if (pass->run(build, err) < 0)
        return -1;
    tp_parts_hash(build, after);
    for (int part = 0; part < TP_PART_COUNT; part++) {
        if (before[part] != after[part] && !(pass->writes >> part & 1))
            return tp_fail(err, TP_BUG,
                           "pass '%s' writes '%s', which it does not declare",
                           pass->name, tp_part_name(part));
    }
    return 0;
}

int
tp_passes_run(tp_build *build, const tp_pass *passes, int count, bool check,
              tp_error *err)
{
    if (check && check_reads(passes, count, err) < 0)
        return -1;
    for (int i = 0; i < count; i++) {
        const int result =
            check ? run_checked(build, &passes[i], err) : passes[i].run(build, err);
        if (result < 0)
            return -1;
    }
    return 0;
}
