#include "sign_outer.h"

#include "../../../math/agreement.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace andmask {
namespace {

constexpr int64_t kBlockGroups = kSignBlock / kSignGroup;

ANDMASK_INLINE int64_t groups_of(int64_t environments) {
  return (environments + kSignGroup - 1) / kSignGroup;
}

ANDMASK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- packing ----

// bytes = 2 * bytes + the signs of one row.
template <typename T>
void shift_in(const T* __restrict values, uint8_t* __restrict bytes) {
  decltype(sign(T())) signs[kSignPanel];
  int8_t narrow[kSignPanel];
  for (int64_t i = 0; i < kSignPanel; ++i) signs[i] = sign(values[i]);
  for (int64_t i = 0; i < kSignPanel; ++i) narrow[i] = static_cast<int8_t>(signs[i]);
  for (int64_t i = 0; i < kSignPanel; ++i) {
    const uint8_t bit = narrow[i] < 0 ? 0x10 : static_cast<uint8_t>(narrow[i]);
    bytes[i] = static_cast<uint8_t>(bytes[i] + bytes[i] + bit);
  }
}

// Packs row by row, as they lie in memory.
template <typename T>
void pack(const SignMatrix& matrix, int64_t begin, int64_t end, uint8_t* packed) {
  const int64_t panel_bytes = groups_of(matrix.environments) * kSignPanel;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * kSignGroup;
    const int64_t rows = smaller(kSignGroup, matrix.environments - first);
    uint8_t* target = packed + group * kSignPanel;
    for (int64_t panel = 0; panel < matrix.columns; panel += kSignPanel, target += panel_bytes) {
      const int64_t columns = smaller(kSignPanel, matrix.columns - panel);
      const T* const corner = static_cast<const T*>(matrix.values) + first * matrix.row_stride +
                              panel * matrix.column_stride;
      const bool whole = columns == kSignPanel && matrix.column_stride == 1;
      uint8_t bytes[kSignPanel] = {};
      for (int64_t row = rows - 1; row >= 0; --row) {
        const T* const source = corner + row * matrix.row_stride;
        T gathered[kSignPanel] = {};
        if (!whole) {
          for (int64_t i = 0; i < columns; ++i) gathered[i] = source[i * matrix.column_stride];
        }
        shift_in(whole ? source : gathered, bytes);
      }
      memcpy(target, bytes, kSignPanel);
    }
  }
}

// ---- voting ----

template <typename V>
void add_votes(const int8_t* __restrict block, int64_t columns, bool first, V* __restrict votes) {
  if (first) {
    for (int64_t i = 0; i < columns; ++i) votes[i] = block[i];
  } else {
    for (int64_t i = 0; i < columns; ++i) votes[i] = static_cast<V>(votes[i] + block[i]);
  }
}

// Adds one row of votes from column `column` on.
ANDMASK_INLINE void add_votes(const SignOuterTask& task, int64_t row, int64_t column,
                              int64_t columns, bool first, const int8_t* block) {
  const int64_t offset = row * task.stride + column;
  switch (task.vote_bytes) {
    case 1: return add_votes(block, columns, first, static_cast<int8_t*>(task.votes) + offset);
    case 2: return add_votes(block, columns, first, static_cast<int16_t*>(task.votes) + offset);
    default: return add_votes(block, columns, first, static_cast<int32_t*>(task.votes) + offset);
  }
}

// One block of environments: `groups` groups from `group` on.
struct Block {
  int64_t group, groups;
  bool first;
};

#if defined(__AVX2__)

// A byte shuffle looks up sixteen entries at once. For four signs of d the table holds the votes of
// every set of four environments: a positive a adds the sign of d, a negative a subtracts it. If a
// has no zeros, one lookup in a second table gives both.
// This is as fast as counting bits (vpopcntb, 0.85 to 1.2 times; vpopcntd is slower), which needs a
// level beyond x86-64-v4, and zeros of d cost nothing.
struct Tables {
  alignas(64) int8_t of[256][16];
};

