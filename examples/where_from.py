"""Follow one pixel from noise to image, and see which training patches it is made of.

One sees, for the pixel in the middle of a shirt, how many patches share its weight (the exponential of the posterior's
entropy) and where the heaviest comes from. In pure noise nearly all patches count alike, all 14,400 that lie inside 100
shirts; on the way down a few are left; at the end, where windows are small, flat patches of many images share again.
"""

import torch

import pyels

bank = pyels.datasets.load("fashion-mnist-6000", limit=1000)
machine = pyels.ELS(bank, boundary="zeros")
sizes = pyels.presets.patch_sizes("fashion-mnist-resnet-zeros", steps=10)
labels = torch.tensor([6])
noise = torch.randn(1, *bank.shape, generator=torch.Generator().manual_seed(1))
row, column = 14, 14


def tell(step):
    level = step.level
    post = machine.posterior(step.x, level.alpha, level.sigma, labels, level.patch_size)
    image, r, c = post.source[0, row, column].tolist()
    patches, weight = post.entropy[0, row, column].exp(), post.source_weight[0, row, column]
    print(
        f"t = {level.t:.1f}, windows of {level.patch_size:2}: as many as {patches:8.1f} patches; "
        f"{weight:6.1%} of the weight is that of image {image} at ({r}, {c})"
    )


pyels.sample(machine, noise, steps=10, patch_sizes=sizes, labels=labels, callback=tell)
