"""Methods, one paper and one file each: a class of settings named after the file, with `gradients()`.

`gradients(tuned, base, reward, x, generator, state)` is a generator: at each yield it has added the gradient of one optimizer
step to the parameters of `tuned`, and hands out what it measured.
"""
