#include "wgmma_kernel.h"

namespace hfq {

const char* launch_wgmma_table4(const WgmmaParams& params, cudaStream_t stream) { return launch_wgmma_of<TableCodes>(params, stream); }

bool runs_wgmma_table4(const LinearParams& params) { return runs_wgmma_of<TableCodes>(params); }

}  // namespace hfq
