"""The kernel of `gradient_sums.py`; importing it needs Triton."""

import triton
import triton.language as tl


@triton.jit
def add_pieces(gradients, sums, sizes, tensors, firsts, ELEMENTS: tl.constexpr):
    """Each program adds `ELEMENTS` elements, from its first on, of one tensor; tensors are given by their addresses."""
    program = tl.program_id(0)
    tensor = tl.load(tensors + program)
    gradient = tl.load(gradients + tensor).to(tl.pointer_type(tl.bfloat16))
    total = tl.load(sums + tensor).to(tl.pointer_type(tl.float32))
    element = tl.load(firsts + program) + tl.arange(0, ELEMENTS)
    inside = element < tl.load(sizes + tensor)
    added = tl.load(gradient + element, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(total + element, mask=inside, other=0.0)
    tl.store(total + element, before + added, mask=inside)
