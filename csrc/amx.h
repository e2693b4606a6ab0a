/* What AMX's files share.  None of them has run on a processor that has AMX: tests compile them with the tiles of
   tests/isas/amxemulation.h, which does in plain C what the manual says, and a processor that has it must pass a trial
   (trial.c) before they are chosen unasked.  No choice here was measured. */
#ifndef MG_AMX_H
#define MG_AMX_H
#include "kernels.h"

#ifdef MG_AMX
#include <immintrin.h>

#ifdef MG_AMX_EMULATED
#include "amxemulation.h"
#define MG_TILE_TARGET ""
#else
#define MG_TILE_TARGET ",amx-tile,amx-int8,amx-bf16"
#endif

enum { MG_TILE_ROWS = 16, MG_TILE_BYTES = 64 };     /* of a tile: rows, and bytes of a row; at most */

/* As LDTILECFG reads it: bytes of a row and rows of each tile, of which palette 1 has 8. */
struct mg_tiles {
    _Alignas(64) uint8_t palette;
    uint8_t start_row, none[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* What is written by now stands in memory, and what is read later is read there: gcc's intrinsics do not say which
   memory they read, nor STTILECFG's all that it writes. */
MG_INLINE void mg_tile_fence(const void *memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

/* To ask which configuration there is should cost less than to load one, which clears all tiles too, and it holds
   whatever else ran in this thread.  Tiles are not released: the next product wants the same, and idle processors are
   made to release theirs by Linux. */
MG_INLINE __attribute__((target("avx512f" MG_TILE_TARGET))) void mg_configure_tiles(const struct mg_tiles *wanted)
{
    struct mg_tiles now;
    mg_tile_fence(&now);
    _tile_storeconfig(&now);
    mg_tile_fence(wanted);
    if (_mm512_cmpneq_epi64_mask(_mm512_load_si512(&now), _mm512_load_si512(wanted)) != 0)
        _tile_loadconfig(wanted);
}
#endif
#endif
