#include <memory>

#include "isa.h"
#include "launch.h"
#include "launch_parts.h"

namespace hfq {
namespace {

constexpr int64_t kPackedTokens = 4096;  // at a time: packed operands take as much memory as these tokens in float32

struct Freed {
  void operator()(void* data) const { std::free(data); }
};

std::unique_ptr<uint16_t, Freed> allocate(int64_t numbers) {
  const int64_t bytes = round_up(numbers * 2, 64);
  std::unique_ptr<uint16_t, Freed> data(static_cast<uint16_t*>(std::aligned_alloc(64, static_cast<size_t>(bytes))));
  if (!data) throw std::bad_alloc();
  advise_huge_pages(data.get(), bytes);
  return data;
}

}  // namespace

void launch_add_moment(MomentParams params) {
  const Kernels& isa = kernels();
  if (!params.tokens || !params.columns) return;
  const int64_t tokens = params.tokens, most = tokens < kPackedTokens ? tokens : kPackedTokens;
  params.strips = round_up(ceil_div(params.columns, kTileSide), 2);
  const auto left = allocate(params.strips * ceil_div(most, kTileTokens) * kTileNumbers);
  const auto right = allocate(params.strips * ceil_div(most, kTileTokens) * kTileNumbers);
  params.left = left.get();
  params.right = right.get();
  int64_t tasks = 0;
  for (int64_t band = 0; band < params.strips; band += kBand) tasks += (params.strips - band) / 2;
  for (int64_t first = 0; first < tokens; first += most) {
    params.tokens = tokens - first < most ? tokens - first : most;
    params.blocks = ceil_div(params.tokens, kTileTokens);
    parallel_for(params.strips, 1, [&](int64_t begin, int64_t end) { isa.pack_moment(params, begin, end); });
    parallel_for(tasks, 1, [&](int64_t begin, int64_t end) { isa.multiply_moment(params, begin, end); });
    params.x += params.tokens * params.columns;
  }
}

}  // namespace hfq
