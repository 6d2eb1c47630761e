# Note for whoever looks for StackSlice: no class is needed after all. Staggered refresh keeps its
# places in its state (sliced with it), and the lens takes the number of the layer as a plain extra
# argument:   tx.update(grads, state, params, layer=index)   # index: int32 scalar, leaves [1, ...]
# This file will be removed.
