"""What has Linears d -> f -> d, or the name of an FFN, and is none that can be split."""

import torch
import torch.nn.functional as F
from handmade import WIDTH, D, Plain, SelfAttention
from torch import nn


class Bottleneck(nn.Module):
    """An adapter whose name does not say so."""

    def __init__(self):
        super().__init__()
        self.down, self.act, self.up = nn.Linear(D, 3), nn.ReLU(), nn.Linear(3, D)

    def forward(self, x):
        return self.up(self.act(self.down(x)))


class WideAdapter(Plain):
    pass


class VisualProjector(Plain):
    pass


class PredictionHead(Plain):
    pass


class ExpertMLP(Plain):
    pass


class SharedExpert(Plain):
    pass


class Experts(nn.Module):
    """All experts of a layer in one parameter."""

    def __init__(self):
        super().__init__()
        self.gate_up, self.down = nn.Parameter(torch.randn(4, 2 * WIDTH, D)), nn.Parameter(torch.randn(4, D, WIDTH))

    def forward(self, x):
        gate, up = torch.einsum("...d,efd->...ef", x, self.gate_up).chunk(2, -1)
        return torch.einsum("...ef,edf->...d", F.silu(gate) * up, self.down)


class ConvMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(D, WIDTH), nn.GELU(), nn.Linear(WIDTH, D)
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x):
        return self.fc2(self.act(self.mix(self.fc1(x).transpose(1, 2)).transpose(1, 2)))


class LearnedMlp(Plain):
    def __init__(self):
        super().__init__(nn.PReLU())


class SquaredMlp(Plain):
    """Looks like `Plain`, and squares what the activation gives."""

    def forward(self, x):
        return self.narrow(self.squash(self.widen(x)) ** 2)


class MixingMlp(Plain):
    """Each neuron depends on its neighbour."""

    def forward(self, x):
        h = self.squash(self.widen(x))
        return self.narrow(h + h.roll(1, -1))


class TwoStepMlp(Plain):
    """Cannot be run on one tensor."""

    def forward(self, x, *, scale):
        return self.narrow(self.squash(self.widen(x)) * scale)


class WideAttention(SelfAttention):
    """q and o have the shapes of `up` and `down`, and a softmax stands between them."""

    def __init__(self):
        super().__init__(q=WIDTH)
        self.feature_map = nn.ReLU()


class PerLayerEmbeddings(nn.Module):
    """Gemma 3n's: a gate on what an embedding gives for this layer."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.mlp, self.act_fn = Plain(), nn.GELU()
        self.per_layer_input_gate, self.per_layer_projection = nn.Linear(D, width), nn.Linear(width, D)
        self.register_buffer("per_layer_input", torch.linspace(-1, 1, width))

    def forward(self, x):
        x = x + self.mlp(x)
        return x + self.per_layer_projection(self.act_fn(self.per_layer_input_gate(x)) * self.per_layer_input)
