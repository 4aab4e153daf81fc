// What the kernel of nearest.cu is given, and what its threads carry.
//
// Compiled with DIMS (a multiple of 64), CODES (of a level, a multiple of 256), LEVELS (of this launch).

constexpr int ROWS = 128, UNIT = 128, DEPTH = 64;  // vectors of a block, codes of a unit, dims of a chunk
constexpr int CHUNKS = DIMS / DEPTH, UNITS = CODES / UNIT;
constexpr int X_BYTES = ROWS * DEPTH * 2, C_BYTES = UNIT * DEPTH * 2;
constexpr int SPACE = 227 * 1024 - 2048;  // shared memory less alignment and barriers
constexpr int FREE = (SPACE - CHUNKS * X_BYTES) / C_BYTES;
constexpr int STAGES = FREE < 8 ? FREE : 8;             // chunks of codes under way
constexpr int PIECES = 8;                               // of a unit's scores, 16 codes each
constexpr int EARLIER = LEVELS > 1 ? LEVELS - 1 : 1;    // rows of bias that a score can need
constexpr int ROW4 = CODES / 4, TABLE4 = CODES * ROW4;  // float4 of a row of bias, of a table
constexpr int LOW_BITS = 31;                            // of a score, which hold its place in a thread's unit
constexpr float CUT = 4.0f * 32 / (1 << 23);            // the share of a score that those take, with a margin
constexpr int LARGEST = 0x7F7FFFFF;                     // bits of the largest float32
constexpr u32 NONE = 0xFFFF;                            // no code

struct Level {
    float a, b, c, floor;  // a score errs by at most a |r| + b |x| + c |lost| + floor
    int codes;             // without padding
};

struct Task {
    const unsigned char* codes;  // (LEVELS, UNITS, CHUNKS, 128 codes, 64 dims) of float16 -2 c, swizzled
    const float4* bias;          // |c|^2 of the first level; for each (level, earlier) 2 c_j.c (CODES, CODES)
    const float* lost;           // (n) bound on what float16 took of a vector, or null
    int* found;                  // (n, stride) codes
    int* runner;                 // (n, stride) second nearest; where many are near a slot, or -1: all codes
    unsigned short* slots;       // (slots_most, 8) codes that may be nearest, NONE elsewhere
    int* doubt;                  // (n) bit l: the runner may be nearer; bit 16 + l: another code may be
    int* list;                   // rows with doubts, after the last level
    int* counts;                 // how many rows are listed; how many slots are taken
    int n, first, stride, last;  // rows, first level, levels in all, whether this launch has the last
    int slots_most;
    Level level[LEVELS];
};

// Addresses in shared memory: chunks, and the barriers that say which are full and which are free.
struct Shared {
    u32 x, c, x_full, x_free, c_full, c_free, spare;
};

// The three least scores of a thread's share of a row, and the units (later the codes) of the first two.
struct Least {
    int key[3], unit[2];
};

// What two rows of a thread carry from level to level.
struct Rows {
    int row[2], doubt[2];
    float square[2], length[2], lost[2], error[2], offset[2];
    u32 bias[EARLIER][2];  // where the rows of bias start, in float4
};
