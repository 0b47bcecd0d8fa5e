#include "cpu/compressed_linear.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <tuple>

namespace bigops {

SelectedCompressed select_compressed() {
#if defined(__x86_64__)
  const Isa isa = active_isa();
  if (isa >= Isa::avx512vnni) return {&avx512vnni_compressed, Isa::avx512vnni};
  if (isa == Isa::avx512) return {&avx512_compressed, isa};
  if (isa == Isa::avx2) return {&avx2_compressed, isa};
#endif
  return {&portable_compressed, Isa::portable};
}

FloatKind float_kind(const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    default: fail(name, "dtype f32, bf16 or f16", short_name(dtype));
  }
}

namespace {

CompressedCall check_call(const Tensor& x, int64_t n, int64_t k, const OptTensor& bias,
                          const OptTensor& residual, int64_t activation, bool x_u8) {
  const int code = check_plain_activation(activation);
  check_cpu("x", x);
  ScalarType dtype = x.scalar_type();
  const char* source = "x";
  if (x_u8) {
    source = bias.has_value() ? "bias" : "residual";
    dtype = bias.has_value()       ? bias->scalar_type()
            : residual.has_value() ? residual->scalar_type()
                                   : ScalarType::Float;
  }
  const FloatKind kind = float_kind(source, dtype);
  if (x.dim() == 0 || x.size(x.dim() - 1) != k)
    fail("x", "shape [.., " + std::to_string(k) + "]", shape_of(x));
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) m *= x.size(i);
  if (bias.has_value()) {
    check_cpu("bias", *bias);
    check_vector("bias", *bias, n);
    check_dtype("bias", *bias, dtype);
  }
  if (residual.has_value()) {
    check_cpu("residual", *residual);
    check_dtype("residual", *residual, dtype);
    bool same = residual->dim() == x.dim() && residual->size(x.dim() - 1) == n;
    for (int64_t i = 0; same && i + 1 < x.dim(); ++i) same = residual->size(i) == x.size(i);
    if (!same)
      fail("residual", "x's shape with " + std::to_string(n) + " columns", shape_of(*residual));
  }
  return {select_compressed(), m,   n, k, dtype, kind, code, dense(x), dense(bias),
          dense(residual),     x_u8};
}

Tensor bytes_tensor(int64_t bytes) {
  const int64_t size = bytes + 64;
  return empty(&size, 1, ScalarType::Byte);
}

char* align(void* p) {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64);
}

struct Freed {
  void operator()(void* p) const { std::free(p); }
};

}  // namespace

CompressedCall check_compressed(const Tensor& x, int64_t n, int64_t k, const OptTensor& bias,
                                const OptTensor& residual, int64_t activation) {
  return check_call(x, n, k, bias, residual, activation, false);
}

CompressedCall check_compressed(const Tensor& x, int64_t n, int64_t k, const OptTensor& x_qparams,
                                const OptTensor& y_qparams, const OptTensor& bias,
                                const OptTensor& residual, int64_t activation) {
  const bool u8 = x.scalar_type() == ScalarType::Byte;
  if (u8 && !x_qparams.has_value()) fail("x", "a floating dtype without x_qparams", "u8");
  CompressedCall call = check_call(x, n, k, bias, residual, activation, u8);
  if (x_qparams.has_value()) {
    call.x_qparams = check_qparams("x_qparams", *x_qparams);
    call.mode = kStaticRows;
  }
  if (y_qparams.has_value()) call.y_qparams = check_qparams("y_qparams", *y_qparams);
  return call;
}

Qparams check_qparams(const char* name, const Tensor& t) {
  check_cpu(name, t);
  check_dtype(name, t, ScalarType::Float);
  check_vector(name, t, 2);
  const Tensor kept = dense(t);
  const float* qparams = static_cast<const float*>(kept.const_data_ptr());
  const float scale = qparams[0], zero = qparams[1];
  // 1 / scale is finite from FLT_MIN on.
  if (!(scale >= std::numeric_limits<float>::min() && scale <= std::numeric_limits<float>::max() &&
        zero >= 0.0f && zero <= 255.0f && zero == std::floor(zero)))
    fail(name, "a finite scale above 0 and a whole zero point in 0..255",
         std::to_string(scale) + ", " + std::to_string(zero));
  return {scale, static_cast<int32_t>(zero)};
}

