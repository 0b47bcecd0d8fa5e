// The dense product for the ops that are made of it, and what csrc/python.cpp asks of it.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "common/tensor.h"

namespace bigops {

// act(x W^T + bias) + residual with all checks, recorded under the name `op`. preact: null when not
// asked for; else receives z.
Tensor dense_linear(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                    const OptTensor& residual, int64_t activation, Tensor* preact, const char* op);

// act(z) + residual for z [.., N], contiguous.
Tensor activated(const Tensor& z, const OptTensor& residual, int activation);

// gz = grad act'(preact) [M, width]; grad itself, as a matrix, where there is nothing to do. gb:
// null when not asked for; else receives the sums of gz over rows. grad and preact are contiguous.
Tensor preact_gradient(const Tensor& grad, const OptTensor& preact, int activation, bool need_gz,
                       Tensor* gb);

// A product of the backward pass, a [M, K] times b [K, N], and its name in the records.
Tensor gradient_mm(const Tensor& a, const Tensor& b);
std::string gradient_form(ScalarType dtype);

// A matrix in the shape of x, and what stands for a gradient that is not needed.
Tensor view_like(const Tensor& matrix, const Tensor& x);
Tensor nothing(ScalarType dtype);

// The kernel that a call of this shape takes and why; n counts the rows of the weight.
std::pair<std::string, std::string> choose_fused_linear(int64_t m, int64_t n, int64_t k,
                                                        const std::string& dtype);

}  // namespace bigops
