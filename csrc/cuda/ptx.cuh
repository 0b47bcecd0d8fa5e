// The only file with inline PTX. Each wrapper has a host twin, which runs where csrc/hostrun does.
//
// Instructions and fragment layouts: NVIDIA, Parallel Thread Execution ISA ("cp.async",
// "ld.global.nc", "ldmatrix", "Matrix Fragments for mma.m16n8k16", "... mma.m16n8k32", "Sparse
// matrix storage", "Matrix Fragments for sparse mma.m16n8k32", "... sparse mma.m16n8k64"). All need
// sm_80 at most.
#pragma once

#include "cuda/device.cuh"

#if !defined(__CUDACC__)
#include "hostrun/matrix.h"
#endif

#define PTX_INLINE __device__ __forceinline__

namespace bigops {
namespace ptx {

#if defined(__CUDACC__)
// An address in the shared window, as the instructions take it.
PTX_INLINE unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
#endif

// --- asynchronous copies from global to shared memory -----------------------------------------

// Copies `valid` of 16 bytes and fills the rest with zeros; `from` is not read where valid is 0,
// but must be an address. Bypasses L1.
PTX_INLINE void copy_async_16(void* to, const void* from, int valid = 16) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid)
               : "memory");
#else
  hostrun::copy_async(to, from, 16, static_cast<size_t>(valid));
#endif
}

// The same of 8 or 4 bytes, through L1.
template <int Bytes>
PTX_INLINE void copy_async_small(void* to, const void* from, int valid = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8, "cp.async.ca of 4 or 8 bytes");
#if defined(__CUDACC__)
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from),
               "n"(Bytes), "r"(valid)
               : "memory");
#else
  hostrun::copy_async(to, from, Bytes, static_cast<size_t>(valid));
#endif
}

// Closes the group of the copies that this thread issued since the last one; it may be empty.
PTX_INLINE void copy_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  hostrun::copy_commit();
#endif
}

// Waits until at most `StillOpen` of this thread's newest groups are under way. Other threads'
// copies are seen after a barrier only.
template <int StillOpen>
PTX_INLINE void copy_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(StillOpen) : "memory");
#else
  hostrun::copy_wait(StillOpen);
#endif
}

// --- loads of what is read once -----------------------------------------------------------------

// 16 bytes of memory that no thread writes meanwhile; not kept in L1.
PTX_INLINE uint4 load_streaming(const uint4* from) {
  uint4 v;
#if defined(__CUDACC__)
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
#else
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) hostrun::fail("ld.v4 from a misaligned address");
  hostrun::settings.streamed.fetch_add(16, std::memory_order_relaxed);
  v = *from;
#endif
  return v;
}

// The same of 8 bytes.
PTX_INLINE uint2 load_streaming(const uint2* from) {
  uint2 v;
#if defined(__CUDACC__)
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(from));
#else
  if (reinterpret_cast<uintptr_t>(from) % 8 != 0) hostrun::fail("ld.v2 from a misaligned address");
  hostrun::settings.streamed.fetch_add(8, std::memory_order_relaxed);
  v = *from;
#endif
  return v;
}

// --- fragments of matrices ----------------------------------------------------------------------

// r[i]: matrix i of 8 rows of 8 16-bit numbers; lanes 8 i .. 8 i + 7 give its rows in shared
// memory, 16-byte aligned. Lane 4 g + t receives numbers 2 t and 2 t + 1 of row g.
PTX_INLINE void load_matrix(uint32_t (&r)[1], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
#else
  hostrun::load_matrices(r, row, false, __LINE__);
#endif
}

PTX_INLINE void load_matrix(uint32_t (&r)[2], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#else
  hostrun::load_matrices(r, row, false, __LINE__);
#endif
}

PTX_INLINE void load_matrix(uint32_t (&r)[4], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  hostrun::load_matrices(r, row, false, __LINE__);
#endif
}

// The same, transposed: lane 4 g + t receives number g of rows 2 t and 2 t + 1.
PTX_INLINE void load_matrix_transposed(uint32_t (&r)[1], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
#else
  hostrun::load_matrices(r, row, true, __LINE__);
#endif
}

PTX_INLINE void load_matrix_transposed(uint32_t (&r)[2], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#else
  hostrun::load_matrices(r, row, true, __LINE__);
#endif
}

PTX_INLINE void load_matrix_transposed(uint32_t (&r)[4], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  hostrun::load_matrices(r, row, true, __LINE__);
#endif
}

