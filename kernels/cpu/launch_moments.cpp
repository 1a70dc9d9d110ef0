#include "isa.h"
#include "launch.h"
#include "launch_parts.h"

namespace hfq {
namespace {

constexpr int64_t kPackedTokens = 4096;  // at a time: packed operands take as much memory as these tokens in float32

uint16_t* reserve(Scratch& scratch, int64_t numbers) {
  char* data = scratch.reserve(static_cast<size_t>(numbers * 2));
  advise_huge_pages(data, numbers * 2);
  return reinterpret_cast<uint16_t*>(data);
}

}  // namespace

void launch_add_moment(MomentParams params) {
  const Kernels& isa = kernels();
  if (!params.tokens || !params.columns) return;
  const int64_t tokens = params.tokens, most = tokens < kPackedTokens ? tokens : kPackedTokens;
  params.strips = round_up(ceil_div(params.columns, kTileSide), 2);
  const int64_t numbers = params.strips * ceil_div(most, kMomentTokens) * kTileNumbers;
  Scratch left, right;  // of this call only: as much as the activations
  params.left = reserve(left, numbers);
  params.right = reserve(right, numbers);
  int64_t tasks = 0;
  for (int64_t band = 0; band < params.strips; band += kBand) tasks += (params.strips - band) / 2;
  for (int64_t first = 0; first < tokens; first += most) {
    params.tokens = tokens - first < most ? tokens - first : most;
    params.blocks = ceil_div(params.tokens, kMomentTokens);
    parallel_for(params.strips, 1, [&](int64_t begin, int64_t end) { isa.pack_moment(params, begin, end); });
    parallel_for(tasks, 1, [&](int64_t begin, int64_t end) { isa.multiply_moment(params, begin, end); });
    params.x += params.tokens * params.columns;
  }
}

}  // namespace hfq