constexpr Tables make_tables(bool no_zeros) {
  Tables tables{};
  for (int signs = 0; signs < 256; ++signs) {
    for (int set = 0; set < 16; ++set) {
      int votes = 0;
      for (int bit = 0; bit < 4; ++bit) {
        const int vote = (signs >> bit & 1) - (signs >> (bit + 4) & 1);
        votes += set >> bit & 1 ? vote : no_zeros ? -vote : 0;
      }
      tables.of[signs][set] = static_cast<int8_t>(votes);
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables(false);
constexpr Tables kNoZeroTables = make_tables(true);

#if defined(__AVX512BW__)
using Bytes = __m512i;

ANDMASK_INLINE Bytes load(const void* bytes) { return _mm512_loadu_si512(bytes); }
ANDMASK_INLINE void store(void* bytes, Bytes value) { _mm512_storeu_si512(bytes, value); }
ANDMASK_INLINE Bytes zero() { return _mm512_setzero_si512(); }
ANDMASK_INLINE Bytes add(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
ANDMASK_INLINE Bytes subtract(Bytes a, Bytes b) { return _mm512_sub_epi8(a, b); }
ANDMASK_INLINE Bytes low_bits(Bytes a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
ANDMASK_INLINE Bytes high_bits(Bytes a) { return low_bits(_mm512_srli_epi16(a, 4)); }
ANDMASK_INLINE Bytes look_up(Bytes table, Bytes sets) { return _mm512_shuffle_epi8(table, sets); }
ANDMASK_INLINE Bytes repeat(const int8_t* table) {
  return _mm512_maskz_broadcast_i32x4(0xffff,
                                      _mm_load_si128(reinterpret_cast<const __m128i*>(table)));
}
#else
using Bytes = __m256i;

ANDMASK_INLINE Bytes load(const void* bytes) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(bytes));
}
ANDMASK_INLINE void store(void* bytes, Bytes value) {
  _mm256_storeu_si256(static_cast<__m256i*>(bytes), value);
}
ANDMASK_INLINE Bytes zero() { return _mm256_setzero_si256(); }
ANDMASK_INLINE Bytes add(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
ANDMASK_INLINE Bytes subtract(Bytes a, Bytes b) { return _mm256_sub_epi8(a, b); }
ANDMASK_INLINE Bytes low_bits(Bytes a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
ANDMASK_INLINE Bytes high_bits(Bytes a) { return low_bits(_mm256_srli_epi16(a, 4)); }
ANDMASK_INLINE Bytes look_up(Bytes table, Bytes sets) { return _mm256_shuffle_epi8(table, sets); }
ANDMASK_INLINE Bytes repeat(const int8_t* table) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
}
#endif

constexpr int kBytes = sizeof(Bytes);
// The accumulators of a tile and their operands fill the registers.
constexpr int kTileRows = 4;
constexpr int kTileVectors = kBytes == 64 ? 4 : 2;

#define ANDMASK_UNROLL _Pragma("GCC unroll 64")  // else the sums are not kept in registers

// Counts votes of kRows rows and kVectors vectors of columns, `stride` bytes from one row to the
// next.
template <int kRows, int kVectors, bool kNoZeros>
void vote_tile(const uint8_t* const* activations, const uint8_t* grad_outputs, int64_t groups,
               int8_t* votes, int64_t stride) {
  Bytes sums[kRows][kVectors];
  ANDMASK_UNROLL
  for (int row = 0; row < kRows; ++row) {
    ANDMASK_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[row][v] = zero();
  }
  for (int64_t group = 0; group < groups; ++group) {
    Bytes positive[kVectors], negative[kVectors];
    ANDMASK_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const Bytes sets = load(activations[v] + group * kSignPanel);
      positive[v] = low_bits(sets);
      if constexpr (!kNoZeros) negative[v] = high_bits(sets);
    }
    ANDMASK_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const uint8_t signs = grad_outputs[group * kSignPanel + row];
      const Bytes table = repeat((kNoZeros ? kNoZeroTables : kTables).of[signs]);
      ANDMASK_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        sums[row][v] = add(sums[row][v], look_up(table, positive[v]));
        if constexpr (!kNoZeros) {
          sums[row][v] = subtract(sums[row][v], look_up(table, negative[v]));
        }
      }
    }
  }
  ANDMASK_UNROLL
  for (int row = 0; row < kRows; ++row) {
    ANDMASK_UNROLL
    for (int v = 0; v < kVectors; ++v) store(votes + row * stride + v * kBytes, sums[row][v]);
  }
}

// True if a block of environments has no zeros in a vector of columns.
bool is_free_of_zeros(const SignOuterTask& task, const Block& block, const uint8_t* packed) {
  uint8_t zeros[kBytes] = {};
  for (int64_t group = 0; group < block.groups; ++group, packed += kSignPanel) {
    const int64_t rows = task.environments - (block.group + group) * kSignGroup;
    const int absent = rows < kSignGroup ? 15 << rows : 0;  // where there are no environments
    for (int i = 0; i < kBytes; ++i) {
      zeros[i] |= static_cast<uint8_t>(~(packed[i] | packed[i] >> 4 | absent) & 15);
    }
  }
  int any = 0;
  for (int i = 0; i < kBytes; ++i) any |= zeros[i];
  return any == 0;
}

template <int kRows, int kVectors>
void vote_columns(const SignOuterTask& task, const Block& block, const uint8_t* const* activations,
                  bool no_zeros, int64_t row, int64_t column) {
  const int64_t panel_bytes = groups_of(task.environments) * kSignPanel;
  const uint8_t* const grad_outputs = task.grad_outputs + row / kSignPanel * panel_bytes +
                                      block.group * kSignPanel + row % kSignPanel;
  constexpr int64_t kColumns = kVectors * kBytes;
  alignas(64) int8_t votes[kRows * kColumns];
  const auto tile = no_zeros ? vote_tile<kRows, kVectors, true> : vote_tile<kRows, kVectors, false>;
  tile(activations, grad_outputs, block.groups, votes, kColumns);
  const int64_t columns = smaller(kColumns, task.inputs - column);
  for (int i = 0; i < kRows; ++i) {
    add_votes(task, row + i, column, columns, block.first, votes + i * kColumns);
  }
}

template <int kVectors>
void vote_rows(const SignOuterTask& task, const Block& block, int64_t begin, int64_t end,
               int64_t column) {
  const int64_t panel_bytes = groups_of(task.environments) * kSignPanel;
  const uint8_t* activations[kVectors];
  bool no_zeros = true;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = column + v * kBytes;
    activations[v] = task.activations + at / kSignPanel * panel_bytes + block.group * kSignPanel +
                     at % kSignPanel;
    no_zeros = no_zeros && is_free_of_zeros(task, block, activations[v]);
  }
  int64_t row = begin;
  for (; row + kTileRows <= end; row += kTileRows) {
    vote_columns<kTileRows, kVectors>(task, block, activations, no_zeros, row, column);
  }
  for (; row < end; ++row) {
    vote_columns<1, kVectors>(task, block, activations, no_zeros, row, column);
  }
}

