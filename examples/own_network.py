"""Hold a network of one's own against the theory: at every noise level, which window does it look through?

The network here is a linear filter, which blurs the more the noisier its image is; any function of a noisy image and a
time may stand in its place. One sees, for each noise level, how much of its estimate ELS with windows of 3, 5 .. 13
pixels predicts (median Pearson r), and that the best window grows with the noise, as it does for trained networks.
"""

import torch
from torch.nn.functional import avg_pool2d

import pyels

bank = pyels.datasets.load("fashion-mnist-6000", limit=200)
schedule = pyels.make_schedule("flow")


def blur(x, t, labels):
    """The mean over the more pixels the noisier x is, as an estimate of x0."""
    radius = 1 + int(4 * float(t[0]))
    return avg_pool2d(x, 2 * radius + 1, 1, radius, count_include_pad=False)


network = pyels.NetworkDenoiser(blur, predicts="x0", schedule="flow")
machine = pyels.ELS(bank, boundary="zeros")
sizes = [3, 5, 7, 9, 11, 13]
noise = torch.randn(4, *bank.shape, generator=torch.Generator().manual_seed(0))

print("   t " + "".join(f"  k={k:<4}" for k in sizes))
for t in (0.2, 0.4, 0.6, 0.8):
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x = alpha * bank.read(torch.arange(4)) + sigma * noise
    theirs = network.denoise(x, alpha, sigma)
    ours = machine.denoise_over_sizes(x, alpha, sigma, sizes)
    agreement = [pyels.metrics.pearson_r(theirs, estimate).median() for estimate in ours]
    print(f"{t:4.1f} " + "".join(f"{r:8.3f}" for r in agreement))
