// What an adapted layer computes on a CPU beside its products, each in one pass; see native.py.
//
//     N tokens   O out_features   I in_features   R rank
//
// Compiled without contraction of products and sums: a tile has the bits of bitsandbytes.  No sum's order
// depends on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t SMALL = 1 << 14;  // elements for which waking the other threads takes longer than the work
constexpr int64_t BUFFER = 512;     // values of a row that are computed before they are rounded

struct bf16 {
  uint16_t bits;
};

inline float widen(float value) { return value; }

inline float widen(bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void store(float* out, const float* values, int64_t count) {
  std::memcpy(out, values, count * sizeof(float));
}

inline void store(bf16* out, const float* values, int64_t count) {  // to the nearest, ties to even
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const bool is_nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    out[i].bits = uint16_t(is_nan ? (bits >> 16) | 0x40 : rounded);
  }
}

// Two codes a byte, the high one first; `count` is even.
void look_up_nibbles(float* out, const uint8_t* codes, int64_t count, const float* table, float scale) {
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(table), _mm512_set1_ps(scale));
  const __m128i low = _mm_set1_epi8(15);
  for (; i + 16 <= count; i += 16) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), low);
    const __m128i index = _mm_unpacklo_epi8(high, _mm_and_si128(bytes, low));
    _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(index), scaled));
  }
#elif defined(__AVX2__)
  const __m256 factor = _mm256_set1_ps(scale);
  const __m256 first = _mm256_mul_ps(_mm256_loadu_ps(table), factor);
  const __m256 second = _mm256_mul_ps(_mm256_loadu_ps(table + 8), factor);
  const __m128i low = _mm_set1_epi8(15);
  for (; i + 8 <= count; i += 8) {
    int32_t four;
    std::memcpy(&four, codes + i / 2, sizeof four);
    const __m128i bytes = _mm_cvtsi32_si128(four);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), low);
    const __m256i index = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(high, _mm_and_si128(bytes, low)));
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // its sign: codes from 8 on
    const __m256 values = _mm256_blendv_ps(
        _mm256_permutevar8x32_ps(first, index), _mm256_permutevar8x32_ps(second, index), upper);
    _mm256_storeu_ps(out + i, values);
  }
#endif
  for (; i < count; i += 2) {
    out[i] = table[codes[i / 2] >> 4] * scale;
    out[i + 1] = table[codes[i / 2] & 15] * scale;
  }
}

void look_up_bytes(float* out, const uint8_t* codes, int64_t count, const float* table, float scale) {
  for (int64_t i = 0; i < count; i++) out[i] = table[codes[i]] * scale;
}

template <typename Out>
void tile(Out* out, const uint8_t* codes, const float* table, const void* absmax, const float* nested_absmax,
          const float* nested_code, const float* offset, int64_t block, int64_t nested_block,
          int64_t per_byte, int64_t first, int64_t last, int64_t inputs, const float* s, float factor) {
  const bool whole_blocks = inputs % block == 0;
#pragma omp parallel for schedule(static) if ((last - first) * inputs > SMALL)
  for (int64_t row = first; row < last; row++) {
    const float row_scale = s ? s[row] * factor : 1.0f;
    const int64_t end = (row + 1) * inputs;
    Out* row_out = out + (row - first) * inputs - row * inputs;
    float buffer[BUFFER];
    for (int64_t at = row * inputs; at < end;) {
      const int64_t index = at / block;
      const int64_t stop = std::min(end, (index + 1) * block);
      float scale;
      if (nested_absmax) {
        const float code = nested_code[static_cast<const uint8_t*>(absmax)[index]];
        scale = code * nested_absmax[index / nested_block] + *offset;
      } else {
        scale = static_cast<const float*>(absmax)[index];
      }
      // Rows of whole blocks: to scale the blocks' scales is to scale the rows, and rounds as `tiles` does.
      if (s && whole_blocks) scale *= row_scale;
      for (; at < stop;) {
        const int64_t count = std::min(stop - at, BUFFER);
        float* values = sizeof(Out) == 4 ? reinterpret_cast<float*>(row_out + at) : buffer;
        if (per_byte == 2) {
          look_up_nibbles(values, codes + at / 2, count, table, scale);
        } else {
          look_up_bytes(values, codes + at, count, table, scale);
        }
        if (s && !whole_blocks) {
          for (int64_t i = 0; i < count; i++) values[i] *= row_scale;
        }
        if (sizeof(Out) != 4) store(row_out + at, values, count);
        at += count;
      }
    }
  }
}

// The products of 16 tokens are summed before they join the total, so that the error grows by N / 16.
template <typename Value>
void dot(float* out, const Value* g, const Value* y, const float* m, int64_t tokens, int64_t outputs) {
  constexpr int64_t COLUMNS = 64, TOKENS = 16;
#pragma omp parallel for schedule(static) if (tokens * outputs > SMALL)
  for (int64_t column = 0; column < outputs; column += COLUMNS) {
    const int64_t count = std::min(COLUMNS, outputs - column);
    float total[COLUMNS] = {};
    for (int64_t start = 0; start < tokens; start += TOKENS) {
      float part[COLUMNS] = {};
      for (int64_t token = start; token < std::min(tokens, start + TOKENS); token++) {
        const Value *g_row = g + token * outputs + column, *y_row = y + token * outputs + column;
        for (int64_t i = 0; i < count; i++) part[i] += widen(g_row[i]) * widen(y_row[i]);
      }
      for (int64_t i = 0; i < count; i++) total[i] += part[i];
    }
    // A magnitude of exactly 0 has y = 0: the least number makes its gradient 0 instead of 0/0.
    for (int64_t i = 0; i < count; i++) out[column + i] = total[i] / (m[column + i] + 1.17549435e-38f);
  }
}