void vote_block(const SignOuterTask& task, const Block& block, int64_t row_begin, int64_t row_end,
                int64_t begin, int64_t end) {
  int64_t column = begin;
  for (; column + (kTileVectors - 1) * kBytes < end; column += kTileVectors * kBytes) {
    vote_rows<kTileVectors>(task, block, row_begin, row_end, column);
  }
  for (; column < end; column += kBytes) vote_rows<1>(task, block, row_begin, row_end, column);
}

#else

ANDMASK_INLINE int8_t unpack(uint8_t byte, int64_t bit) {
  return static_cast<int8_t>((byte >> bit & 1) - (byte >> (bit + 4) & 1));
}

// Without a byte shuffle signs are unpacked to bytes once for all rows, and masks add them,
// subtract them or leave them out.
void vote_block(const SignOuterTask& task, const Block& block, int64_t row_begin, int64_t row_end,
                int64_t begin, int64_t end) {
  const int64_t panel_bytes = groups_of(task.environments) * kSignPanel;
  for (int64_t column = begin; column < end; column += kSignPanel) {
    alignas(64) int8_t signs[kSignBlock][kSignPanel];
    const uint8_t* const activations =
        task.activations + column / kSignPanel * panel_bytes + block.group * kSignPanel;
    for (int64_t e = 0; e < block.groups * kSignGroup; ++e) {
      for (int64_t i = 0; i < kSignPanel; ++i) {
        signs[e][i] = unpack(activations[e / kSignGroup * kSignPanel + i], e % kSignGroup);
      }
    }
    for (int64_t row = row_begin; row < row_end; ++row) {
      const uint8_t* const grad_outputs = task.grad_outputs + row / kSignPanel * panel_bytes +
                                          block.group * kSignPanel + row % kSignPanel;
      alignas(64) int8_t votes[kSignPanel] = {};
      int8_t flips = 0;
      for (int64_t group = 0; group < block.groups; ++group) {
        int8_t kept[kSignGroup], flipped[kSignGroup];  // masks
        for (int64_t e = 0; e < kSignGroup; ++e) {
          const int8_t sign = unpack(grad_outputs[group * kSignPanel], e);
          kept[e] = static_cast<int8_t>(sign ? -1 : 0);
          flipped[e] = static_cast<int8_t>(sign < 0 ? -1 : 0);
          flips = static_cast<int8_t>(flips + flipped[e]);
        }
        const int8_t (*const four)[kSignPanel] = signs + group * kSignGroup;
        for (int64_t i = 0; i < kSignPanel; ++i) {
          int8_t vote = votes[i];
          for (int64_t e = 0; e < kSignGroup; ++e) {
            vote = static_cast<int8_t>(vote + ((four[e][i] & kept[e]) ^ flipped[e]));
          }
          votes[i] = vote;
        }
      }
      for (int64_t i = 0; i < kSignPanel; ++i) votes[i] = static_cast<int8_t>(votes[i] - flips);
      add_votes(task, row, column, smaller(kSignPanel, task.inputs - column), block.first, votes);
    }
  }
}

#endif

void vote(const SignOuterTask& task, int64_t row_panel, int64_t begin, int64_t end) {
  const int64_t groups = groups_of(task.environments);
  const int64_t row = row_panel * kSignPanel;
  const int64_t row_end = smaller(row + kSignPanel, task.outputs);
  const int64_t column_end = smaller(end * kSignPanel, task.inputs);
  for (int64_t group = 0; group < groups; group += kBlockGroups) {
    const Block block{group, smaller(kBlockGroups, groups - group), task.first && group == 0};
    vote_block(task, block, row, row_end, begin * kSignPanel, column_end);
  }
}

}  // namespace

namespace ANDMASK_ISA {
extern const SignOuterKernels sign_outer_kernels = {
    {pack<Half>, pack<BFloat16>, pack<float>, pack<double>}, vote};
}  // namespace ANDMASK_ISA

}  // namespace andmask
