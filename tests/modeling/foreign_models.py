"""Three models with code of their own, as they lie in folders on the Hub; none of them is transformers'."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import torch

VOCAB = 99
CONFIG = """
from transformers import PreTrainedConfig


class {name}Config(PreTrainedConfig):
    model_type = "{type}"

    def __init__(self, width=16, wide=48, depth=2, words=99, num_labels=3, **kwargs):
        super().__init__(num_labels=num_labels, **kwargs)
        self.width, self.wide, self.depth, self.words = width, wide, depth, words
        self.hidden_size, self.vocab_size, self.num_hidden_layers = width, words, depth
"""
DECODER = {  # a gated FFN whose names say nothing, with help from another file
    "configuration_zork.py": CONFIG.format(name="Zork", type="zork"),
    "zork_parts.py": """
import torch
from torch import nn

from .zork_norm import Evener


class Thrum(nn.Module):
    def __init__(self, width, wide):
        super().__init__()
        self.one = nn.Linear(width, wide, bias=False)
        self.two = nn.Linear(width, wide, bias=True)
        self.three = nn.Linear(wide, width, bias=False)
        self.bend = nn.SiLU()

    def forward(self, x):
        return self.three(self.one(x) * self.bend(self.two(x)))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mix = nn.Linear(config.width, config.width)
        self.even, self.thrum = Evener(config.width), Thrum(config.width, config.wide)

    def forward(self, x):
        before = torch.cumsum(self.mix(x), 1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        x = x + torch.tanh(before)
        return x + self.thrum(self.even(x))
""",
    "zork_norm.py": """
from torch import nn


class Evener(nn.LayerNorm):
    pass
""",
    "modeling_zork.py": """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from .configuration_zork import ZorkConfig
from .zork_parts import Layer


class ZorkPreTrainedModel(PreTrainedModel):
    config_class = ZorkConfig
    base_model_prefix = "zork"


class ZorkModel(ZorkPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.words, config.width)
        self.steps = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, **kwargs):
        x = self.embed(input_ids)
        for step in self.steps:
            x = step(x)
        return BaseModelOutput(last_hidden_state=x)


class ZorkForCausalLM(ZorkPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.zork = ZorkModel(config)
        self.tell = nn.Linear(config.width, config.words)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        logits, loss = self.tell(self.zork(input_ids)[0]), None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}
""",
}
ENCODER = {  # a function instead of an activation module, in the layer itself
    "configuration_plain.py": CONFIG.format(name="Plain", type="plain"),
    "modeling_plain.py": """
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from .configuration_plain import PlainConfig


class PlainMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wi = nn.Linear(config.width, config.wide)
        self.wo = nn.Linear(config.wide, config.width)

    def forward(self, x):
        return self.wo(F.gelu(self.wi(x)))


class PlainBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = nn.MultiheadAttention(config.width, 2, batch_first=True)
        self.norm, self.mlp = nn.LayerNorm(config.width), PlainMLP(config)

    def forward(self, x):
        x = x + self.attention(x, x, x)[0]
        return x + self.mlp(self.norm(x))


class PlainPreTrainedModel(PreTrainedModel):
    config_class = PlainConfig
    base_model_prefix = "model"


class PlainModel(PlainPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.words, config.width)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.depth))
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, input_ids=None, attention_mask=None):
        x = self.embeddings(input_ids)
        for block in self.blocks:
            x = block(x)
        return BaseModelOutput(last_hidden_state=x)