// --- products of matrices -----------------------------------------------------------------------
// c [16, 8] += a [16, K] b [K, 8] by a warp; lane 4 g + t holds
//   a[i]: row g + 8 (i % 2), `per` numbers from column per * (t + 4 (i / 2)) on,
//   b[i]: column g, `per` numbers from row per * (t + 4 i) on,
//   c[i]: row g + 8 (i / 2), column 2 t + i % 2,
// per = 2 numbers of 16 bits (K = 16) or 4 of 8 bits (K = 32) in a register, lowest first.

PTX_INLINE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  hostrun::multiply<bf16>("mma.bf16", c, a, b, __LINE__);
#endif
}

PTX_INLINE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  hostrun::multiply<f16>("mma.f16", c, a, b, __LINE__);
#endif
}

PTX_INLINE void multiply(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int8_t) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  hostrun::multiply<int8_t>("mma.s8", c, a, b, __LINE__);
#endif
}

// --- products with a matrix that is half zeros --------------------------------------------------
// c [16, 8] += a [16, K] b [K, 8], where each four neighbours in a row of a hold two numbers, the
// only ones given, and two zeros; K = 32 of 16 bits or 64 of 8. a and c as above, a as if the
// numbers were its columns; b[i]: column g, `per` numbers from row per * (t + 4 i) on. meta gives
// the places of the two numbers in their four, 2 bits each, the first lowest and below the second;
// four bits a four, from column 0 on:
//   16 bits  lane 4 g + 2 Selector + h, h of 0 and 1: columns 16 h .. 16 h + 15 of row g in the low
//            half and of row g + 8 in the high half; the other two lanes' meta is not looked at
//   8 bits   lane 4 g + t: columns 32 (t / 2) .. 32 (t / 2) + 31 of row g + 8 (t % 2)
// A sum never meets the numbers of b that stand at zeros of a.

template <int Selector>
PTX_INLINE void multiply_sparse(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                uint32_t meta, bf16) {
  static_assert(Selector == 0 || Selector == 1, "lanes 0 and 1 of four, or 2 and 3");
#if defined(__CUDACC__)
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "r"(meta), "n"(Selector));
#else
  hostrun::multiply_sparse<bf16, Selector>("mma.sp.bf16", c, a, b, meta, __LINE__);
#endif
}

template <int Selector>
PTX_INLINE void multiply_sparse(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                uint32_t meta, f16) {
  static_assert(Selector == 0 || Selector == 1, "lanes 0 and 1 of four, or 2 and 3");
#if defined(__CUDACC__)
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "r"(meta), "n"(Selector));
#else
  hostrun::multiply_sparse<f16, Selector>("mma.sp.f16", c, a, b, meta, __LINE__);
#endif
}

template <int Selector>
PTX_INLINE void multiply_sparse(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                uint32_t meta, int8_t) {
  static_assert(Selector == 0, "every lane gives metadata");
#if defined(__CUDACC__)
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "r"(meta), "n"(Selector));
#else
  hostrun::multiply_sparse<int8_t, Selector>("mma.sp.s8", c, a, b, meta, __LINE__);
#endif
}

// --- pairs of 16-bit floats in a register, low half first ---------------------------------------

// Both rounded to nearest even.
PTX_INLINE uint32_t pack(float low, float high, bf16) {
  uint32_t r;
#if defined(__CUDACC__)
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
  r = static_cast<uint32_t>(from_float<bf16>(high).bits) << 16 | from_float<bf16>(low).bits;
#endif
  return r;
}

PTX_INLINE uint32_t pack(float low, float high, f16) {
  uint32_t r;
#if defined(__CUDACC__)
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
  r = static_cast<uint32_t>(from_float<f16>(high).bits) << 16 | from_float<f16>(low).bits;
#endif
  return r;
}

// a + b. bfloat16 has no addition on sm_80: a product by one that rounds once.
PTX_INLINE uint32_t add(uint32_t a, uint32_t b, bf16) {
  uint32_t r;
#if defined(__CUDACC__)
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(0x3f803f80u), "r"(b));
#else
  r = hostrun::of_pairs<bf16>(a, b, [](float x, float y) { return x + y; });
#endif
  return r;
}

PTX_INLINE uint32_t add(uint32_t a, uint32_t b, f16) {
  uint32_t r;
#if defined(__CUDACC__)
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
#else
  r = hostrun::of_pairs<f16>(a, b, [](float x, float y) { return x + y; });
#endif
  return r;
}

}  // namespace ptx
}  // namespace bigops

#undef PTX_INLINE
