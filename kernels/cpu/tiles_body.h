// Products of many tokens on AMX tiles. Included after rows16_parts.h, inside the same anonymous namespace.
//   A  activations, int8     16 tokens x 64 columns    a step of layout `Activations` with stride 16, as it is
//   B  codes - offset, int8  16 quads of columns x 16 rows x 4: unpacked here, once for all tokens; the offset is the middle code
//   C  int32                 16 tokens x 16 rows
//
// Two tiles of A times two of B: one load for each multiplication. Sums of integers are folded into float32 at the end of every block of
// activations, which has one scale per token and belongs to one group, which has one scale per row.

constexpr int64_t kTileBytes = 1024;

// Columns go by chunks whose tiles of B stay in the L1 cache; those of A come from L2.
constexpr int64_t kChunkSteps = 8;
constexpr int64_t kChunkBytes = kChunkSteps * kTileBytes;

// What ldtilecfg reads (Intel's Software Developer's Manual, volume 1, 18.3): all eight tiles have 16 rows of 64 bytes.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// What is taken off every code so that it is an int8.
inline int32_t code_offset(const LinearParams& p) { return p.codebook ? 128 : 1 << (p.shape.bits - 1); }

// Steps [first, last) of a row block as tiles; zeros where a group ends within a step, or the weight before the block.
template <Codes CODES>
void unpack_chunk(uint8_t* tile, const LinearParams& p, int64_t block, int64_t first, int64_t last) {
  constexpr int64_t kLines = lines_of(CODES);
  const Shape& s = p.shape;
  const Table table = table_load(p.codebook_u8);
  const I offset = _mm512_set1_epi8(static_cast<char>(code_offset(p)));
  const int64_t group_words = words_of<CODES>(s.group_size);
  for (int64_t span = 2 * first; span < 2 * last; ++span, tile += kTileBytes / 2) {
    const int64_t g = span / s.spans_per_group, word = span % s.spans_per_group * kLines;
    const int64_t left = words_of<CODES>(smaller(s.group_size, s.in_features - g * s.group_size)) - word;
    if (left <= 0 || block * kRows >= s.out_features) {
      __builtin_memset(tile, 0, kTileBytes / 2);
      continue;
    }
    Line lines[kLines];
    load_span<CODES>(lines, p.qweight + (block * s.words + g * group_words + word) * kLineBytes, left);
    each_column<8>([&](auto column) {
      constexpr int q = decltype(column)::value;
      _mm512_store_si512(tile + q * kLineBytes, _mm512_sub_epi8(quad<CODES, q>(lines, table), offset));
    });
  }
}

void unpack_pair(uint8_t* tiles, const LinearParams& p, int64_t block, int64_t first, int64_t last) {
  for (int64_t i = 0; i < 2; ++i) {
    uint8_t* tile = tiles + i * kChunkBytes;
    switch (p.shape.bits) {
      case 2: unpack_chunk<kPairs>(tile, p, block + i, first, last); break;
      case 3: unpack_chunk<kPlanes>(tile, p, block + i, first, last); break;
      case 4: p.codebook ? unpack_chunk<kTable>(tile, p, block + i, first, last) : unpack_chunk<kNibbles>(tile, p, block + i, first, last); break;
      case 8: unpack_chunk<kBytes>(tile, p, block + i, first, last); break;
    }
  }
}

// What was written before is in memory when tiles are loaded: compilers do not know that those instructions read it.
inline void before_tiles() { asm volatile("" ::: "memory"); }

// Sums c [token block, row block, token, row] of two token blocks and two row blocks, begun or gone on with.
inline void multiply_steps(int32_t* c, bool begin, const int8_t* left, int64_t left_block, const uint8_t* right, int64_t steps) {
  before_tiles();
  if (begin) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + 256, 64);
    _tile_loadd(2, c + 512, 64);
    _tile_loadd(3, c + 768, 64);
  }
  for (int64_t i = 0; i < steps; ++i, left += kTileBytes, right += kTileBytes) {
    _tile_loadd(6, right, kLineBytes);
    _tile_loadd(7, right + kChunkBytes, kLineBytes);
    _tile_loadd(4, left, kStepBytes);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, left + left_block, kStepBytes);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + 256, 64);
  _tile_stored(2, c + 512, 64);
  _tile_stored(3, c + 768, 64);
}

typedef float Sums[2][2][kTileTokens][16];  // token block, row block, token, row

// A pair of row blocks times all tokens, two blocks of them at a time.
struct PairProduct {
  const LinearParams& p;
  int64_t block, steps, group_steps;
  F scale[2], zero[2];

