"""Activations and their derivatives for Triton kernels, in float32.

A kernel takes the activation as a compile-time integer, so each compiled kernel holds one formula.
Codes 0..7 act on one value. Codes 8..11 are gated pairs, ``act(gate) * up``; `split_code` gives
the activation of the gate. NaN passes through every activation, relu included, as in torch.
"""

import triton
import triton.language as tl

NAMES = (
    "none",
    "relu",
    "relu2",
    "gelu",
    "gelu_tanh",
    "silu",
    "sigmoid",
    "tanh",
    "swiglu",
    "geglu",
    "geglu_tanh",
    "reglu",
)
"""Activation names; the position is the code."""

NONE = tl.constexpr(0)
RELU = tl.constexpr(1)
RELU2 = tl.constexpr(2)
GELU = tl.constexpr(3)
GELU_TANH = tl.constexpr(4)
SILU = tl.constexpr(5)
SIGMOID = tl.constexpr(6)
TANH = tl.constexpr(7)

_GATE = {8: 5, 9: 3, 10: 4, 11: 1}


def split_code(code: int) -> tuple[int, bool]:
    """Give (code of the one-value activation, whether it gates a second value).

    Raises:
        ValueError: ``code`` is not in 0..11.
    """
    if not 0 <= code < len(NAMES):
        raise ValueError(f"activation: expected a code in 0..{len(NAMES) - 1}; got {code}")
    return (_GATE[code], True) if code in _GATE else (code, False)


def ungated_code(code: int) -> int:
    """Give ``code`` back.

    Raises:
        ValueError: it is not in 0..11, or that of a gated pair.
    """
    act, gated = split_code(code)
    if gated:
        raise ValueError(f"activation: expected the code of no gated pair; got {code}")
    return act


@triton.jit
def _tanh(x):
    # 1 - 2 / (exp(2|x|) + 1) loses all digits near 0, so there an odd polynomial serves: a minimax
    # fit of (tanh(x) - x) / x^3 in x^2 on |x| < 0.65, relative error below 7e-9.
    s = x * x
    p = -0.005515167023986578 * s + 0.02046942338347435
    p = p * s - 0.05368802323937416
    p = p * s + 0.1333083063364029
    p = p * s - 0.3333325982093811
    near = x + x * s * p
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.65, near, tl.where(x < 0.0, -far, far))


@triton.jit
def _gelu_tanh_argument(x):
    # Twice the tanh argument: 0.5 * (1 + tanh(u)) is sigmoid(2u). 1.5957... = 2 * sqrt(2 / pi).
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)


@triton.jit
def activate(x, ACT: tl.constexpr):
    """act(x), elementwise; x float32, any shape."""
    if ACT == RELU:
        y = tl.where(x <= 0.0, 0.0, x)
    elif ACT == RELU2:
        r = tl.where(x <= 0.0, 0.0, x)
        y = r * r
    elif ACT == GELU:
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACT == GELU_TANH:
        y = x * tl.sigmoid(_gelu_tanh_argument(x))
    elif ACT == SILU:
        y = x * tl.sigmoid(x)
    elif ACT == SIGMOID:
        y = tl.sigmoid(x)
    elif ACT == TANH:
        y = _tanh(x)
    else:
        tl.static_assert(ACT == NONE, "unknown activation code")
        y = x
    return y


@triton.jit
def derivative(x, ACT: tl.constexpr):
    """d act(x) / dx, elementwise; x float32, any shape. At 0, relu has slope 0, as in torch."""
    if ACT == RELU:
        d = tl.where(x <= 0.0, 0.0, 1.0)
    elif ACT == RELU2:
        d = tl.where(x <= 0.0, 0.0, 2.0 * x)
    elif ACT == GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        d = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * density
    elif ACT == GELU_TANH:
        v = _gelu_tanh_argument(x)
        e = tl.exp(-tl.abs(v))  # s * (1 - s) without the cancellation of 1 - s near s = 1
        slope = e / ((1.0 + e) * (1.0 + e))
        # The slope is 0 long before the square overflows, at 1.8e19. Infinity gives NaN, as torch.
        size = tl.minimum(tl.abs(x), 1e18)
        d = tl.sigmoid(v) + x * slope * (1.5957691216057308 * (1.0 + 0.134145 * size * size))
    elif ACT == SILU:
        s = tl.sigmoid(x)
        d = s * (1.0 + x * (1.0 - s))
    elif ACT == SIGMOID:
        s = tl.sigmoid(x)
        d = s * (1.0 - s)
    elif ACT == TANH:
        t = _tanh(x)
        d = 1.0 - t * t
    else:
        tl.static_assert(ACT == NONE, "unknown activation code")
        d = x * 0.0 + 1.0
    return d
