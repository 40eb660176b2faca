"""The models of federated.py in torch, for the processes of its peers."""

# pyright: reportMissingImports=false

import functools
import os

import numpy as np
import torch
from torch import nn
from torch.nn import functional


def settle(core):
    """One thread, on one core unless that is negative."""
    if core >= 0:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)


class Model(nn.Module):
    """pfl's benchmarks/model/pytorch: dnn.py with two hidden layers, cnn.py without dropout."""

    def __init__(self, name, arrays):
        super().__init__()
        self.name = name
        kinds = {"conv": [], "dense": []}
        for path, weight in arrays.items():
            kind, leaf = path.rstrip("/wb")[:-1], path[-1]
            if leaf == "w":
                sizes = weight.shape[-2:]
                kinds[kind].append(nn.Conv2d(*sizes, 3) if kind == "conv" else nn.Linear(*sizes))
        self.convolutions = nn.ModuleList(kinds["conv"])
        self.layers = nn.ModuleList(kinds["dense"])
        self._load(arrays)

    def _load(self, arrays):
        """From dense kernels [in, out] and convolutions [height, width, in, out]."""
        with torch.no_grad():
            for kind, layers in (("conv", self.convolutions), ("dense", self.layers)):
                for n, layer in enumerate(layers):
                    weight = arrays[f"{kind}{n}/w"]
                    if kind == "dense" and n == 0 and self.convolutions:
                        # Torch flattens channels before space.
                        channels = self.convolutions[-1].out_channels
                        side = round((len(weight) / channels) ** 0.5)
                        weight = weight.reshape(side, side, channels, -1).transpose(2, 0, 1, 3)
                        weight = weight.reshape(side * side * channels, -1)
                    order = (3, 2, 0, 1) if kind == "conv" else (1, 0)
                    layer.weight.copy_(torch.from_numpy(weight.transpose(order).copy()))
                    layer.bias.copy_(torch.from_numpy(arrays[f"{kind}{n}/b"]))

    def forward(self, x):
        if self.convolutions:
            x = x.permute(0, 3, 1, 2)
            for layer in self.convolutions:
                x = torch.relu(layer(x))
            x = functional.max_pool2d(x, 2).flatten(1)
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)

    def loss(self, x, y):
        return functional.cross_entropy(self(x), y.long())  # pfl makes every tensor float32

    def metrics(self, x, y):  # pfl asks for it
        return {}


def read(path):
    """Parameters by path, examples and labels."""
    arrays = dict(np.load(path))
    return arrays, arrays.pop("x"), arrays.pop("y").astype(np.int64)


@functools.cache
def read_once(path):
    """`read`, kept for the next time in the same process."""
    return read(path)
