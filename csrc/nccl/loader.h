/* SPDX-License-Identifier: Apache-2.0 */
/* loader.h -- NCCL, opened at run time: where it is, its version, its functions.
 *
 * Opening it touches no device. A library that is missing or too old is no error here:
 * the caller is told why. What was opened stays open, since NCCL has threads. */
#ifndef TP_NCCL_LOADER_H
#define TP_NCCL_LOADER_H

#include <stdbool.h>

#include "core/base/error.h"
#include "nccl/abi.h"

enum { TP_NCCL_PATH_SIZE = 4096, TP_NCCL_VERSION_SIZE = 40 };

typedef struct {
    tp_nccl_functions calls;      /* all there where `reason` is empty */
    int version;                  /* 22703 for 2.27.3; 0 where it is not known */
    bool on_cpu;                  /* it is a stand-in that moves tensors on a CPU */
    char path[TP_NCCL_PATH_SIZE]; /* of the file; empty where none could be opened */
    char reason[TP_NCCL_PATH_SIZE +
                512]; /* why there is none to use; empty where there is */
} tp_nccl;

/* Exported by a stand-in for NCCL that takes pointers to memory of a CPU. */
#define TP_NCCL_ON_CPU "autotp_nccl_on_cpu"

/* Fill `nccl`: with the library that the process has loaded already, else with the one
 * at `path`, which may be empty, else with the one that the dynamic linker finds. The
 * file that AUTOTP_NCCL names replaces all three; it is empty to turn NCCL off. */
void tp_nccl_open(tp_nccl *nccl, const char *path);

/* Write "2.27.3" for 22703 to `text`, of TP_NCCL_VERSION_SIZE bytes. */
void tp_nccl_version_write(int version, char *text);

/* Make an id, by which the ranks of one communicator find each other. One rank makes it
 * and tells it to the others. Fails with TP_PEER where NCCL cannot. */
int tp_nccl_id_make(const tp_nccl *nccl, tp_nccl_id *id, tp_error *err);

#endif
