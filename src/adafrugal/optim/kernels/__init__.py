"""Fast forms of `rules`; `updates` decides which tensors take which.

`one_pass` is the rules in Triton, for a GPU: the whole step of a group in one launch; `tables` finds its tensors.
`lists` applies rules to lists of tensors: by torch's own kernels for many tensors, by `compiled` on a CPU, or one after
the other. Each form agrees with `rules`, bit for bit or within the tolerance that its test states.
"""
