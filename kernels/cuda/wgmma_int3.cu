#include "wgmma_kernel.h"

namespace hfq {

const char* launch_wgmma_int3(const WgmmaParams& params, cudaStream_t stream) { return launch_wgmma_of<IntCodes<3>>(params, stream); }

bool runs_wgmma_int3(const LinearParams& params) { return runs_wgmma_of<IntCodes<3>>(params); }

}  // namespace hfq
