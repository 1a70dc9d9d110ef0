#include "linear_digits_kernel.h"
#include "linear_kernel.h"

namespace hfq {

const char* launch_linear_table4(const LinearParams& params, cudaStream_t stream) {
  return takes_digits(params) ? launch_digits_of_table(params, stream) : launch_linear_of<TableCodes>(params, stream);
}

}  // namespace hfq
