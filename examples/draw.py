"""Draw clothes from noise with a machine that nobody trained, and look them up in the bank.

One sees, in draw.png, a sandal, a trouser, a pullover and an ankle boot (upper row) that are in no data set, and below
each the image of the bank that is most like it: ELS makes new pictures of old patches. With `pyels.IS(bank)`, the
unrestricted optimum, which takes no patch sizes, both rows are the same.
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import pyels

bank = pyels.datasets.load("fashion-mnist-6000", limit=1000)
machine = pyels.ELS(bank, boundary="zeros")
labels = torch.tensor([5, 1, 2, 9])
noise = torch.randn(4, *bank.shape, generator=torch.Generator().manual_seed(0))
sizes = pyels.presets.patch_sizes("fashion-mnist-resnet-zeros", steps=10)
drawn = pyels.sample(machine, noise, steps=10, patch_sizes=sizes, labels=labels)

images = bank.read(torch.arange(len(bank)))
nearest = images[torch.cdist(drawn.flatten(1), images.flatten(1)).argmin(1)]
print("Pearson r with the nearest image of the bank:", pyels.metrics.pearson_r(drawn, nearest))

_, axes = plt.subplots(2, 4, figsize=(6, 3))
for axis, image in zip(axes.flat, torch.cat([drawn, nearest]), strict=True):
    axis.imshow(image[0], cmap="gray", vmin=-1, vmax=1)
    axis.axis("off")
plt.savefig("draw.png")
