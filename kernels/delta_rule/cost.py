"""What the delta rule costs, from shapes alone."""

from functools import partial

from ..linear_memory.cost import linear_memory_cost

cost = partial(linear_memory_cost, delta=True)
