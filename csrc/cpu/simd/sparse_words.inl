// Words of a sparse weight: how 4 bytes of W meet 4 bytes of x, on the lanes of any instruction
// set; and how the rows form looks words of x up.
// Include after a lanes header and sparse_linear.h. Internal linkage throughout.

namespace bigops {
namespace {

// Rows of x in the lanes of the sampled product: floats, or pairs of bf16.
template <class L>
struct FloatRows {
  static constexpr bool pairs = false;
  using reg = typename L::V::reg;
  static reg load(const int32_t* p) { return L::V::load(reinterpret_cast<const float*>(p)); }
  static reg mac(reg acc, reg a, reg b) { return L::V::fma(a, b, acc); }
};

template <class L>
struct Bf16Rows {
  static constexpr bool pairs = true;
  using reg = typename L::ireg;
  static reg load(const int32_t* p) { return L::iload(p); }
  static typename L::V::reg mac(typename L::V::reg acc, reg a, reg b) {
    return L::dot_bf16(acc, a, b);
  }
};

template <bool kPairs, class L>
struct RowsOf {
  using type = FloatRows<L>;
};
template <class L>
struct RowsOf<true, L> {
  using type = Bf16Rows<L>;
};

template <class L_>
struct WordF32 {
  using L = L_;
  using rows = FloatRows<L>;
  using V = typename L::V;
  using acc = typename V::reg;
  using x = typename V::reg;
  using w = typename V::reg;
  using scalar = float;
  static constexpr bool exact = false;
  static constexpr int columns = 1;

  static acc zero_acc() { return V::zero(); }
  static acc load_acc(const int32_t* p) { return V::load(reinterpret_cast<const float*>(p)); }
  static void store_acc(int32_t* p, acc v) { V::store(reinterpret_cast<float*>(p), v); }
  static x load_x(const char* p) { return V::load(reinterpret_cast<const float*>(p)); }
  static x x_of(typename L::ireg v) { return L::as_float(v); }
  static w load_w(const char* p) { return V::load(reinterpret_cast<const float*>(p)); }
  static w pick(typename L::ireg word) { return L::as_float(word); }
  static acc mac(acc a, x xv, w wv) { return V::fma(wv, xv, a); }
  static float element(const char* p, int) {
    float v;
    memcpy(&v, p, 4);
    return v;
  }
  static float add_scalar(float a, float b) { return a + b; }
};

template <class L_>
struct WordBf16 {
  using L = L_;
  using rows = typename RowsOf<L::native_bf16, L>::type;
  using V = typename L::V;
  using acc = typename V::reg;
  using x = typename L::ireg;
  using w = typename L::ireg;
  using scalar = float;
  static constexpr bool exact = false;
  static constexpr int columns = 2;

  static acc zero_acc() { return V::zero(); }
  static acc load_acc(const int32_t* p) { return V::load(reinterpret_cast<const float*>(p)); }
  static void store_acc(int32_t* p, acc v) { V::store(reinterpret_cast<float*>(p), v); }
  static x load_x(const char* p) { return L::iload(p); }
  static x x_of(typename L::ireg v) { return v; }
  static w load_w(const char* p) { return L::iload(p); }
  static w pick(typename L::ireg word) { return word; }
  static acc mac(acc a, x xv, w wv) { return L::dot_bf16(a, xv, wv); }
  static float element(const char* p, int c) {
    uint16_t bits;
    memcpy(&bits, p + 2 * c, 2);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float v;
    memcpy(&v, &wide, 4);
    return v;
  }
  static float add_scalar(float a, float b) { return a + b; }
};

template <class L_>
struct WordS8 {
  using L = L_;
  using rows = FloatRows<L>;
  using acc = typename L::ireg;
  using x = typename L::xreg;
  using w = typename L::wreg;
  using scalar = int32_t;
  static constexpr bool exact = true;
  static constexpr int columns = 4;

  static acc zero_acc() { return L::izero(); }
  static acc load_acc(const int32_t* p) { return L::iload(p); }
  static void store_acc(int32_t* p, acc v) { L::istore(p, v); }
  static x load_x(const char* p) { return L::x_of(L::iload(p)); }
  static x x_of(typename L::ireg v) { return L::x_of(v); }
  static w load_w(const char* p) { return L::w_of(L::iload(p)); }
  static w pick(typename L::ireg word) { return L::w_of(word); }
  static acc mac(acc a, x xv, w wv) { return L::dot(a, xv, wv); }
  static float element(const char* p, int c) {
    return static_cast<float>(reinterpret_cast<const int8_t*>(p)[c]);
  }
  // wraps, as vectors do: broken storage must not be undefined behaviour
  static int32_t add_scalar(int32_t a, int32_t b) {
    return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
  }
};

// The words of x that a step needs, gathered through memory: for sets without a wide permute.
template <class L, int G>
struct GatherTable {
  const int32_t* words;
  struct Place {
    uint8_t at[16];
  };

  void load(const char* p) { words = reinterpret_cast<const int32_t*>(p); }
  static Place place(const uint8_t* index) {
    Place p;
    for (int i = 0; i < 16; ++i) p.at[i] = index[i / G];
    return p;
  }
  typename L::ireg find(const Place& p, int v) const {
    int32_t found[L::width];
    for (int i = 0; i < L::width; ++i) found[i] = words[p.at[v * L::width + i]];
    return L::iload(found);
  }
};

}  // namespace
}  // namespace bigops
