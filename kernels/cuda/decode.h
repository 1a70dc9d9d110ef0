// What stands between the products of a decode step on a GPU. Each function enqueues its kernels; null, or CUDA's description of the error.
#pragma once

#include "../common/decode.h"
#include "dtype.h"

namespace hfq {

constexpr int64_t kMostAttended = 256;  // numbers of a head that attend() takes

const char* launch_rms_norm(const NormParams& params, cudaStream_t stream);
const char* launch_rotate(const RotateParams& q, const RotateParams& k, cudaStream_t stream);
const char* launch_gate(const GateParams& params, cudaStream_t stream);

// Floats of memory for sums of the parts into which the tokens are cut; 0 if there is one part. On the current device.
int64_t attend_workspace(const AttendParams& params);
const char* launch_attend(const AttendParams& params, float* workspace, cudaStream_t stream);

}  // namespace hfq