  PairProduct(const LinearParams& params, int64_t first_block)
      : p(params), block(first_block), steps(p.shape.groups * p.shape.spans_per_group / 2), group_steps(p.shape.spans_per_group / 2) {}

  bool exists(int64_t j) const { return (block + j) * kRows < p.shape.out_features; }

  void load_scales(int64_t g) {
    for (int64_t j = 0; j < 2; ++j) {
      const int64_t at = ((block + j) * p.shape.groups + g) * kRows;
      scale[j] = exists(j) ? f_load_as(p.scales, at, p.scale_dtype) : f_zero();
      const F offset = f_set1(static_cast<float>(-code_offset(p)));
      zero[j] = exists(j) && p.zeros ? f_mul(scale[j], f_add(offset, f_load_as(p.zeros, at, p.scale_dtype))) : f_zero();
    }
  }

  // sums += dots * scales, of the first `count` of 32 tokens.
  void fold(Sums& sums, const int32_t (&dots)[2][2][kTileTokens][16], const float* x_scales, int64_t next_scales, int64_t count) const {
    for (int64_t half = 0; half < 2; ++half, x_scales += next_scales, count -= kTileTokens) {
      for (int64_t t = 0; t < smaller(kTileTokens, count); ++t) {
        const F x_scale = f_set1(x_scales[t]);
        for (int j = 0; j < 2; ++j) {
          float* sum = sums[half][j][t];
          f_store(sum, f_fma(f_from_i(_mm512_load_si512(dots[half][j][t])), f_mul(x_scale, scale[j]), f_load(sum)));
        }
      }
    }
  }

  // sums -= zero points * the sums of activations, for the group whose scales are loaded.
  void take_zeros_off(Sums& sums, const float* group_sums, int64_t next_sums, int64_t count) const {
    for (int64_t half = 0; half < 2; ++half, group_sums += next_sums, count -= kTileTokens)
      for (int64_t t = 0; t < smaller(kTileTokens, count); ++t)
        for (int j = 0; j < 2; ++j) f_store(sums[half][j][t], f_fma(f_set1(-group_sums[t]), zero[j], f_load(sums[half][j][t])));
  }

  void store(const Sums& sums, int64_t first, int64_t count) const {
    for (int64_t t = 0; t < count; ++t)
      for (int64_t j = 0; j < 2; ++j)
        if (exists(j)) store_outputs(p, block + j, first + t, f_mul(f_load(sums[t / kTileTokens][j][t % kTileTokens]), f_set1(p.output_factor)));
  }
};

void multiply_int8(const LinearParams& p, uint8_t* scratch, int64_t block) {
  const Shape& s = p.shape;
  PairProduct product(p, block);
  // Activations that are quantized over whole rows: sums stay integers to the end.
  const bool whole = s.groups == 1 && s.blocks_per_group == 1 && product.steps > kActBlock / kStepBytes;
  const int64_t token_blocks = (p.tokens + kTileTokens - 1) / kTileTokens;
  const int64_t scales = s.groups * s.blocks_per_group * kTileTokens, group_sums = s.groups * kTileTokens;
  Sums* sums = reinterpret_cast<Sums*>(scratch + 2 * kChunkBytes);
  alignas(64) int32_t dots[2][2][kTileTokens][16];
  if (!whole) __builtin_memset(sums, 0, static_cast<size_t>((token_blocks + 1) / 2) * sizeof(Sums));
  for (int64_t first = 0; first < product.steps; first += kChunkSteps) {
    const int64_t last = smaller(first + kChunkSteps, product.steps);
    unpack_pair(scratch, p, block, first, last);
    for (int64_t t = 0; t < token_blocks; t += 2) {
      // The last of an odd number of token blocks goes twice, into sums that nobody reads.
      const int64_t second = t + 1 < token_blocks ? 1 : 0, count = p.tokens - t * kTileTokens;
      const int8_t* left = p.x.codes + (t * product.steps + first) * kTileBytes;
      const int64_t left_block = second * product.steps * kTileBytes;
      Sums& sum = sums[t / 2];
      if (whole) {
        multiply_steps(reinterpret_cast<int32_t*>(&sum), first == 0, left, left_block, scratch, last - first);
        continue;
      }
      for (int64_t step = first; step < last;) {
        const int64_t g = step / product.group_steps, in_group = step % product.group_steps, in_block = in_group % (kActBlock / kStepBytes);
        const int64_t here = smaller(smaller(kActBlock / kStepBytes - in_block, product.group_steps - in_group), last - step);
        multiply_steps(&dots[0][0][0][0], true, left + (step - first) * kTileBytes, left_block, scratch + (step - first) * kTileBytes, here);
        product.load_scales(g);
        const float* x_scales = p.x.block_scales + t * scales + (g * s.blocks_per_group + in_group / (kActBlock / kStepBytes)) * kTileTokens;
        product.fold(sum, dots, x_scales, second * scales, count);
        step += here;
      }
    }
  }
  for (int64_t t = 0; t < token_blocks; t += 2) {
    const int64_t second = t + 1 < token_blocks ? 1 : 0, first = t * kTileTokens, count = smaller(2 * kTileTokens, p.tokens - first);
    if (whole) {
      __builtin_memcpy(dots, &sums[t / 2], sizeof dots);
      __builtin_memset(&sums[t / 2], 0, sizeof(Sums));
      product.load_scales(0);
      product.fold(sums[t / 2], dots, p.x.block_scales + t * scales, second * scales, count);
    }
    for (int64_t g = 0; p.zeros && g < s.groups; ++g) {
      product.load_scales(g);
      product.take_zeros_off(sums[t / 2], p.x.group_sums + t * group_sums + g * kTileTokens, second * group_sums, count);
    }
    product.store(sums[t / 2], first, count);
  }
}

