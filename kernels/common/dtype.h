// Dtypes as the launchers for all devices take them.
#pragma once

#include <cstdint>

namespace hfq {

enum DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kUnsupported = -1 };

}  // namespace hfq
