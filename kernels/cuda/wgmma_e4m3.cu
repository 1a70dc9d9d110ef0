#include "wgmma_kernel.h"

namespace hfq {

const char* launch_wgmma_e4m3(const WgmmaParams& params, cudaStream_t stream) { return launch_wgmma_of<E4m3Codes>(params, stream); }

bool runs_wgmma_e4m3(const LinearParams& params) { return runs_wgmma_of<E4m3Codes>(params); }

}  // namespace hfq