// ---- bfloat16 activations as they are; those rounded to E4M3, which bfloat16 holds ----
//
//   A  activations           16 tokens x 32 columns, a span
//   B  weights               16 pairs of columns x 16 rows x 2: dequantized here, once for all tokens
//   C  float32               16 tokens x 16 rows, over all of K
//
// Nothing is folded. A chunk of A serves all row blocks of a task.

constexpr int64_t kChunkSpans = kChunkSteps;

// Spans [first, last) of a row block as tiles.
template <Codes CODES>
void dequantize_chunk(uint8_t* tile, const LinearParams& p, int64_t block, int64_t first, int64_t last) {
  constexpr int64_t kLines = lines_of(CODES);
  const Shape& s = p.shape;
  if (block * kRows >= s.out_features) return static_cast<void>(__builtin_memset(tile, 0, static_cast<size_t>((last - first) * kTileBytes)));
  const FloatTable table = float_table_load(p.codebook);
  // Lane 2 i is lane i of the first operand's half, lane 2 i + 1 that of the second's.
  alignas(64) uint16_t order[32];
  for (uint16_t i = 0; i < 16; ++i) order[2 * i] = i, order[2 * i + 1] = static_cast<uint16_t>(16 + i);
  const I interleave = _mm512_load_si512(order);
  const uint8_t* line = p.qweight + (block * s.words + first * kLines) * kLineBytes;
  for (int64_t span = first; span < last; ++span, tile += kTileBytes, line += kLines * kLineBytes) {
    const int64_t at = (block * s.groups + span * kSpan / s.group_size) * kRows;
    const F scale = f_load_as(p.scales, at, p.scale_dtype);
    F shift = f_zero();
    if (p.zeros) shift = f_mul(f_load_as(p.zeros, at, p.scale_dtype), f_set1(-1.0f));
    else if (!p.codebook) shift = f_set1(-static_cast<float>(1 << (s.bits - 1)));
    Line lines[kLines];
    load_span<CODES>(lines, line, s.words - span * kLines);
    each_column<16>([&](auto pair) {
      constexpr int i = 2 * decltype(pair)::value;
      const F a = f_mul(f_add(column_value<CODES, i>(lines, table), shift), scale);
      const F b = f_mul(f_add(column_value<CODES, i + 1>(lines, table), shift), scale);
      const I both = reinterpret_cast<I>(_mm512_cvtne2ps_pbh(b, a));
      _mm512_store_si512(tile + i / 2 * kLineBytes, _mm512_permutexvar_epi16(interleave, both));
    });
  }
}

// The same for E4M3: 1/256 of the codes, which bfloat16 holds as they are. Scales come at the end (store_e4m3).
void widen_chunk(uint8_t* tile, const LinearParams& p, int64_t block, int64_t first, int64_t last) {
  constexpr int64_t kWords = kSpan / 4;
  const Shape& s = p.shape;
  if (block * kRows >= s.out_features) return static_cast<void>(__builtin_memset(tile, 0, static_cast<size_t>((last - first) * kTileBytes)));
  // Of 8 rows: columns 0 and 2 in turn, then columns 1 and 3. Wanted are columns 0 and 1 of 16 rows, then columns 2 and 3.
  alignas(64) uint16_t order[2][32];
  for (uint16_t row = 0; row < 16; ++row)
    for (uint16_t pair = 0; pair < 2; ++pair) {
      const uint16_t even = static_cast<uint16_t>(row / 8 * 32 + row % 8 * 2 + pair);
      order[pair][2 * row] = even, order[pair][2 * row + 1] = static_cast<uint16_t>(even + 16);
    }
  const I left = _mm512_load_si512(order[0]), right = _mm512_load_si512(order[1]);
  Part largest = part_zero();
  uint8_t* out = tile;
  for (int64_t word = first * kWords; word < last * kWords; ++word, out += 2 * kLineBytes) {
    const Line codes = word < s.words ? fetch(p.qweight + (block * s.words + word) * kLineBytes) : line_zero();
    largest = part_larger(largest, codes);
    const Pairs even = e4m3_even(codes), odd = e4m3_odd(codes);
    const I low = reinterpret_cast<I>(_mm512_cvtne2ps_pbh(odd.low, even.low)), high = reinterpret_cast<I>(_mm512_cvtne2ps_pbh(odd.high, even.high));
    _mm512_store_si512(out, _mm512_permutex2var_epi16(low, left, high));
    _mm512_store_si512(out + kLineBytes, _mm512_permutex2var_epi16(low, right, high));
  }
  // A NaN in a row makes one of the row's numbers NaN, and with it all sums.
  _mm512_store_si512(tile, _mm512_or_si512(_mm512_load_si512(tile), _mm512_castps_si512(l_nan_where_full(largest))));
}

