// The loops of avx512_bf16 plus a panel product on matrix tiles (tdpbf16ps).
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "vec_avx512.h"
// The vector type must be known before the loops written over it.
#include "kernels.inc.h"
// These use the table of the loops.
#include "bf16_dot.h"

namespace dspark {
namespace {

constexpr int64_t kRows = 16;         // requests, or pairs of k, of a tile
constexpr int64_t kRowBytes = 64;     // 16 floats, or 32 bfloat16
constexpr int64_t kStep = kRankUnit;  // elements of rank per tile
constexpr int kOutBytes = kPanel * sizeof(float);

// Operand of ldtilecfg and sttilecfg.
struct alignas(64) TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "sttilecfg writes 64 bytes");

// Tiles 0-3 hold sums, 4 and 5 latents, 6 and 7 weights. `saved` is not aligned.
void begin(int64_t requests, void* saved) {
  _tile_storeconfig(saved);
  TileConfig config{};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = kRowBytes;
    config.rows[t] = static_cast<uint8_t>(t < 6 && requests < kRows ? requests : kRows);
  }
  // Compilers believe that the instruction reads a few bytes only.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// Leaves the tiles as they were found: torch's libraries use them too, and may remember
// on a thread that they have configured them.
void end(const void* saved) {
  if (*static_cast<const uint8_t*>(saved) == 0) {
    _tile_release();
  } else {
    _tile_loadconfig(saved);
  }
}

// At most 16 requests: four tiles of the vocabulary. `packed` has, per tile of the
// vocabulary, a row of 64 bytes for each pair of k: just what the product wants.
void block(const uint16_t* packed, int64_t rank, const uint16_t* latent, float* out) {
  const int64_t tile = rank * kTile, stride = rank * 2;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < rank; k += kStep) {
    const uint16_t* w = packed + k * kTile;
    _tile_loadd(4, latent + k, stride);
    _tile_loadd(6, w, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + tile, kRowBytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(6, w + 2 * tile, kRowBytes);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(7, w + 3 * tile, kRowBytes);
    _tile_dpbf16ps(3, 4, 7);
  }
  _tile_stored(0, out, kOutBytes);
  _tile_stored(1, out + kTile, kOutBytes);
  _tile_stored(2, out + 2 * kTile, kOutBytes);
  _tile_stored(3, out + 3 * kTile, kOutBytes);
}

// Two blocks of 16 requests, the second `second` requests further on, and two tiles of
// the vocabulary.
void two_blocks(const uint16_t* packed, int64_t rank, const uint16_t* latent,
                int64_t second, float* out) {
  const int64_t tile = rank * kTile, stride = rank * 2;
  const uint16_t* latent1 = latent + second * rank;
  float* out1 = out + second * kPanel;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < rank; k += kStep) {
    const uint16_t* w = packed + k * kTile;
    _tile_loadd(4, latent + k, stride);
    _tile_loadd(6, w, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, latent1 + k, stride);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(7, w + tile, kRowBytes);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, kOutBytes);
  _tile_stored(1, out1, kOutBytes);
  _tile_stored(2, out + kTile, kOutBytes);
  _tile_stored(3, out1 + kTile, kOutBytes);
}

// Requests that do not fill two blocks are computed by both.
void tile_panel(const uint16_t* packed, int64_t rank, const uint16_t* latent,
                int64_t requests, float* out) {
  if (requests <= kRows) {
    block(packed, rank, latent, out);
    return;
  }
  const int64_t second = requests - kRows;
  two_blocks(packed, rank, latent, second, out);
  two_blocks(packed + 2 * rank * kTile, rank, latent, second, out + 2 * kTile);
}

constexpr TileKernels kTiles = {2, 2 * kRows, begin, tile_panel, end};

constexpr KernelTable with_tiles() {
  KernelTable table = with_bf16_dot();
  table.tiles = &kTiles;
  return table;
}

constexpr KernelTable kTileTable = with_tiles();

}  // namespace

const KernelTable* const kAmxTable = &kTileTable;
}  // namespace dspark
#else
#include "kernels.h"

namespace dspark {
const KernelTable* const kAmxTable = nullptr;
}
#endif
