// 3-bit codes between the stored layout, one stream of bits, and the planes that kernels read (rows16.h). For any processor: shifts and masks.
#include "launch.h"
#include "launch_parts.h"

namespace hfq {
namespace {

constexpr int64_t kCodes = 16;        // half of 32 columns: 48 bits of the stream
constexpr int64_t kUnitBytes = 12;    // of 32 columns, in either layout
constexpr int64_t kPlanesGrain = 16 * 1024;  // units per thread

// Code 4 * b + j of a half h: its upper bit goes to bit 8 * b + 4 * h + j.
constexpr int upper_bit(int64_t half, int code) { return 8 * (code / 4) + 4 * static_cast<int>(half) + code % 4; }

void split_unit(const uint8_t* stream, uint8_t* planes) {
  uint32_t words[3] = {};
  for (int64_t half = 0; half < 2; ++half) {
    uint64_t codes = 0;
    __builtin_memcpy(&codes, stream + 6 * half, 6);
    for (int i = 0; i < kCodes; ++i, codes >>= 3) {
      words[half] |= static_cast<uint32_t>(codes & 3) << (2 * i);
      words[2] |= static_cast<uint32_t>(codes >> 2 & 1) << upper_bit(half, i);
    }
  }
  __builtin_memcpy(planes, words, sizeof words);
}

void join_unit(const uint8_t* planes, uint8_t* stream) {
  uint32_t words[3];
  __builtin_memcpy(words, planes, sizeof words);
  for (int64_t half = 0; half < 2; ++half) {
    uint64_t codes = 0;
    for (int i = 0; i < kCodes; ++i)
      codes |= static_cast<uint64_t>((words[half] >> (2 * i) & 3) | (words[2] >> upper_bit(half, i) & 1) << 2) << (3 * i);
    __builtin_memcpy(stream + 6 * half, &codes, 6);
  }
}

}  // namespace

void launch_planes(const PlanesCall& call) {
  const int64_t units = ceil_div(call.row_bytes, kUnitBytes);
  parallel_for(call.rows, at_least_one(kPlanesGrain / at_least_one(units)), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const uint8_t* in = call.in + row * call.row_bytes;
      uint8_t* out = call.out + row * units * kUnitBytes;
      for (int64_t u = 0; u < units; ++u, in += kUnitBytes, out += kUnitBytes) {
        uint8_t whole[kUnitBytes] = {};
        const int64_t left = call.row_bytes - u * kUnitBytes;
        if (left < kUnitBytes) __builtin_memcpy(whole, in, static_cast<size_t>(left));
        (call.join ? join_unit : split_unit)(left < kUnitBytes ? whole : in, out);
      }
    }
  });
}

}  // namespace hfq
