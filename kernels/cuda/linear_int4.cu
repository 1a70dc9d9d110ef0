#include "linear_digits_kernel.h"
#include "linear_kernel.h"

namespace hfq {

const char* launch_linear_int4(const LinearParams& params, cudaStream_t stream) {
  return takes_digits(params) ? launch_digits(params, stream) : launch_linear_of<IntCodes<4>>(params, stream);
}

}  // namespace hfq
