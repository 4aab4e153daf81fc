// The three least of a unit's scores, found in registers.

__device__ __forceinline__ void load_bias(float4 (&bias)[EARLIER][2], const float4* const (&from)[EARLIER][2],
                                          int level, int piece) {
#pragma unroll
    for (int e = 0; e < EARLIER; e++)
        if (e == 0 || e < level) {
#pragma unroll
            for (int r = 0; r < 2; r++)  // the first level's is of no row
                bias[e][r] = LEVELS == 1 && r ? bias[e][0] : load_now(from[e][r] + 4 * piece);
        }
}

__device__ __forceinline__ void insert(int key, int (&least)[3]) {
    least[2] = min(least[2], max(least[1], key));
    least[1] = min(least[1], max(least[0], key));
    least[0] = min(least[0], key);
}

__device__ __forceinline__ void insert_two(int one, int two, int (&least)[3]) {
    const int low = min(one, two), high = max(one, two);
    least[2] = min(min(least[2], max(least[1], low)), max(least[0], high));
    least[1] = min(min(least[1], high), max(least[0], low));
    least[0] = min(least[0], low);
}

// A score's bits with its place in the lowest.
__device__ __forceinline__ int key_of(float score, int mask, int place) {
    int key;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(key) : "r"(__float_as_int(score)), "r"(mask), "r"(place));
    return key;
}

// Scores of 16 codes: sums, bias and offset to positive floats, whose bits are ordered as integers.
__device__ __forceinline__ void search_piece(float (&sum)[64], float4 (&bias)[EARLIER][2], const Rows& rows,
                                             int level, int (&found)[2][3], int piece, int mask, u32 spare) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float4 add = bias[0][r];
#pragma unroll
        for (int e = 1; e < EARLIER; e++)
            if (e < level) {
                add.x += bias[e][r].x, add.y += bias[e][r].y, add.z += bias[e][r].z, add.w += bias[e][r].w;
            }
        const float score[4] = {sum[8 * piece + 2 * r] + add.x, sum[8 * piece + 2 * r + 1] + add.y,
                                sum[8 * piece + 4 + 2 * r] + add.z, sum[8 * piece + 5 + 2 * r] + add.w};
#pragma unroll
        for (int i = 0; i < 4; i += 2)
            insert_two(key_of(score[i] + rows.offset[r], mask, 4 * piece + i),
                       key_of(score[i + 1] + rows.offset[r], mask, 4 * piece + i + 1), found[r]);
        pin(found[r][2], spare);
    }
}

// A unit's three least into those of the level.
__device__ __forceinline__ void merge(Least& least, const int (&found)[3], int unit) {
    if (found[0] >= least.key[2]) return;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const bool first = found[i] < least.key[0], second = found[i] < least.key[1];
        least.unit[1] = first ? least.unit[0] : second ? unit : least.unit[1];
        least.unit[0] = first ? unit : least.unit[0];
        insert(found[i], least.key);
    }
    least.key[2] = min(least.key[2], found[2]);
}
