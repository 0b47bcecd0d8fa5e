// Small kernels that show what csrc/hostrun does: a product by the usual pipeline (cp.async,
// ldmatrix, mma), each wrapper of csrc/cuda/ptx.cuh by itself, and the warp functions.

#include "cuda/ptx.cuh"

namespace bigops {
namespace {

constexpr int kM = 64, kN = 64, kK = 32, kPitch = kK + 8, kThreads = 128;

struct Stage {
  bf16 a[kM * kPitch];
  bf16 b[kN * kPitch];
};

// c [m, n] float = a [m, k] b [n, k]^T; k a multiple of 8.
__global__ void __launch_bounds__(kThreads)
    product(const bf16* a, const bf16* b, float* c, int m, int n, int k) {
  BIGOPS_DYNAMIC_SHARED(Stage, stages);
  const int t = threadIdx.x, warp = t / 32, lane = t % 32;
  const int m0 = blockIdx.y * kM, n0 = blockIdx.x * kN, wm = warp / 2 * 32, wn = warp % 2 * 32;
  const auto load = [&](int step) {
    Stage& to = stages[step % 2];
    for (int i = t; i < (kM + kN) * kK / 8; i += kThreads) {
      const int row = i / (kK / 8) % kM, at = i % (kK / 8) * 8, from = step * kK + at;
      const bool left = i < kM * kK / 8;
      const bool inside = (left ? m0 + row < m : n0 + row < n) && from < k;
      const bf16* source = left ? a + (m0 + row) * k + from : b + (n0 + row) * k + from;
      ptx::copy_async_16((left ? to.a : to.b) + row * kPitch + at, inside ? source : a,
                         inside ? 16 : 0);
    }
    ptx::copy_commit();
  };
  float sums[2][4][4] = {};
  const int steps = (k + kK - 1) / kK;
  load(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      load(step + 1);
      ptx::copy_wait<1>();
    } else {
      ptx::copy_wait<0>();
    }
    __syncthreads();  // everybody's copies of this stage
    const Stage& now = stages[step % 2];
    for (int kk = 0; kk < kK; kk += 16) {
      uint32_t x[2][4], y[2][4];
      for (int i = 0; i < 2; ++i) {
        ptx::load_matrix(x[i], now.a + (wm + 16 * i + lane % 16) * kPitch + kk + lane / 16 * 8);
        const int column = wn + 16 * i + lane / 16 * 8 + lane % 8;
        ptx::load_matrix(y[i], now.b + column * kPitch + kk + lane / 8 % 2 * 8);
      }
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 4; ++j) {
          const uint32_t pair[2] = {y[j / 2][j % 2 * 2], y[j / 2][j % 2 * 2 + 1]};
          ptx::multiply(sums[i][j], x[i], pair, bf16{});
        }
    }
    __syncthreads();  // before this stage is filled again
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j)
      for (int e = 0; e < 4; ++e) {
        const int row = m0 + wm + 16 * i + lane / 4 + 8 * (e / 2);
        const int column = n0 + wn + 8 * j + lane % 4 * 2 + e % 2;
        if (row < m && column < n) c[row * n + column] = sums[i][j][e];
      }
}

// One warp. a [16, 16 or 32], b [8, 16 or 32] row by row, c [16, 8] added to.
template <class Element, class Sum>
__global__ void one_multiply(const uint32_t* a, const uint32_t* b, Sum* c) {
  const int group = threadIdx.x / 4, member = threadIdx.x % 4;
  uint32_t x[4], y[2];
  Sum sums[4];
  for (int i = 0; i < 4; ++i) x[i] = a[(group + 8 * (i % 2)) * 8 + member + 4 * (i / 2)];
  for (int i = 0; i < 2; ++i) y[i] = b[group * 8 + member + 4 * i];
  for (int i = 0; i < 4; ++i) sums[i] = c[(group + 8 * (i / 2)) * 8 + 2 * member + i % 2];
  ptx::multiply(sums, x, y, Element{});
  for (int i = 0; i < 4; ++i) c[(group + 8 * (i / 2)) * 8 + 2 * member + i % 2] = sums[i];
}

// One warp. a [16, 16 or 32] the numbers of a 2:4 matrix, b [8, 32 or 64] row by row, meta [32] as
// the lanes hold it, c [16, 8] added to.
template <class Element, int Selector, class Sum>
__global__ void one_sparse(const uint32_t* a, const uint32_t* b, const uint32_t* meta, Sum* c) {
  const int group = threadIdx.x / 4, member = threadIdx.x % 4;
  uint32_t x[4], y[4];
  Sum sums[4];
  for (int i = 0; i < 4; ++i) x[i] = a[(group + 8 * (i % 2)) * 8 + member + 4 * (i / 2)];
  for (int i = 0; i < 4; ++i) y[i] = b[group * 16 + member + 4 * i];
  for (int i = 0; i < 4; ++i) sums[i] = c[(group + 8 * (i / 2)) * 8 + 2 * member + i % 2];
  ptx::multiply_sparse<Selector>(sums, x, y, meta[threadIdx.x], Element{});
  for (int i = 0; i < 4; ++i) c[(group + 8 * (i / 2)) * 8 + 2 * member + i % 2] = sums[i];
}

// One warp. from: matrices [count, 8, 8] of 16 bits; to: [count, 32] words.
template <int Count>
__global__ void one_load(const uint4* from, uint32_t* to, int transposed) {
  BIGOPS_SHARED(uint4, rows, 8 * Count);
  const int lane = threadIdx.x;
  if (lane < 8 * Count) rows[lane] = ptx::load_streaming(from + lane);
  __syncwarp();
  uint32_t r[Count];
  const uint4* row = rows + lane % (8 * Count);
  if (transposed)
    ptx::load_matrix_transposed(r, row);
  else
    ptx::load_matrix(r, row);
  for (int i = 0; i < Count; ++i) to[i * 32 + lane] = r[i];
}

