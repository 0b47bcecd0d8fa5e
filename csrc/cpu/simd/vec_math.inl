// exp, tanh, sigmoid and the normal distribution on float vectors; included by the vector headers
// with V a class that offers the arithmetic. Coefficients: own least-squares fits with Lawson
// weights against 40-digit values (errors of the polynomials in the comments).
//
// NaN survives: in V::min(a, b) and V::max(a, b) the second operand wins when one is NaN.

template <class V>
struct VecMath {
  using reg = typename V::reg;

  template <int N>
  static reg horner(reg x, const float (&c)[N]) {
    reg r = V::set1(c[N - 1]);
    for (int i = N - 2; i >= 0; --i) r = V::fma(r, x, V::set1(c[i]));
    return r;
  }

  // e^x, relative error below 2 units in the last place; 0 and inf where float ends.
  static reg exp(reg x) {
    static constexpr float c[] = {0.5f, 0.16666516661643982f, 0.04166620224714279f,
                                  0.008369073271751404f, 0.001395080704241991f};  // 3.2e-9
    x = V::min(V::set1(89.0f), x);
    x = V::max(V::set1(-104.0f), x);
    const reg n = V::round(V::mul(x, V::set1(1.44269504088896341f)));
    // ln 2 in two parts: n * high is exact for |n| < 2^9
    reg r = V::fma(n, V::set1(-0.693359375f), x);
    r = V::fma(n, V::set1(2.12194440e-4f), r);
    const reg p = V::fma(V::mul(r, r), horner(r, c), V::add(r, V::set1(1.0f)));
    return V::scale2(p, n);
  }

  // 2^t for -126 <= t <= 126, relative error below 2 units in the last place. What is added to t
  // rounds it to whole numbers, which stand in the lowest bits then.
  static reg exp2_normal(reg t) {
    static constexpr float c[] = {0.6931470036506653f, 0.24022242426872253f, 0.05550733581185341f,
                                  0.009671512991189957f, 0.001326472731307149f};  // 1.1e-7
    const reg magic = V::set1(12582912.0f);                                       // 1.5 * 2^23
    const reg whole = V::add(t, magic);
    const reg f = V::sub(t, V::sub(whole, magic));
    return V::add_exponent(V::fma(f, horner(f, c), V::set1(1.0f)), whole);
  }

  static reg sigmoid(reg x) {
    return V::div(V::set1(1.0f), V::add(V::set1(1.0f), exp(V::sub(V::zero(), x))));
  }

  // Odd polynomial near 0 (where 1 - 2/(e^2x + 1) cancels), the exponential form beyond.
  static reg tanh(reg x) {
    static constexpr float c[] = {-0.3333328366279602f, 0.13331490755081177f, -0.05374349653720856f,
                                  0.020650578662753105f,
                                  -0.005717036779969931f};  // 4.1e-9 on |x| < 0.625
    const reg a = V::abs(x);
    const reg t = V::mul(x, x);
    const reg small = V::fma(V::mul(x, t), horner(t, c), x);
    const reg e = exp(V::add(a, a));
    const reg big = V::sub(V::set1(1.0f), V::div(V::set1(2.0f), V::add(e, V::set1(1.0f))));
    return V::select(V::less(a, V::set1(0.625f)), small, V::copysign(big, x));
  }

  // Phi(x) = (1 + erf(x / sqrt 2)) / 2 with an error below 2e-7 (that of a float 1 + erf); erf as
  // u P(u^2) / Q(u^2), since a form for the tails too costs 70 cycles a vector where this takes 20.
  static reg normal_cdf(reg x) {
    static constexpr float p[] = {1.1283791f,    0.19155161f,    0.05287562f,
                                  0.0038082171f, 0.00028468887f, 2.025897e-06f};
    static constexpr float q[] = {1.0f,         0.50309086f,  0.114560165f,
                                  0.015055202f, 0.001170739f, 3.7831745e-05f};  // 2.1e-8
    const reg limit = V::set1(3.95f);  // erf is 1 to the last bit beyond
    reg u = V::min(limit, V::mul(x, V::set1(0.70710678118654752f)));
    u = V::max(V::sub(V::zero(), limit), u);
    const reg t = V::mul(u, u);
    const reg half = V::set1(0.5f);
    const reg phi = V::fma(V::mul(u, half), V::div(horner(t, p), horner(t, q)), half);
    // exactly 0 far left: -inf * Phi(-inf) is NaN
    return V::select(V::less(x, V::set1(-5.58f)), V::zero(), phi);
  }

  static reg normal_pdf(reg x) {
    return V::mul(V::set1(0.39894228040143267f), exp(V::mul(V::mul(x, x), V::set1(-0.5f))));
  }
};
