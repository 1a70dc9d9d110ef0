#include "wide_digits.h"
#include "wide_kernel.h"

namespace hfq {

// (Until a GPU has timed them, digits only where they are asked for.)
const char* launch_wide_table4(const LinearParams& params, cudaStream_t stream) {
  return params.tokens == 1 && is_set("HFQ_CUDA_DIGITS", "1") ? launch_wide_digits(params, stream) : launch_wide_of<TableCodes>(params, stream);
}

}  // namespace hfq