void dequantize_pair(uint8_t* tiles, const LinearParams& p, int64_t block, int64_t first, int64_t last) {
  for (int64_t i = 0; i < 2; ++i) {
    uint8_t* tile = tiles + i * kChunkBytes;
    switch (p.shape.bits) {
      case 2: dequantize_chunk<kPairs>(tile, p, block + i, first, last); break;
      case 3: dequantize_chunk<kPlanes>(tile, p, block + i, first, last); break;
      case 4:
        p.codebook ? dequantize_chunk<kTable>(tile, p, block + i, first, last) : dequantize_chunk<kNibbles>(tile, p, block + i, first, last);
        break;
      case 8:
        has_e4m3_codes(p) ? widen_chunk(tile, p, block + i, first, last) : dequantize_chunk<kBytes>(tile, p, block + i, first, last);
        break;
    }
  }
}

// Adds to the sums c [token block, row block, token, row] of two token blocks and two row blocks, or begins them.
inline void add_steps(float* c, bool begin, const uint16_t* left, int64_t left_block, const uint8_t* right, int64_t steps) {
  before_tiles();
  if (begin) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + 256, 64);
    _tile_loadd(2, c + 512, 64);
    _tile_loadd(3, c + 768, 64);
  }
  for (int64_t i = 0; i < steps; ++i, left += kTileBytes / 2, right += kTileBytes) {
    _tile_loadd(6, right, kLineBytes);
    _tile_loadd(7, right + kChunkBytes, kLineBytes);
    _tile_loadd(4, left, kLineBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + left_block, kLineBytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + 256, 64);
  _tile_stored(2, c + 512, 64);
  _tile_stored(3, c + 768, 64);
}

// `pairs` pairs of row blocks from `block` on times all tokens.
void multiply_bfloat16(const LinearParams& p, uint8_t* scratch, int64_t block, int64_t pairs) {
  const Shape& s = p.shape;
  const int64_t spans = (s.in_features + kSpan - 1) / kSpan, token_blocks = (p.tokens + kTileTokens - 1) / kTileTokens;
  const int64_t left_block = spans * kTileBytes / 2;
  float* sums = reinterpret_cast<float*>(scratch + 2 * kChunkBytes);
  for (int64_t first = 0; first < spans; first += kChunkSpans) {
    const int64_t steps = smaller(kChunkSpans, spans - first);
    for (int64_t r = 0; r < pairs; ++r) {
      dequantize_pair(scratch, p, block + 2 * r, first, first + steps);
      for (int64_t t = 0; t < token_blocks; t += 2) {
        const uint16_t* left = p.x.wide + t * left_block + first * (kTileBytes / 2);
        // The last of an odd number of token blocks goes twice, into sums that nobody reads.
        add_steps(sums + (t / 2 * pairs + r) * 1024, first == 0, left, t + 1 < token_blocks ? left_block : 0, scratch, steps);
      }
    }
  }
  for (int64_t t = 0; t < p.tokens; ++t) {
    const int64_t half = t / kTileTokens % 2, token = t % kTileTokens;
    for (int64_t r = 0; r < pairs; ++r)
      for (int64_t j = 0; j < 2; ++j) {
        if ((block + 2 * r + j) * kRows >= s.out_features) continue;
        const F sum = f_load(sums + (t / (2 * kTileTokens) * pairs + r) * 1024 + (half * 2 + j) * 256 + token * 16);
        if (has_e4m3_codes(p)) store_e4m3(p, block + 2 * r + j, t, sum);
        else store_outputs(p, block + 2 * r + j, t, sum);
      }
  }
}
