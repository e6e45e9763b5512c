// SPDX-License-Identifier: Apache-2.0
// nccl.cpp -- the operators that move tensors between ranks through NCCL.
//
// Tensors on a CPU are for a stand-in of NCCL, with which this runs where there is no
// GPU.
#include <algorithm>
#include <optional>
#include <tuple>

#include "torch/device.h"
#include "torch/handles.h"

extern "C" {
#include "nccl/exchange.h"
}

namespace
{

using namespace tp;

constexpr int64_t kCpu = -1;  // in place of the index of a GPU

struct Open {
    std::shared_ptr<tp_comm> comm;
    int64_t device;
};

Handles<Open> &
communicators()
{
    static Handles<Open> handles(
        "the communicator is closed; expected the handle of an open one");
    return handles;
}

std::unique_ptr<tp_nccl>
usable(const std::string &path)
{
    auto nccl = std::make_unique<tp_nccl>();
    tp_nccl_open(nccl.get(), path.c_str());
    if (nccl->reason[0] != '\0')
        throw std::runtime_error(nccl->reason);
    return nccl;
}

// Why there is no NCCL to use, its file, its version, that as text, and whether it is
// one for tensors on a CPU.
std::tuple<std::string, std::string, int64_t, std::string, bool>
nccl_find(std::string path)
{
    const auto nccl = std::make_unique<tp_nccl>();
    tp_nccl_open(nccl.get(), path.c_str());
    char version[TP_NCCL_VERSION_SIZE];
    tp_nccl_version_write(nccl->version, version);
    return {nccl->reason, nccl->path, nccl->version, version, nccl->on_cpu};
}

void
require_id(const Tensor &id)
{
    require(id.is_cpu() && id.is_contiguous() && id.element_size() == 1 &&
                id.numel() == TP_NCCL_ID_BYTES,
            "id: expected 128 contiguous bytes on the CPU");
}

void
nccl_id(const Tensor &id, std::string path)
{
    require_id(id);
    tp_error err = TP_NO_ERROR;
    tp_nccl_id made;
    if (tp_nccl_id_make(usable(path).get(), &made, &err) < 0)
        raise(&err);
    std::copy(made.bytes, made.bytes + TP_NCCL_ID_BYTES,
              static_cast<char *>(id.mutable_data_ptr()));
}

int64_t
nccl_make(std::string path, const Tensor &id, int64_t rank, int64_t ranks,
          int64_t device, double seconds)
{
    require_id(id);
    require(0 <= rank && rank < ranks && ranks <= 1 << 16,
            "rank: expected 0 to ranks - 1, of at most 65536 ranks");
    const auto nccl = usable(path);
    require(device != kCpu || nccl->on_cpu,
            "device: got the CPU, expected a GPU; NCCL moves tensors that are on one");
    std::optional<DeviceGuard> guard;
    if (device != kCpu)
        guard.emplace(static_cast<int32_t>(device));
    tp_nccl_id given;
    const auto *bytes = static_cast<const char *>(id.const_data_ptr());
    std::copy(bytes, bytes + TP_NCCL_ID_BYTES, given.bytes);
    const tp_comm_place place = {static_cast<int>(rank), static_cast<int>(ranks),
                                 seconds};
    tp_error err = TP_NO_ERROR;
    tp_comm *comm = nullptr;
    if (tp_comm_make(&comm, nccl.get(), &given, &place, &err) < 0)
        raise(&err);
    std::shared_ptr<tp_comm> owned(comm, tp_comm_close);
    return communicators().add(std::make_shared<Open>(Open{std::move(owned), device}));
}

// Appends a transfer for each tensor.
void
add_transfers(std::vector<tp_transfer> *transfers, const std::vector<Tensor> &tensors,
              const std::vector<int64_t> &peers, bool sends, int64_t device)
{
    require(tensors.size() == peers.size(),
            "expected as many ranks as tensors, one to send to or receive from");
    for (size_t i = 0; i < tensors.size(); i++) {
        const Tensor &tensor = tensors[i];
        require(tensor.is_contiguous(),
                "tensors to send or receive: expected contiguous ones");
        require(
            tensor.is_cpu() ? device == kCpu
                            : tensor.is_cuda() && tensor.get_device_index() == device,
            "tensors to send or receive: expected on the device of the communicator");
        require(0 <= peers[i] && peers[i] < 1 << 16,
                "peer: expected a rank of the group");
        void *at = sends ? const_cast<void *>(tensor.const_data_ptr())  // read only
                         : tensor.mutable_data_ptr();
        transfers->push_back({static_cast<int>(peers[i]), sends, at, bytes_of(tensor)});
    }
}

int
always_done(void *)
{
    return 1;
}

void
nccl_exchange(int64_t handle, std::string what, std::vector<Tensor> sent,
              std::vector<int64_t> to, std::vector<Tensor> received,
              std::vector<int64_t> from)
{
    const std::shared_ptr<Open> open = communicators().find(handle);
    std::vector<tp_transfer> transfers;
    add_transfers(&transfers, sent, to, true, open->device);
    add_transfers(&transfers, received, from, false, open->device);
    std::optional<Device> device;
    tp_stream stream = {nullptr, always_done};
    if (open->device != kCpu) {
        device.emplace(static_cast<int32_t>(open->device));
        stream = {device->stream, device->api->stream_done};
    }
    const tp_exchange exchange = {what.c_str(), transfers.data(),
                                  static_cast<int64_t>(transfers.size()), stream};
    tp_error err = TP_NO_ERROR;
    if (tp_exchange_run(open->comm.get(), &exchange, &err) < 0)
        raise(&err);
}

void
nccl_close(int64_t handle)
{
    communicators().remove(handle);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeed_autotp, m)
{
    m.def("nccl_find(str path) -> (str, str, int, str, bool)");
    m.def("nccl_id_(Tensor(a!) id, str path) -> ()");
    m.def(
        "nccl_make(str path, Tensor id, int rank, int ranks, int device, float seconds)"
        " -> int");
    m.def(
        "nccl_exchange(int comm, str what, Tensor[] sent, int[] to,"
        " Tensor(a!)[] received, int[] origins) -> ()");
    m.def("nccl_close(int comm) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CompositeExplicitAutograd, m)
{
    m.impl("nccl_find", TORCH_BOX(&nccl_find));
    m.impl("nccl_id_", TORCH_BOX(&nccl_id));
    m.impl("nccl_make", TORCH_BOX(&nccl_make));
    m.impl("nccl_exchange", TORCH_BOX(&nccl_exchange));
    m.impl("nccl_close", TORCH_BOX(&nccl_close));
}
