// Operators of a decode step beside its products, for CUDA.
#include "../cuda/decode.h"

#include "cuda_arguments.h"
#include "decode_operators.h"

namespace hfq {
namespace {

constexpr int64_t kMostNumbers = int64_t{1} << 31;  // of a tensor: thread blocks are numbered with 31 bits

class OnCuda {
 public:
  static int32_t type() { return aoti_torch_device_type_cuda(); }
  static constexpr int64_t kLargestHead = 1 << 16;
  static constexpr int64_t kMostAttendedBytes = hfq::kMostAttendedBytes;
  OnCuda(const char* op, int32_t index) : op_(op), index_(index), guard_(index), stream_(current_stream(index)) {}

  void rms_norm(const NormParams& p) const {
    expect(p.rows < kMostNumbers, op_, "too many rows for one launch");
    check(launch_rms_norm(p, stream_));
  }
  void rotate(const RotateParams& q, const RotateParams& k) const {
    expect(q.tokens * (q.heads + k.heads) * q.size < kMostNumbers, op_, "too many tokens for one launch");
    check(launch_rotate(q, k, stream_));
  }
  void gate(const GateParams& p) const {
    expect(p.rows * p.columns < 256 * kMostNumbers, op_, "too many tokens for one launch");
    check(launch_gate(p, stream_));
  }
  void attend(const AttendParams& p) const {
    expect(p.batch * p.heads * 64 < kMostNumbers, op_, "too many heads for one launch");
    for (const void* data : {p.q, p.k, p.v}) expect(aligned(data, 16), op_, "q, k and v must be aligned to 16 bytes");
    float* workspace = nullptr;
    // Freed here, it is used again behind the kernels, in order of the stream.
    const Tensor kept = workspace_tensor(op_, attend_workspace(p), index_, workspace);
    check(launch_attend(p, workspace, stream_));
  }

 private:
  void check(const char* error) const {
    if (error) fail(std::string("hfq::") + op_ + ": CUDA error: " + error);
  }

  const char* op_;
  int32_t index_;
  DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace

bool register_decode(TorchLibraryHandle library) { return DecodeOperators<OnCuda>::add(library); }

}  // namespace hfq