class PlainForSequenceClassification(PlainPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model, self.score = PlainModel(config), nn.Linear(config.width, config.num_labels)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        logits = self.score(self.model(input_ids)[0].mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
""",
}
VISION = {  # gate and up projection in one matrix, and configs within the config
    "configuration_gaze.py": """
from transformers import PreTrainedConfig


class GazeEyeConfig(PreTrainedConfig):
    model_type = "gaze_eye"

    def __init__(self, width=16, wide=48, depth=2, patch_size=4, image_size=8, num_channels=3, **kwargs):
        super().__init__(**kwargs)
        self.width, self.wide, self.depth = width, wide, depth
        self.patch_size, self.image_size, self.num_channels = patch_size, image_size, num_channels


class GazeConfig(PreTrainedConfig):
    model_type = "gaze"
    sub_configs = {"eye_config": GazeEyeConfig}

    def __init__(self, eye_config=None, num_labels=3, **kwargs):
        super().__init__(num_labels=num_labels, **kwargs)
        self.eye_config = eye_config if isinstance(eye_config, GazeEyeConfig) else GazeEyeConfig(**(eye_config or {}))
""",
    "modeling_gaze.py": """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput

from .configuration_gaze import GazeConfig, GazeEyeConfig


class GazeMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.both = nn.Linear(config.width, 2 * config.wide)
        self.back = nn.Linear(config.wide, config.width)
        self.act = ACT2FN["gelu"]

    def forward(self, x):
        up, gate = self.both(x).chunk(2, -1)
        return self.back(self.act(gate) * up)


class GazeLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(config.width), GazeMLP(config)

    def forward(self, x):
        x = x + x.mean(1, keepdim=True)
        return x + self.mlp(self.norm(x))


class GazePreTrainedModel(PreTrainedModel):
    config_class = GazeConfig
    base_model_prefix = "gaze"
    main_input_name = "pixel_values"


class GazeEye(PreTrainedModel):
    config_class = GazeEyeConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.patches = nn.Conv2d(config.num_channels, config.width, config.patch_size, config.patch_size)
        self.layers = nn.ModuleList(GazeLayer(config) for _ in range(config.depth))
        self.post_init()

    def forward(self, pixel_values):
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return x


class GazeModel(GazePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.eye = GazeEye(config.eye_config)
        self.post_init()

    def forward(self, pixel_values=None):
        return BaseModelOutput(last_hidden_state=self.eye(pixel_values))


class GazeForImageClassification(GazePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.gaze, self.name = GazeModel(config), nn.Linear(config.eye_config.width, config.num_labels)
        self.post_init()

    def forward(self, pixel_values=None, labels=None):
        logits = self.name(self.gaze(pixel_values)[0].mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
""",
}
FILES = {"zork": DECODER, "plain": ENCODER, "gaze": VISION}
HEAD = {"zork": "ForCausalLM", "plain": "ForSequenceClassification", "gaze": "ForImageClassification"}


def auto_map(name: str) -> dict[str, str | list[str | None]]:
    """What the checkpoint's config says; it names a tokenizer, too."""
    classes = {f"AutoModel{head}": f"modeling_{name}.{name.title()}{head}" for head in (HEAD[name],)}
    own = {
        "AutoConfig": f"configuration_{name}.{name.title()}Config",
        "AutoModel": f"modeling_{name}.{name.title()}Model",
    }
    return {**own, **classes, "AutoTokenizer": [f"tokenization_{name}.{name.title()}Tokenizer", None]}


def write_code(name: str, folder: Path) -> Path:
    """Write a model's files, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in FILES[name].items():
        (folder / file).write_text(text)
    return folder


def imported(name: str, folder: Path, monkeypatch) -> ModuleType:
    """Write a model's files as a package of the user, and import its modeling file."""
    write_code(name, folder / f"{name}_package")
    (folder / f"{name}_package" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(folder)
    for module in [each for each in sys.modules if each.split(".")[0] == f"{name}_package"]:
        monkeypatch.delitem(sys.modules, module)  # of another folder
    return importlib.import_module(f"{name}_package.modeling_{name}")


def fresh(module: ModuleType, name: str, head: str = "Model", seed: int = 0):
    """A model with random weights, biases too."""
    cls = getattr(module, name.title() + head)
    torch.manual_seed(seed)
    model = cls(cls.config_class()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def write_checkpoint(name: str, folder: Path, monkeypatch) -> Path:
    """Write a dense checkpoint with its code, as its authors would."""
    module = imported(name, folder.parent / "authors", monkeypatch)
    fresh(module, name, HEAD[name]).save_pretrained(folder)
    write_code(name, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map(name)}))
    return folder


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "gaze":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(3, VOCAB, (2, 7), generator=generator)}