// One warp: shuffles, the ballot, pairs of 16-bit floats, small copies. out: [8, 32] words.
__global__ void warp_functions(const uint32_t* in, uint32_t* out) {
  BIGOPS_SHARED(uint32_t, words, 3 * 32);
  const int lane = threadIdx.x;
  const uint32_t all = 0xffffffffu, v = in[lane];
  out[lane] = __shfl_sync(all, v, 5);
  out[32 + lane] = __shfl_xor_sync(all, v, 3);
  out[64 + lane] = __shfl_down_sync(all, v, 2);
  out[96 + lane] = __ballot_sync(all, v & 1);
  const float low = static_cast<float>(lane) + 0.3f;
  out[128 + lane] = ptx::add(ptx::pack(low, -1.5f, bf16{}), ptx::pack(0.25f, low, bf16{}), bf16{});
  out[160 + lane] = ptx::add(ptx::pack(low, -1.5f, f16{}), ptx::pack(0.25f, low, f16{}), f16{});
  ptx::copy_async_small<4>(words + lane, in + lane, lane % 2 ? 4 : 0);
  if (lane < 16) ptx::copy_async_small<8>(words + 32 + 2 * lane, in + 2 * lane);
  ptx::copy_commit();
  ptx::copy_wait<0>();
  __syncwarp();
  out[192 + lane] = words[lane ^ 1];
  out[224 + lane] = words[32 + (lane ^ 1)];
}

// Reads one word of shared memory that nobody wrote.
__global__ void unwritten(float* out) {
  BIGOPS_SHARED(float, words, 32);
  BIGOPS_DYNAMIC_SHARED(float, more);
  if (blockIdx.x == 0) words[threadIdx.x] = 1.0f;
  __syncthreads();
  out[blockIdx.x * 32 + threadIdx.x] = words[threadIdx.x] + (blockIdx.x == 0 ? 0.0f : more[0]);
}

__global__ void halves(const float* in, uint16_t* bf, uint16_t* f, float* back) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const bf16 b = from_float<bf16>(in[i]);
  const f16 h = from_float<f16>(in[i]);
  bf[i] = reinterpret_cast<const uint16_t&>(b);
  f[i] = reinterpret_cast<const uint16_t&>(h);
  back[i] = to_float(h);
}

}  // namespace
}  // namespace bigops

using namespace bigops;

extern "C" void run_product(const void* a, const void* b, float* c, int m, int n, int k) {
  BIGOPS_LAUNCH(product, dim3((n + kN - 1) / kN, (m + kM - 1) / kM), dim3(kThreads),
                2 * sizeof(Stage), cudaStream_t{}, static_cast<const bf16*>(a),
                static_cast<const bf16*>(b), c, m, n, k);
}

extern "C" void run_multiply_bf16(const uint32_t* a, const uint32_t* b, float* c) {
  BIGOPS_LAUNCH((one_multiply<bf16, float>), dim3(1), dim3(32), 0, cudaStream_t{}, a, b, c);
}
extern "C" void run_multiply_f16(const uint32_t* a, const uint32_t* b, float* c) {
  BIGOPS_LAUNCH((one_multiply<f16, float>), dim3(1), dim3(32), 0, cudaStream_t{}, a, b, c);
}
extern "C" void run_multiply_s8(const uint32_t* a, const uint32_t* b, int32_t* c) {
  BIGOPS_LAUNCH((one_multiply<int8_t, int32_t>), dim3(1), dim3(32), 0, cudaStream_t{}, a, b, c);
}

extern "C" void run_sparse_bf16(const uint32_t* a, const uint32_t* b, const uint32_t* meta,
                                float* c, int selector) {
  const auto kernel = selector ? one_sparse<bf16, 1, float> : one_sparse<bf16, 0, float>;
  BIGOPS_LAUNCH(kernel, dim3(1), dim3(32), 0, cudaStream_t{}, a, b, meta, c);
}
extern "C" void run_sparse_f16(const uint32_t* a, const uint32_t* b, const uint32_t* meta, float* c,
                               int selector) {
  const auto kernel = selector ? one_sparse<f16, 1, float> : one_sparse<f16, 0, float>;
  BIGOPS_LAUNCH(kernel, dim3(1), dim3(32), 0, cudaStream_t{}, a, b, meta, c);
}
extern "C" void run_sparse_s8(const uint32_t* a, const uint32_t* b, const uint32_t* meta,
                              int32_t* c) {
  const auto kernel = one_sparse<int8_t, 0, int32_t>;
  BIGOPS_LAUNCH(kernel, dim3(1), dim3(32), 0, cudaStream_t{}, a, b, meta, c);
}

extern "C" void run_load(const uint4* from, uint32_t* to, int count, int transposed) {
  const auto kernel = count == 1 ? one_load<1> : count == 2 ? one_load<2> : one_load<4>;
  BIGOPS_LAUNCH(kernel, dim3(1), dim3(32), 0, cudaStream_t{}, from, to, transposed);
}

extern "C" void run_warp_functions(const uint32_t* in, uint32_t* out) {
  BIGOPS_LAUNCH(warp_functions, dim3(1), dim3(32), 0, cudaStream_t{}, in, out);
}

extern "C" void run_unwritten(float* out) {
  BIGOPS_LAUNCH(unwritten, dim3(2), dim3(32), 16, cudaStream_t{}, out);
}

extern "C" void run_halves(const float* in, uint16_t* bf, uint16_t* f, float* back, int count) {
  BIGOPS_LAUNCH(halves, dim3(count / 32), dim3(32), 0, cudaStream_t{}, in, bf, f, back);
}
