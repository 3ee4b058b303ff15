"""Solvers, one file each: a class named after the file, with the solver's properties. A new solver is a new file.

Choosing one (variance of the result over the true one, exact velocity, data N(0.7, 0.25), 10 / 20 / 40 steps):

    euler               0.742  0.862  0.929   the ODE: no noise, nothing to tune against; good for sampling
    memoryless          1.018  1.004  1.001   without the noiseless last step; 1.028 / 1.005 / 1.001 with it: the default
    memoryless_offset   1.326  1.178  1.093   as printed in 2409.08861: its drift fits another noise level than its noise
    ddim(eta=1)         0.597  0.750  0.856   DDPM's posterior steps: memoryless, biased to small variance
"""
