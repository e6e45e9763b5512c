// SPDX-License-Identifier: Apache-2.0
// read.cpp -- the operator that reads rows of a file into a tensor.
#include "torch/tensor.h"

extern "C" {
#include "files/read_rows.h"
}

namespace
{

using namespace tp;

// What a read is given as: begin, rows, bytes, stride, out_begin, out_stride.
constexpr size_t kValues = 6;

// begin + (rows - 1) * stride + bytes, or -1 for what is no stretch of rows.
int64_t
end_of(int64_t begin, int64_t rows, int64_t bytes, int64_t stride)
{
    int64_t end = 0;
    if (begin < 0 || rows < 1 || bytes < 0 || stride < 0 ||
        __builtin_mul_overflow(rows - 1, stride, &end) ||
        __builtin_add_overflow(end, begin, &end) ||
        __builtin_add_overflow(end, bytes, &end))
        return -1;
    return end;
}

void
read_on_cpu(const Tensor &out, std::string path, int64_t fd, std::vector<int64_t> reads)
{
    require(out.is_contiguous(), "out is not contiguous");
    require(reads.size() % kValues == 0, "reads has six values for each read");
    char *memory = static_cast<char *>(out.mutable_data_ptr());
    for (size_t i = 0; i < reads.size(); i += kValues) {
        const int64_t *r = &reads[i];
        const int64_t end = end_of(r[4], r[1], r[2], r[5]);
        require(end >= 0 && end <= bytes_of(out) && end_of(r[0], r[1], r[2], r[3]) >= 0,
                "a read goes beyond the memory of out");
        const tp_rows rows = {r[0], r[1], r[2], r[3], r[5]};
        tp_error err = TP_NO_ERROR;
        if (tp_read_rows(static_cast<int>(fd), path.c_str(), &rows, memory + r[4],
                         &err) < 0)
            raise(&err);
    }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeed_autotp, m)
{
    m.def("read_(Tensor(a!) out, str path, int fd, int[] reads) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CPU, m)
{
    m.impl("read_", TORCH_BOX(&read_on_cpu));
}
