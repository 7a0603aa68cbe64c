"""Calls that an offline report compiles and counts: every kernel, in its main variants."""

from collections.abc import Callable

from ..linear_memory.planned import decode, plan
from . import linear_attention

PLANS: dict[str, Callable[[], None]] = {
    "decay_d128_packed_state_c64_bf16": lambda: plan(
        linear_attention, delta=False, key_dim=128, value_dim=128, heads=8, packed=True
    ),
    "decay_d128_decode_bf16": lambda: decode(linear_attention, delta=False),
}