template <typename Product, typename Factor>
void norm(float* out, const float* w2, const Product* wa, const float* gram, const Factor* b, int64_t outputs,
          int64_t rank, float scale) {
#pragma omp parallel for schedule(static) if (outputs * rank * rank > SMALL)
  for (int64_t row = 0; row < outputs; row++) {
    const Factor* b_row = b + row * rank;
    float slope[BUFFER] = {};
    for (int64_t q = 0; q < rank; q++) {
      const float value = widen(b_row[q]);
      for (int64_t r = 0; r < rank; r++) slope[r] += value * gram[q * rank + r];
    }
    double sum = w2[row];  // the terms may cancel
    for (int64_t r = 0; r < rank; r++) {
      sum += double(scale * widen(b_row[r])) * (2 * widen(wa[row * rank + r]) + scale * slope[r]);
    }
    // What overflows float32 is to be seen as that, as it is where torch computes.
    out[row] = std::sqrt(std::max(float(sum), 1.17549435e-38f));
  }
}

template <typename Factor, typename Out>
void row_scale(float* m, float* s, Out* out, const float* norm, const float* initial, const Factor* offset,
               const Factor* b, int64_t outputs, int64_t rank, float factor) {
  for (int64_t row = 0; row < outputs; row++) {
    m[row] = initial[row] + widen(offset[row]);
    s[row] = m[row] / norm[row];
  }
  if (!b) return;
#pragma omp parallel for schedule(static) if (outputs * rank > SMALL)
  for (int64_t row = 0; row < outputs; row++) {
    float values[BUFFER];
    for (int64_t start = 0; start < rank; start += BUFFER) {
      const int64_t count = std::min(BUFFER, rank - start);
      const Factor* b_row = b + row * rank + start;
      for (int64_t i = 0; i < count; i++) values[i] = widen(b_row[i]) * (s[row] * factor);
      store(out + row * rank + start, values, count);
    }
  }
}

}  // namespace

extern "C" {

void qdora_tile(void* out, int64_t is_bf16, const uint8_t* codes, const float* table, const void* absmax,
                const float* nested_absmax, const float* nested_code, const float* offset, int64_t block,
                int64_t nested_block, int64_t per_byte, int64_t first, int64_t last, int64_t inputs,
                const float* s, float factor) {
  if (is_bf16) {
    tile(static_cast<bf16*>(out), codes, table, absmax, nested_absmax, nested_code, offset, block,
         nested_block, per_byte, first, last, inputs, s, factor);
  } else {
    tile(static_cast<float*>(out), codes, table, absmax, nested_absmax, nested_code, offset, block,
         nested_block, per_byte, first, last, inputs, s, factor);
  }
}

void qdora_dot(float* out, int64_t is_bf16, const void* g, const void* y, const float* m, int64_t tokens,
               int64_t outputs) {
  if (is_bf16) {
    dot(out, static_cast<const bf16*>(g), static_cast<const bf16*>(y), m, tokens, outputs);
  } else {
    dot(out, static_cast<const float*>(g), static_cast<const float*>(y), m, tokens, outputs);
  }
}

void qdora_norm(float* out, const float* w2, int64_t product_bf16, const void* wa, const float* gram,
                int64_t factor_bf16, const void* b, int64_t outputs, int64_t rank, float scale) {
  if (product_bf16 && factor_bf16) {
    norm(out, w2, static_cast<const bf16*>(wa), gram, static_cast<const bf16*>(b), outputs, rank, scale);
  } else if (product_bf16) {
    norm(out, w2, static_cast<const bf16*>(wa), gram, static_cast<const float*>(b), outputs, rank, scale);
  } else if (factor_bf16) {
    norm(out, w2, static_cast<const float*>(wa), gram, static_cast<const bf16*>(b), outputs, rank, scale);
  } else {
    norm(out, w2, static_cast<const float*>(wa), gram, static_cast<const float*>(b), outputs, rank, scale);
  }
}

void qdora_row_scale(float* m, float* s, int64_t out_bf16, void* out, const float* norm, const float* initial,
                     int64_t factor_bf16, const void* offset, const void* b, int64_t outputs, int64_t rank,
                     float factor) {
  if (out_bf16 && factor_bf16) {
    row_scale(m, s, static_cast<bf16*>(out), norm, initial, static_cast<const bf16*>(offset),
              static_cast<const bf16*>(b), outputs, rank, factor);
  } else if (out_bf16) {
    row_scale(m, s, static_cast<bf16*>(out), norm, initial, static_cast<const float*>(offset),
              static_cast<const float*>(b), outputs, rank, factor);
  } else if (factor_bf16) {
    row_scale(m, s, static_cast<float*>(out), norm, initial, static_cast<const bf16*>(offset),
              static_cast<const bf16*>(b), outputs, rank, factor);
  } else {
    row_scale(m, s, static_cast<float*>(out), norm, initial, static_cast<const float*>(offset),
              static_cast<const float*>(b), outputs, rank, factor);
  }
}
}
