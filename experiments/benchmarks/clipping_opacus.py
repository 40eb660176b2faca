"""Opacus on the decoder of clipping.py, in a process and environment of its own.

clipping.py starts it, gives it parameters and tokens in a file, and asks for one step at a time so
that steps of both processes alternate. Nothing of JAX or dpjax is imported here.

    python clipping_opacus.py MODEL.npz '{"num_layers": 2, ...}' CORE

A negative CORE pins nothing. Then, a line each: "check METHOD" or "time METHOD" on stdin, one JSON
object on stdout. METHOD is plain, opacus-hooks or opacus-ghost.
"""

# pyright: reportMissingImports=false

import json
import os
import sys
import time
import warnings

import numpy as np
import opacus
import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
    GradSampleModuleFastGradientClipping,
)
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import nn
from torch.nn import functional

CLIP_NORM = 1.0


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        d = c["d_model"]
        self.heads, self.theta = c["num_heads"], c["rope_theta"]
        self.query, self.key, self.value, self.out = (nn.Linear(d, d, bias=False) for _ in range(4))

    def rotary(self, x):
        time, width = x.shape[1], x.shape[3]
        frequencies = self.theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
        angles = torch.arange(time, dtype=torch.float32)[:, None] * frequencies[None, :]
        cos, sin = angles.cos()[None, :, None, :], angles.sin()[None, :, None, :]
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def forward(self, x):
        batch, time, d = x.shape
        shape = (batch, time, self.heads, d // self.heads)
        query = self.rotary(self.query(x).view(shape)).transpose(1, 2)
        key = self.rotary(self.key(x).view(shape)).transpose(1, 2)
        value = self.value(x).view(shape).transpose(1, 2)
        scores = query @ key.transpose(2, 3) / shape[3] ** 0.5
        causal = torch.ones(time, time, dtype=torch.bool).tril()
        weights = scores.masked_fill(~causal, float("-inf")).softmax(dim=-1)
        return self.out((weights @ value).transpose(1, 2).reshape(batch, time, d))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        d = c["d_model"]
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = Attention(c)
        self.feed_forward = nn.ModuleDict(
            {
                "up": nn.Linear(d, c["d_ff"], bias=False),
                "down": nn.Linear(c["d_ff"], d, bias=False),
            }
        )

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        hidden = self.feed_forward["up"](self.feed_forward_norm(x))
        return x + self.feed_forward["down"](functional.gelu(hidden, approximate="tanh"))


class Decoder(nn.Module):
    """dpjax.models.Decoder with LayerNorm, gelu and an untied head."""

    def __init__(self, c):
        super().__init__()
        self.embedding = nn.Embedding(c["vocabulary_size"], c["d_model"])
        self.blocks = nn.ModuleList(Block(c) for _ in range(c["num_layers"]))
        self.final_norm = nn.LayerNorm(c["d_model"])
        self.head = nn.Linear(c["d_model"], c["vocabulary_size"], bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.final_norm(x))


def load(model, arrays):
    """Copies dpjax's parameters; kernels are [in, out] there and [out, in] here."""
    names = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    state = {}
    for path, value in arrays.items():
        *module, leaf = path.split("/")
        tensor = torch.from_numpy(value.T.copy() if leaf == "kernel" else value)
        state[".".join([*module, names.get(leaf, leaf)])] = tensor
    model.load_state_dict(state)


class Step:
    """One of the three ways to get the sum of gradients over the batch."""

    def __init__(self, method, config, arrays, tokens):
        self.method = method
        # Ghost clipping of an embedding takes contiguous indices only.
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        model = Decoder(config)
        model.train()
        load(model, arrays)
        self.model = model
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        settings = {"noise_multiplier": 0.0, "max_grad_norm": CLIP_NORM, "loss_reduction": "sum"}
        if method == "opacus-hooks":
            self.model = GradSampleModule(model, loss_reduction="sum")
            self.optimizer = DPOptimizer(sgd, expected_batch_size=None, **settings)
        elif method == "opacus-ghost":
            self.model = GradSampleModuleFastGradientClipping(
                model, loss_reduction="sum", max_grad_norm=CLIP_NORM, use_ghost_clipping=True
            )
            self.optimizer = DPOptimizerFastGradientClipping(
                sgd, expected_batch_size=None, **settings
            )
        else:
            self.optimizer = sgd

    def __call__(self):
        """The gradients, or their clipped sum, one tensor for each parameter."""
        logits = self.model(self.inputs)
        losses = functional.cross_entropy(
            logits.flatten(0, 1), self.targets.flatten(), reduction="none"
        )
        losses = losses.view_as(self.targets).mean(dim=1)
        if self.method == "opacus-ghost":
            DPTensorFastGradientClipping(self.model, self.optimizer, losses, "sum").backward()
            return [p.grad for p in self.model.parameters()]
        losses.sum().backward()
        if self.method == "plain":
            return [p.grad for p in self.model.parameters()]
        self.optimizer.clip_and_accumulate()
        return [p.summed_grad for p in self.model.parameters()]

    def norms(self):
        """Of each example's gradient, after a call; None where nothing was clipped."""
        if self.method == "plain":
            return None
        if self.method == "opacus-ghost":
            return self.model.per_sample_gradient_norms.tolist()
        squares = [p.grad_sample.flatten(1).square().sum(1) for p in self.model.parameters()]
        return torch.stack(squares).sum(0).sqrt().tolist()


def main():
    warnings.simplefilter("ignore")
    path, config, core = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    if core >= 0:
        os.sched_setaffinity(0, {core})
        torch.set_num_threads(1)
        torch.set_num_interop_threads(1)
    arrays = dict(np.load(path))
    tokens = torch.from_numpy(arrays.pop("tokens")).long()
    versions = {"opacus": opacus.__version__, "torch": torch.__version__}
    print(json.dumps(versions), flush=True)
    steps = {}
    for line in sys.stdin:
        command, method = line.split()
        if method not in steps:
            steps[method] = Step(method, config, arrays, tokens)
        cpu, wall = time.process_time(), time.perf_counter()
        gradients = steps[method]()
        reply = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        if command == "check":
            reply["norms"] = steps[method].norms()
            reply["norm_of_sum"] = sum(float(g.square().sum()) for g in gradients) ** 0.5
        del gradients
        steps[method].optimizer.zero_grad()
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
