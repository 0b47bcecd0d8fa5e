// Vectors of a row, of which the last may hold fewer than all lanes.
// Include after a vec header. Internal linkage throughout.
#pragma once

namespace bigops {
namespace {

// f(i, n) for all columns in steps of a vector, n below the width only in the last step.
template <class V, class F>
inline void for_columns(int64_t v, const F& f) {
  int64_t i = 0;
  for (; i + V::width <= v; i += V::width) f(i, V::width);
  if (i < v) f(i, static_cast<int>(v - i));
}

template <class V, class T>
inline __attribute__((always_inline)) typename V::reg get(const T* p, int n) {
  return n == V::width ? V::load(p) : V::load_n(p, n);
}

template <class V, class T>
inline __attribute__((always_inline)) void put(T* p, typename V::reg v, int n) {
  if (n == V::width)
    V::store(p, v);
  else
    V::store_n(p, v, n);
}

}  // namespace
}  // namespace bigops
