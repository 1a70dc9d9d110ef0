#include "wide_kernel.h"

namespace hfq {

const char* launch_wide_int4(const LinearParams& params, cudaStream_t stream) { return launch_wide_of<IntCodes<4>>(params, stream); }

// (The empty kernel of another architecture needs none.)
bool wide_was_compiled() { return facts_of(wide_kernel<WideBlock<IntCodes<4>, BFloat16, 2, 4, false>>).registers > 32; }

}  // namespace hfq
