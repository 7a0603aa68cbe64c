"""Optimizers beside torch's own, each from its paper; ``palimpsest.train.optim.make`` chooses among them.

They keep every number that they need to go on in tensors of a shape that never changes, so that a checkpoint holds
them; what is drawn is a function of the seed, the update and the parameter's name.
"""
