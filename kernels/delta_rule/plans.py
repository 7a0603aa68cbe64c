"""Calls that an offline report compiles and counts: every kernel, in its main variants."""

from collections.abc import Callable

from ..linear_memory.planned import decode, plan
from . import delta_rule

PLANS: dict[str, Callable[[], None]] = {
    "gated_d64_c64_bf16": lambda: plan(delta_rule, delta=True),
    "plain_d128_packed_state_c64_bf16": lambda: plan(
        delta_rule, delta=True, decay=False, key_dim=128, value_dim=128, heads=8, packed=True
    ),
    "gated_d128_decode_bf16": lambda: decode(delta_rule, delta=True),
}
