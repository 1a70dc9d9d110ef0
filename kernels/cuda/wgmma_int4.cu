#include "wgmma_kernel.h"

namespace hfq {

const char* launch_wgmma_int4(const WgmmaParams& params, cudaStream_t stream) { return launch_wgmma_of<IntCodes<4>>(params, stream); }

bool runs_wgmma_int4(const LinearParams& params) { return runs_wgmma_of<IntCodes<4>>(params); }

bool wgmma_was_compiled() { return facts_of(wgmma_kernel<IntCodes<4>, BFloat16, 64, WgmmaWay::kStaged>).registers > 32; }

}  // namespace hfq
