"""Every call of an op with a string argument leaks 48 bytes a string, forward and backward; exit 1 when it does."""

import ctypes, gc, sys
import torch, bigops
from bigops.formats import PackedWeight, QuantizedWeight, SparseWeight


class MallInfo(ctypes.Structure):
    _fields_ = [
        (n, ctypes.c_size_t)
        for n in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype = MallInfo
torch.set_num_threads(1)
x, w = torch.randn(2, 16), torch.randn(16, 16)
X, W = torch.randn(256, 512), torch.randn(512, 512)
qw, pw, sw, u, v = (
    QuantizedWeight.from_dense(w),
    PackedWeight.from_dense(w),
    SparseWeight.from_dense(w),
    torch.randn(16, 4),
    torch.randn(4, 16),
)
xg = x.clone().requires_grad_()


def both(f):
    def g():
        f().sum().backward()
        xg.grad = None

    return g


calls = {
    "torch linear (control)": (lambda: torch.nn.functional.linear(x, w), 40000),
    "fused_linear": (lambda: bigops.fused_linear(x, w), 40000),
    "fused_linear, by oneDNN": (lambda: bigops.fused_linear(X, W), 1000),
    "packed_linear": (lambda: bigops.packed_linear(x, pw), 40000),
    "quantized_linear": (lambda: bigops.quantized_linear(x, qw), 40000),
    "sparse_linear": (lambda: bigops.sparse_linear(x, sw), 40000),
    "low_rank_linear": (lambda: bigops.low_rank_linear(x, u, v), 40000),
    "fused_linear fwd+bwd": (both(lambda: bigops.fused_linear(xg, w, None, None, "gelu")), 10000),
}
bad = 0
for name, (f, n) in calls.items():
    for _ in range(300):
        f()
    gc.collect()
    before = libc.mallinfo2().uordblks
    for _ in range(n):
        f()
    gc.collect()
    leak = (libc.mallinfo2().uordblks - before) / n
    print(f"{name:26s} {leak:+7.1f} bytes a call never freed")
    bad += leak > 20
sys.exit(bad > 0)
