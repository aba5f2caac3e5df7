// A tile of W = sum of outer products stays in registers over all rows of an environment. Then W is
// added to the tile's sums and its signs to the tile's votes, both in L1, and the next environment
// begins. Elements add their rows, and environments, in the order given, so that the result does
// not depend on blocks.
#include "outer.h"

#include "../../../math/agreement.h"
#include "pack.h"
#include "vectors.h"

namespace andmask {
namespace {

#define ANDMASK_UNROLL _Pragma("GCC unroll 64")

// Accumulators take most of the 32 or 16 registers.
template <typename F>
struct TileShape {
  static constexpr int kParts = kOuterLanes / kLanes<F>;  // registers for one vector of columns
#if defined(__AVX512F__)
  static constexpr int kVectors = 4 / kParts;
  static constexpr int kRows = 6;
#elif defined(__AVX2__)
  static constexpr int kVectors = 1;
  static constexpr int kRows = 12 / kParts;
#else
  static constexpr int kVectors = 1;
  static constexpr int kRows = kParts <= 4 ? 3 : 1;
#endif
  static constexpr int kNarrow = kVectors > 1 ? kVectors / 2 : 1;
  static constexpr int kTaps = kParts < 12 ? 12 / kParts : 1;
};

// ---- votes: the signs of a finished tile ----

#if defined(__AVX2__)
// Read as integers, floats keep sign and zero through saturating packs: four registers of floats
// become one of bytes, clamped to votes. -0 would vote; `kCareful` removes it, and NaN.
// The packs are asm, because GCC copies and spills accumulators that are cast to integers.
#if defined(__AVX512F__)
using Bytes = __m512i;

ANDMASK_INLINE Bytes pack_words(__m512 low, __m512 high) {
  Bytes words;
  asm("vpackssdw %2,%1,%0" : "=v"(words) : "v"(low), "v"(high));
  return words;
}

ANDMASK_INLINE Bytes clamped_bytes(Bytes low, Bytes high) {
  return _mm512_max_epi8(_mm512_min_epi8(_mm512_packs_epi16(low, high), _mm512_set1_epi8(1)),
                         _mm512_set1_epi8(-1));
}

ANDMASK_INLINE void add_bytes(int8_t* votes, Bytes signs) {
  _mm512_storeu_si512(votes, _mm512_add_epi8(signs, _mm512_loadu_si512(votes)));
}

ANDMASK_INLINE __m512 votable(__m512 w) {
  return _mm512_maskz_add_ps(_mm512_cmp_ps_mask(w, w, _CMP_ORD_Q), w, _mm512_setzero_ps());
}
#else
using Bytes = __m256i;

ANDMASK_INLINE Bytes pack_words(__m256 low, __m256 high) {
  Bytes words;
  asm("vpackssdw %2,%1,%0" : "=x"(words) : "x"(low), "x"(high));
  return words;
}

ANDMASK_INLINE Bytes clamped_bytes(Bytes low, Bytes high) {
  return _mm256_max_epi8(_mm256_min_epi8(_mm256_packs_epi16(low, high), _mm256_set1_epi8(1)),
                         _mm256_set1_epi8(-1));
}

ANDMASK_INLINE void add_bytes(int8_t* votes, Bytes signs) {
  auto* const stored = reinterpret_cast<__m256i*>(votes);
  _mm256_storeu_si256(stored, _mm256_add_epi8(signs, _mm256_loadu_si256(stored)));
}

ANDMASK_INLINE __m256 votable(__m256 w) {
  return _mm256_and_ps(_mm256_cmp_ps(w, w, _CMP_ORD_Q), _mm256_add_ps(w, _mm256_setzero_ps()));
}
#endif

template <bool kCareful, int kRegisters>
ANDMASK_INLINE void finish(const Vector<float>* tile, float weight, float* __restrict sum,
                           int8_t* __restrict votes) {
  static_assert(kRegisters % 4 == 0);
  constexpr int kWide = kLanes<float>;
  ANDMASK_UNROLL
  for (int group = 0; group < kRegisters / 4; ++group) {
    const Vector<float>* const w = tile + 4 * group;
    Bytes low, high;
    if constexpr (kCareful) {
      low = pack_words(votable(w[0]), votable(w[1]));
      high = pack_words(votable(w[2]), votable(w[3]));
    } else {
      low = pack_words(w[0], w[1]);
      high = pack_words(w[2], w[3]);
    }
    ANDMASK_UNROLL
    for (int i = 0; i < 4; ++i) {
      float* const to = sum + (4 * group + i) * kWide;
      store(to, (kCareful ? w[i] * broadcast(weight) : w[i]) + load(to));
    }
    add_bytes(votes + 4 * group * kWide, clamped_bytes(low, high));
    asm volatile("" ::: "memory");  // keeps GCC from starting, and spilling, the next group
  }
}

// Restores the order of the bytes, which the packs change, because they work on 128 bits each.
void order_votes(int8_t* votes, int64_t size) {
  typedef int32_t Words __attribute__((vector_size(kVectorBytes)));
  constexpr int kWords = kVectorBytes / 4;
  Words from;
  for (int word = 0; word < kWords; ++word)
    from[word] = word % (kWords / 4) * 4 + word / (kWords / 4);
  for (int64_t i = 0; i < size; i += kVectorBytes) {
    Words words;
    __builtin_memcpy(&words, votes + i, sizeof words);
    words = __builtin_shuffle(words, from);
    __builtin_memcpy(votes + i, &words, sizeof words);
  }
}
#endif  // __AVX2__

template <typename F, int kSize>
ANDMASK_INLINE void finish_plain(const F* __restrict tile, F weight, F* __restrict sum,
                                 int8_t* __restrict votes) {
  for (int i = 0; i < kSize; ++i) sum[i] += tile[i] * weight;
  for (int i = 0; i < kSize; ++i) votes[i] = static_cast<int8_t>(votes[i] + sign(tile[i]));
}

// ---- the tile ----

template <typename F, int kRows, int kVectors, bool kLanewise, bool kCareful>
void accumulate_tile(const OuterTile& task) {
  constexpr int kParts = TileShape<F>::kParts;
  constexpr int kWide = kVectors * kParts;
  constexpr int kUnroll = 4;
  constexpr int64_t kOutputStep = kLanewise ? kOuterLanePitch : 1;
  using V = Vector<F>;
  const F* columns[kVectors];
  ANDMASK_UNROLL
  for (int v = 0; v < kVectors; ++v) columns[v] = static_cast<const F*>(task.columns[v]);
  const int32_t* offsets = task.row_offsets;
  const F* outputs = static_cast<const F*>(task.outputs);
  auto* const partial = static_cast<F*>(task.partial);
  for (int64_t environment = 0; environment < task.environments; ++environment) {
    V tile[kRows * kWide];
    if (environment == 0 && task.resumes) {
      ANDMASK_UNROLL
      for (int i = 0; i < kRows * kWide; ++i) tile[i] = load(partial + i * kLanes<F>);
    } else {
      ANDMASK_UNROLL
      for (int i = 0; i < kRows * kWide; ++i) tile[i] = V{};
    }
    const auto add_row = [&](int u) __attribute__((always_inline)) {
      const int64_t offset = offsets[u];
      const auto column = [&](int j) __attribute__((always_inline)) {
        return load(columns[j / kParts] + offset + j % kParts * kLanes<F>);
      };
      if constexpr (kLanewise) {
        V d[kParts];
        ANDMASK_UNROLL
        for (int j = 0; j < kParts; ++j) d[j] = load(outputs + u * kOutputStep + j * kLanes<F>);
        ANDMASK_UNROLL
        for (int j = 0; j < kWide; ++j) tile[j] = multiply_add(d[j % kParts], column(j), tile[j]);
      } else {
        V a[kWide];
        ANDMASK_UNROLL
        for (int j = 0; j < kWide; ++j) a[j] = column(j);
        ANDMASK_UNROLL
        for (int i = 0; i < kRows; ++i) {
          const V d = broadcast(outputs[i * kOuterPitch + u]);
          ANDMASK_UNROLL
          for (int j = 0; j < kWide; ++j) {
            tile[i * kWide + j] = multiply_add(d, a[j], tile[i * kWide + j]);
          }
        }
      }
    };
    int64_t rows = task.rows[environment];
    for (; rows >= kUnroll; rows -= kUnroll) {
      ANDMASK_UNROLL
      for (int u = 0; u < kUnroll; ++u) add_row(u);
      offsets += kUnroll;
      outputs += kUnroll * kOutputStep;
    }
    for (; rows > 0; --rows) {
      add_row(0);
      ++offsets;
      outputs += kOutputStep;
    }
    if (environment + 1 == task.environments && task.suspends) {
      ANDMASK_UNROLL
      for (int i = 0; i < kRows * kWide; ++i) store(partial + i * kLanes<F>, tile[i]);
      return;
    }
    auto* const sum = static_cast<F*>(task.sum);
    const F weight = task.weights ? static_cast<F>(task.weights[environment]) : F(1);
#if defined(__AVX2__)
    if constexpr (sizeof(F) == sizeof(float)) {
      finish<kCareful, kRows * kWide>(tile, weight, sum, task.votes);
      continue;
    }
#endif
    alignas(kVectorBytes) F stored[kRows * kVectors * kOuterLanes];
    ANDMASK_UNROLL
    for (int i = 0; i < kRows * kWide; ++i) store(stored + i * kLanes<F>, tile[i]);
    finish_plain<F, kRows * kVectors * kOuterLanes>(stored, weight, sum, task.votes);
  }
}

template <typename F, int kRows, int kVectors, bool kLanewise>
void accumulate_kind(const OuterTile& task) {
  task.careful ? accumulate_tile<F, kRows, kVectors, kLanewise, true>(task)
               : accumulate_tile<F, kRows, kVectors, kLanewise, false>(task);
}

template <typename F>
void accumulate(const OuterTile& task, OuterTileKind kind) {
  using Shape = TileShape<F>;
  switch (kind) {
    case OuterTileKind::lanes: return accumulate_kind<F, 1, Shape::kTaps, true>(task);
    case OuterTileKind::narrow:
      return accumulate_kind<F, Shape::kRows, Shape::kNarrow, false>(task);
    default: return accumulate_kind<F, Shape::kRows, Shape::kVectors, false>(task);
  }
}

// ---- from the tile to the moments ----

template <typename T, typename From>
void flush_array(const From* __restrict tile, const OuterFlush& task, int64_t columns,
                 T* __restrict array) {
  if (!array) return;
  for (int64_t output = 0; output < task.outputs; ++output, tile += columns) {
    T* const row = array + output * task.output_stride;
    for (int64_t vector = 0; vector < columns; vector += kOuterLanes) {
      const int64_t* const offsets = task.lane_offsets + vector;
      const From* const from = tile + vector;
      bool contiguous = offsets[0] >= 0;
      for (int lane = 1; lane < kOuterLanes; ++lane) {
        contiguous &= offsets[lane] == offsets[0] + lane;
      }
      if (contiguous) {
        T* const to = row + offsets[0];
        for (int lane = 0; lane < kOuterLanes; ++lane) {
          to[lane] = static_cast<T>((task.first ? T(0) : to[lane]) + from[lane]);
        }
      } else {
        for (int lane = 0; lane < kOuterLanes; ++lane) {
          if (offsets[lane] < 0) continue;
          T& to = row[offsets[lane]];
          to = static_cast<T>((task.first ? T(0) : to) + from[lane]);
        }
      }
    }
  }
}

template <typename F>
constexpr OuterTileShape shape(OuterTileKind kind) {
  using Shape = TileShape<F>;
  if (kind == OuterTileKind::lanes) return {1, Shape::kTaps};
  return {Shape::kRows, kind == OuterTileKind::narrow ? Shape::kNarrow : Shape::kVectors};
}

template <typename F>
void flush(const OuterFlush& task, OuterTileKind kind) {
  const int64_t columns = shape<F>(kind).vectors * kOuterLanes;
  flush_array(static_cast<const F*>(task.sum), task, columns, static_cast<F*>(task.moments.sum));
  void* const votes = task.moments.votes;
  if (!votes) return;
#if defined(__AVX2__)
  if (sizeof(F) == sizeof(float)) order_votes(task.votes, shape<F>(kind).rows * columns);
#endif
  switch (task.moments.vote_bytes) {
    case 1: return flush_array(task.votes, task, columns, static_cast<int8_t*>(votes));
    case 2: return flush_array(task.votes, task, columns, static_cast<int16_t*>(votes));
    default: return flush_array(task.votes, task, columns, static_cast<int32_t*>(votes));
  }
}

}  // namespace

namespace ANDMASK_ISA {
extern const OuterKernels outer_kernels = {
    {{shape<float>(OuterTileKind::wide), shape<float>(OuterTileKind::narrow),
      shape<float>(OuterTileKind::lanes)},
     {shape<double>(OuterTileKind::wide), shape<double>(OuterTileKind::narrow),
      shape<double>(OuterTileKind::lanes)}},
    {pack_columns<Half>, pack_columns<BFloat16>, pack_columns<float>, pack_columns<double>},
    {pack_outputs<Half>, pack_outputs<BFloat16>, pack_outputs<float>, pack_outputs<double>},
    {accumulate<float>, accumulate<double>},
    {flush<float>, flush<double>},
};
}  // namespace ANDMASK_ISA

}  // namespace andmask
