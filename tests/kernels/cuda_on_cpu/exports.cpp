// The launchers that tests/kernels/cuda_emulator calls.
#include "../../../kernels/cuda/decode.h"
#include "../../../kernels/cuda/experts.h"
#include "../../../kernels/cuda/gemm.h"
#include "../../../kernels/cuda/linear.h"
#include "../../../kernels/cuda/packing.h"
#include "../../../kernels/cuda/spqr.h"
#include "../../../kernels/cuda/unpack.h"
#include "../../../kernels/cuda/w8a8.h"
#include "../../../kernels/cuda/wgmma.h"
#include "../../../kernels/cuda/wide.h"

extern "C" {

int64_t linear_workspace(const hfq::LinearParams* params) { return hfq::linear_workspace(*params); }
const char* arrange(const hfq::LinearParams* params) { return hfq::launch_arrange(*params, nullptr); }
void gemm_plan(const hfq::LinearParams* params, hfq::GemmPlan* plan) { *plan = hfq::plan_gemm(*params); }
void range_plan(const hfq::LinearParams* params, int active, hfq::RangeShape* shape, hfq::RangePlan* plan) {
  *shape = hfq::range_shape(*params), *plan = hfq::plan_ranges(*params, *shape, active);
}
uint32_t quotient(uint32_t n, uint32_t divisor) { return hfq::quotient(n, divisor, hfq::reciprocal(divisor)); }
int64_t takes_wide(const hfq::LinearParams* params) { return hfq::takes_wide(*params); }
int64_t takes_wgmma(const hfq::LinearParams* params) { return hfq::takes_wgmma(*params); }
void wide_plan(int64_t tiles, int64_t steps, const hfq::WideShape* shape, hfq::WidePlan* plan) { *plan = hfq::plan_wide(tiles, steps, *shape); }
const char* linear(const hfq::LinearParams* params) { return hfq::launch_linear(*params, nullptr); }
int64_t spqr_workspace(const hfq::SpqrLinearParams* params) { return hfq::spqr_workspace(*params); }
const char* spqr_linear(const hfq::SpqrLinearParams* params) { return hfq::launch_spqr_linear(*params, nullptr); }
const char* spqr_unpack(const hfq::SpqrUnpackParams* params) { return hfq::launch_spqr_unpack(*params, nullptr); }
const char* experts(const hfq::ExpertsParams* params) { return hfq::launch_experts(*params, nullptr); }
const char* unpack(const hfq::UnpackParams* params) { return hfq::launch_unpack(*params, nullptr); }
const char* quantize_tokens(const hfq::TokensParams* params) { return hfq::launch_quantize_tokens(*params, nullptr); }
int quantizes_inside(hfq::CodeType type, int64_t tokens, int64_t in_features) { return hfq::quantizes_inside(type, tokens, in_features); }
const char* linear_w8a8(const hfq::W8A8Params* params) { return hfq::launch_w8a8(*params, nullptr); }
const char* linear_fp8(const hfq::W8A8Params* params) { return hfq::launch_fp8(*params, nullptr); }
const char* unpack_bytes(const hfq::UnpackBytesParams* params) { return hfq::launch_unpack_bytes(*params, nullptr); }
const char* scale_sums(const hfq::ScaleSumsParams* params) { return hfq::launch_scale_sums(*params, nullptr); }
const char* group_range(const hfq::GroupRangeParams* params) { return hfq::launch_group_range(*params, nullptr); }
const char* nearest_codes(const hfq::NearestCodesParams* params) { return hfq::launch_nearest_codes(*params, nullptr); }
const char* pack_codes(const hfq::PackCodesParams* params) { return hfq::launch_pack_codes(*params, nullptr); }
const char* to_fragments(const hfq::ToFragmentsParams* params) { return hfq::launch_to_fragments(*params, nullptr); }
const char* rms_norm(const hfq::NormParams* params) { return hfq::launch_rms_norm(*params, nullptr); }
const char* rotate(const hfq::RotateParams* both) { return hfq::launch_rotate(both[0], both[1], nullptr); }
const char* gate(const hfq::GateParams* params) { return hfq::launch_gate(*params, nullptr); }
int64_t attend_workspace(const hfq::AttendParams* params) { return hfq::attend_workspace(*params); }
const char* attend(const hfq::AttendParams* params, float* workspace) { return hfq::launch_attend(*params, workspace, nullptr); }

}  // extern "C"
