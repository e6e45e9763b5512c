// SPDX-License-Identifier: Apache-2.0
// cross_entropy.cpp -- the operators of cross-entropy over one rank's columns of the
// vocabulary, on a GPU.
//
// Kernels are started and never waited for.
#include "torch/device.h"

namespace
{

using namespace tp;

// Checked arguments that both kernels take.
tp_cross_entropy_args
vocab_args(const Tensor &logits, const Tensor &columns, double cap)
{
    require(
        logits.dim() == 2 && columns.dim() == 1 && columns.size(0) == logits.size(0),
        "expected logits [tokens, width] and columns [tokens]");
    require(logits.is_contiguous() && columns.is_contiguous(),
            "logits or columns are not contiguous; call .contiguous() first");
    require(dtype_of(columns) == aoti_torch_dtype_int64(),
            "columns: expected int64; call columns.long() first");
    require(cap >= 0, "cap: expected 0, for no soft cap, or more");
    require_same_device(logits, columns);
    const int32_t dtype = dtype_of(logits);
    tp_cross_entropy_args args = {};
    if (dtype == aoti_torch_dtype_float32())
        args.type = TP_LOGIT_FLOAT32;
    else if (dtype == aoti_torch_dtype_float16())
        args.type = TP_LOGIT_FLOAT16;
    else
        args.type = TP_LOGIT_BFLOAT16;
    require(args.type != TP_LOGIT_BFLOAT16 || dtype == aoti_torch_dtype_bfloat16(),
            "logits: expected float32, float16 or bfloat16");
    args.columns = static_cast<const int64_t *>(columns.const_data_ptr());
    args.tokens = logits.size(0);
    args.width = logits.size(1);
    args.cap = static_cast<float>(cap);
    return args;
}

Tensor
vocab_statistics(const Tensor &logits, const Tensor &columns, double cap)
{
    tp_cross_entropy_args args = vocab_args(logits, columns, cap);
    const Device device(logits);
    Tensor statistics = torch::stable::new_empty(logits, {3, args.tokens},
                                                 torch::headeronly::ScalarType::Float);
    args.logits = const_cast<void *>(logits.const_data_ptr());  // read only
    args.statistics = static_cast<float *>(statistics.mutable_data_ptr());
    device.check(device.api->cross_entropy_statistics(&args, device.stream),
                 "the statistics of logits");
    return statistics;
}

// The data of a tensor that has one float32 for each token.
const float *
for_tokens(const Tensor &tensor, const Tensor &logits)
{
    require(tensor.dim() == 1 && tensor.size(0) == logits.size(0) &&
                tensor.is_contiguous() &&
                dtype_of(tensor) == aoti_torch_dtype_float32(),
            "logsumexp and scale: expected contiguous float32 [tokens]");
    require_same_device(tensor, logits);
    return static_cast<const float *>(tensor.const_data_ptr());
}

void
vocab_gradient(const Tensor &logits, const Tensor &logsumexp, const Tensor &columns,
               const Tensor &scale, double cap)
{
    tp_cross_entropy_args args = vocab_args(logits, columns, cap);
    args.logsumexp = for_tokens(logsumexp, logits);
    args.scale = for_tokens(scale, logits);
    const Device device(logits);
    args.logits = logits.mutable_data_ptr();
    device.check(device.api->cross_entropy_gradient(&args, device.stream),
                 "the gradient of logits");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeed_autotp, m)
{
    m.def("vocab_statistics(Tensor logits, Tensor columns, float cap) -> Tensor");
    m.def(
        "vocab_gradient_(Tensor(a!) logits, Tensor logsumexp, Tensor columns,"
        " Tensor scale, float cap) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CUDA, m)
{
    m.impl("vocab_statistics", TORCH_BOX(&vocab_statistics));
    m.impl("vocab_gradient_", TORCH_BOX(&vocab_gradient));
}
