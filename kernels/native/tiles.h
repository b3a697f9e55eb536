// Products of tiles of bfloat16, summed in float32: Intel's AMX, or the same in plain code, for tests.

#pragma once

#include <cstdint>
#include <initializer_list>

#include "simd.h"
#include "site.h"

#if (defined(__AMX_BF16__) || defined(__AMXBF16__)) && defined(__linux__)  // GCC's and Clang's names
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define PRESCORE_AMX 1
#endif

namespace prescore {

constexpr int64_t SIDE = 16;           // rows and columns of a tile of sums
constexpr int64_t STEP_OF = 2 * SIDE;  // numbers that one product of tiles sums over
constexpr int64_t HALF_STEP = SIDE;    // the same of weights and values, a block of keys

// Whether this processor has tiles; and whether products of them can be asked for: what the system grants where there
// are tiles, else their plain code.
#if defined(PRESCORE_AMX)
constexpr bool HAVE_TILES = true;
inline bool may_use_tiles() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return granted;
}
#else
constexpr bool HAVE_TILES = false;
inline bool may_use_tiles() { return true; }
#endif

// Whatever was written is in memory, this too: GCC's intrinsics of tiles do not say that they read it.
inline void settle(const void* written) { __asm__ volatile("" : : "r"(written) : "memory"); }

// A thread's tiles, set up as long as this lives; then as they were, for whoever else uses them.
struct Tiles {
#if defined(PRESCORE_AMX)
  struct alignas(64) Setup {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Setup before;
  bool on;

  explicit Tiles(bool wanted) : on(wanted) {
    if (!on) return;
    settle(&before);
    _tile_storeconfig(&before);
    settle(&before);
    Setup mine;
    for (int tile = 0; tile < 8; ++tile) {
      mine.bytes[tile] = tile == 3 ? 2 * HALF_STEP : 4 * SIDE;  // 3: weights
      mine.rows[tile] = tile == 4 ? HALF_STEP / 2 : SIDE;       // 4: values
    }
    settle(&mine);
    _tile_loadconfig(&mine);
  }
  ~Tiles() {
    if (!on) return;
    if (before.palette)
      _tile_loadconfig(&before);
    else
      _tile_release();
  }
  Tiles(const Tiles&) = delete;
#else
  explicit Tiles(bool) {}
#endif
};

#if !defined(PRESCORE_AMX)
// to[i][j] = sum over p of a[i][p] * b[p / 2][j][p % 2].
inline void plain_product(const uint16_t* a, int64_t a_row, const uint16_t* b, int64_t b_row, int64_t inner, float* to,
                          int64_t to_row, bool add) {
  for (int64_t i = 0; i < SIDE; ++i)
    for (int64_t j = 0; j < SIDE; ++j) {
      float sum = add ? to[i * to_row + j] : 0.0f;
      for (int64_t p = 0; p < inner; ++p) sum += widen(a[i * a_row + p]) * widen(b[p / 2 * b_row + 2 * j + p % 2]);
      to[i * to_row + j] = sum;
    }
}
#endif

constexpr int SUMS = 4;  // at once: one product of tiles takes so long that several must be under way

// Of each sum: 16 rows, and 16 columns [steps][16 pairs of features][16][2].
struct Factors {
  const uint16_t *row[SUMS], *column[SUMS];
};

// The first N sums [16][16] of products of rows, `row_size` numbers apart, and columns, of 32 * steps features.
template <int N>
inline void tile_sums(float* to, int64_t row_size, int64_t steps, std::initializer_list<Factors> products) {
#if defined(PRESCORE_AMX)
#define PRESCORE_ADD(which, tile)                                            \
  if constexpr (which < N) {                                                 \
    _tile_loadd(1, factors.row[which] + step * STEP_OF, row_size * 2);       \
    _tile_loadd(2, factors.column[which] + step * STEP_OF * SIDE, 4 * SIDE); \
    _tile_dpbf16ps(tile, 1, 2);                                              \
  }
#define PRESCORE_STORE(which, tile) \
  if constexpr (which < N) _tile_stored(tile, to + which * SIDE * SIDE, 4 * SIDE);
  settle(to);
  _tile_zero(0);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (const Factors& factors : products)
    for (int64_t step = 0; step < steps; ++step) {
      PRESCORE_ADD(0, 0)
      PRESCORE_ADD(1, 5)
      PRESCORE_ADD(2, 6)
      PRESCORE_ADD(3, 7)
    }
  PRESCORE_STORE(0, 0)
  PRESCORE_STORE(1, 5)
  PRESCORE_STORE(2, 6)
  PRESCORE_STORE(3, 7)
#undef PRESCORE_ADD
#undef PRESCORE_STORE
#else
  for (int which = 0; which < N; ++which) {
    bool add = false;
    for (const Factors& factors : products)
      for (int64_t step = 0; step < steps; ++step, add = true)
        plain_product(factors.row[which] + step * STEP_OF, row_size, factors.column[which] + step * STEP_OF * SIDE,
                      STEP_OF, STEP_OF, to + which * SIDE * SIDE, SIDE, add);
  }
#endif
}

// The same of as many as there are.
inline void tile_sums(float* to, int64_t row_size, int64_t steps, const Factors& factors, int count) {
  switch (count) {
    case 1: return tile_sums<1>(to, row_size, steps, {factors});
    case 2: return tile_sums<2>(to, row_size, steps, {factors});
    case 3: return tile_sums<3>(to, row_size, steps, {factors});
    default: return tile_sums<SUMS>(to, row_size, steps, {factors});
  }
}

// Sums [16][width] of N blocks of values [width / 16][8 pairs of keys][16][2] by weights [16][N * 16].
template <int N>
inline void tile_values(const uint16_t* weight, const uint16_t* const* value, int64_t width, float* to) {
  constexpr int64_t PART = HALF_STEP * SIDE;
#if defined(PRESCORE_AMX)
#define PRESCORE_ADD(tile, part)                \
  _tile_loadd(4, from + part * PART, 4 * SIDE); \
  _tile_dpbf16ps(tile, 3, 4);
  settle(weight);
  int64_t column = 0;
  for (; column + 4 * SIDE <= width; column += 4 * SIDE) {
    _tile_zero(0);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int b = 0; b < N; ++b) {
      const uint16_t* from = value[b] + column / SIDE * PART;
      _tile_loadd(3, weight + b * HALF_STEP, 2 * N * HALF_STEP);
      PRESCORE_ADD(0, 0)
      PRESCORE_ADD(5, 1)
      PRESCORE_ADD(6, 2)
      PRESCORE_ADD(7, 3)
    }
    _tile_stored(0, to + column, width * 4);
    _tile_stored(5, to + column + SIDE, width * 4);
    _tile_stored(6, to + column + 2 * SIDE, width * 4);
    _tile_stored(7, to + column + 3 * SIDE, width * 4);
  }
  for (; column < width; column += SIDE) {
    _tile_zero(0);
    for (int b = 0; b < N; ++b) {
      const uint16_t* from = value[b] + column / SIDE * PART;
      _tile_loadd(3, weight + b * HALF_STEP, 2 * N * HALF_STEP);
      PRESCORE_ADD(0, 0)
    }
    _tile_stored(0, to + column, width * 4);
  }
#undef PRESCORE_ADD
#else
  for (int b = 0; b < N; ++b)
    for (int64_t column = 0; column < width; column += SIDE)
      plain_product(weight + b * HALF_STEP, N * HALF_STEP, value[b] + column / SIDE * PART, STEP_OF, HALF_STEP,
                    to + column, width, b > 0);
#endif
}

}  // namespace prescore