CompressedCall check_compressed_rows(const Tensor& x, const Tensor& x_scale,
                                     const Tensor& x_zero_point, int64_t n, int64_t k,
                                     const OptTensor& bias, const OptTensor& residual,
                                     int64_t activation) {
  check_dtype("x", x, ScalarType::Byte);
  CompressedCall call = check_call(x, n, k, bias, residual, activation, true);
  for (const auto& [name, tensor, dtype] :
       {std::tuple<const char*, const Tensor*, ScalarType>{"x_scale", &x_scale, ScalarType::Float},
        {"x_zero_point", &x_zero_point, ScalarType::Int}}) {
    check_cpu(name, *tensor);
    check_dtype(name, *tensor, dtype);
    bool same = tensor->dim() == x.dim() - 1;
    for (int64_t i = 0; same && i + 1 < x.dim(); ++i) same = tensor->size(i) == x.size(i);
    if (!same) fail(name, "x's shape without the last dimension", shape_of(*tensor));
  }
  call.x_scale = dense(x_scale);
  call.x_zero_point = dense(x_zero_point);
  return call;
}

void u8_qparams(const CompressedCall& call, int64_t first, int64_t rows, float* scale,
                int32_t* zero_point) {
  for (int64_t i = 0; i < rows; ++i) {
    scale[i] = call.x_scale ? static_cast<const float*>(data(call.x_scale))[first + i]
                            : call.x_qparams->scale;
    zero_point[i] = call.x_zero_point
                        ? static_cast<const int32_t*>(data(call.x_zero_point))[first + i]
                        : call.x_qparams->zero_point;
  }
}

void quantize_rows(const CompressedCall& call, int64_t first, int64_t rows, char* q, int64_t stride,
                   float* scale, int32_t* zero_point) {
  if (!call.x_u8) {
    const Qparams qparams = call.x_qparams.value_or(Qparams{0.0f, 0});
    call.kernels().quantize[call.kind]({call.row(first), rows, call.k, call.mode, qparams.scale,
                                        qparams.zero_point, reinterpret_cast<uint8_t*>(q), stride,
                                        scale, zero_point});
    return;
  }
  u8_qparams(call, first, rows, scale, zero_point);
  for (int64_t i = 0; i < rows; ++i, q += stride) {
    if (call.k > 0) std::memcpy(q, call.row(first + i), static_cast<size_t>(call.k));
    std::memset(q + call.k, 0, static_cast<size_t>(stride - call.k));
  }
}

FinishTask finish_task(const CompressedCall& call, void* y, YKind kind, int32_t* y_bad) {
  FinishTask t{};
  t.bias = data(call.bias);
  t.residual = data(call.residual);
  t.y = y;
  t.y_kind = kind;
  t.y_bad = y_bad;
  if (kind == kYU8) {
    t.y_inverse = 1.0f / call.y_qparams->scale;
    t.y_zero = static_cast<float>(call.y_qparams->zero_point);
  }
  t.n = call.n;
  t.activation = call.activation;
  return t;
}

void check_finite(int32_t y_bad) {
  if (y_bad != 0) fail("y", "finite values, since u8 by y_qparams holds no other", "NaN or inf");
}

Buffer::Buffer(int64_t bytes)
    : storage_(bytes_tensor(bytes)), base_(align(storage_.mutable_data_ptr())) {}

char* scratch(int64_t bytes) {
  thread_local std::unique_ptr<void, Freed> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset(std::aligned_alloc(64, static_cast<size_t>(round_up(bytes, 4096))));
    size = memory ? bytes : 0;
    if (!memory) throw std::bad_alloc();
  }
  return static_cast<char*>(memory.get());
}

Pointwise pointwise_backward(const CompressedCall& call, const Tensor& grad, const float* z,
                             const float* scale, bool want_gz, bool need_bias) {
  Pointwise out{Buffer(want_gz ? call.m * call.n * 4 : 0),
                need_bias ? empty(&call.n, 1, call.dtype) : no_gradient(call.dtype)};
  if (!want_gz && !need_bias) return out;
  constexpr int64_t kColumns = 64;
  auto run = [&](int64_t begin, int64_t end) {
    call.kernels().gradient[call.kind](
        {grad.const_data_ptr(), z, scale,
         want_gz ? reinterpret_cast<float*>(out.gz.at(0)) : nullptr,
         need_bias ? out.bias_grad.mutable_data_ptr() : nullptr, call.m, call.n, begin * kColumns,
         end * kColumns < call.n ? end * kColumns : call.n, call.activation});
  };
  for_tasks((call.n + kColumns - 1) / kColumns, call.m * call.n * 16 > kWorthThreads, run);
  return out;
}

void store_tile(const CompressedCall& call, const float* tile, int64_t stride, int64_t m0,
                int64_t m1, int64_t k0, int64_t k1, void* out) {
  FinishTask t{};
  t.tile = tile;
  t.stride = stride;
  t.y = out;
  t.m0 = m0;
  t.m1 = m1;
  t.n0 = k0;
  t.n1 = k1;
  t.n = call.k;
  t.activation = kNone;
  call.kernels().finish[call.kind](t);
}

Tensor no_gradient(ScalarType dtype) {
  const int64_t zero = 0;
  return empty(&zero, 1, dtype);
}

}  // namespace bigops
