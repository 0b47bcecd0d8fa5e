// Activations and their derivatives on the vectors of any instruction set.
// Include after a vector header. Internal linkage throughout.

#include "common/activation.h"

namespace bigops {
namespace {

// V: Scalar, Avx2 or Avx512. Codes below kFirstGated only.
template <class V>
inline typename V::reg activate(int activation, typename V::reg z) {
  using A = typename V::acc;
  switch (activation) {
    case kRelu: return V::relu(z);
    case kRelu2: {
      const auto r = V::relu(z);
      return V::mul(r, r);
    }
    case kGelu: return V::mul(z, V::normal_cdf(z));
    case kGeluTanh: {  // x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), as tanh(u) = 2 sigmoid(2u) - 1
      const auto u = V::mul(
          z, V::fma(V::mul(z, z), V::set1(A(0.07135481627260025)), V::set1(A(1.5957691216057308))));
      return V::mul(z, V::sigmoid(u));
    }
    case kSilu: return V::mul(z, V::sigmoid(z));
    case kSigmoid: return V::sigmoid(z);
    case kTanh: return V::tanh_(z);
    default: return z;
  }
}

template <class V>
inline typename V::reg activate_derivative(int activation, typename V::reg z) {
  using A = typename V::acc;
  const auto one = V::set1(A(1));
  switch (activation) {
    case kRelu: return V::step(z);
    case kRelu2: {
      const auto r = V::relu(z);
      return V::add(r, r);
    }
    case kGelu: return V::fma(z, V::normal_pdf(z), V::normal_cdf(z));
    case kGeluTanh: {  // s + x s (1 - s) u', u' = 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2)
      // s is 0 or 1 long before |x| = 100: with x^2 held there, 0 meets no infinite u'
      const auto t = V::min(V::set1(A(1e4)), V::mul(z, z));
      const auto c1 = V::set1(A(1.5957691216057308));
      const auto s = V::sigmoid(V::mul(z, V::fma(t, V::set1(A(0.07135481627260025)), c1)));
      const auto du = V::fma(t, V::set1(A(0.21406444881780074)), c1);
      return V::fma(V::mul(z, V::mul(s, V::sub(one, s))), du, s);
    }
    case kSilu: {
      const auto s = V::sigmoid(z);
      return V::mul(s, V::fma(z, V::sub(one, s), one));
    }
    case kSigmoid: {
      const auto s = V::sigmoid(z);
      return V::mul(s, V::sub(one, s));
    }
    case kTanh: {
      const auto t = V::tanh_(z);
      return V::sub(one, V::mul(t, t));
    }
    default: return one;
  }
}

}  // namespace
}  // namespace bigops
