"""transformers' common model tests on one architecture, stock or MoEfied; collected by run.py alone."""

import copy
import importlib
import os
import unittest

import torch
from tiny import LENGTH, tiny, tiny_config, tiny_inputs
from transformers_tests.test_modeling_common import ModelTesterMixin

from moefy_hf import MoEficationConfig
from moefy_hf.modeling.moefied import MoefiedMixin

MODEL, KIND = os.environ["SUITE_MODEL"], os.environ["SUITE_KIND"]
FILE = importlib.import_module(f"moefy_hf.modeling.modeling_moefied_{MODEL}")
OWN = [cls for cls in vars(FILE).values() if isinstance(cls, type) and "_auto_class" in vars(cls)]
ALL_EXPERTS = {"type": "top_k", "k": 1.0, "allocation": "uniform"}
SECTION = MoEficationConfig(num_experts=4, splitter="random", router="random", selection=ALL_EXPERTS).section()


def named_as_stock(cls: type) -> type:
    """A MoEfied class by the name of the stock one: the tests decide by names what a head takes."""
    return type(cls.stock_class().__name__, (cls,), {"__module__": cls.__module__})


class Tester:
    """What the tests ask of an architecture's tester."""

    batch_size, seq_length, is_training, num_choices = 2, LENGTH, True, 3

    def __init__(self, parent):
        config = self.get_config()
        self.hidden_size = config.hidden_size
        self.num_hidden_layers, self.num_attention_heads = config.num_hidden_layers, config.num_attention_heads
        self.image_size, self.patch_size = getattr(config, "image_size", 8), getattr(config, "patch_size", 4)
        self.encoder_seq_length = self.decoder_seq_length = self.key_length = LENGTH

    def get_config(self):
        config = tiny_config(MODEL)
        config.use_cache = True
        if KIND == "moefied":
            config.moefication = copy.deepcopy(SECTION)
        return config

    def prepare_config_and_inputs_for_common(self):
        torch.manual_seed(0)
        return self.get_config(), tiny_inputs(MODEL, self.head())

    def head(self) -> str:
        return {"speech": "AutoModelForSpeechSeq2Seq"}.get(tiny(MODEL).inputs, "AutoModel")


class ModelTests(ModelTesterMixin, unittest.TestCase):
    all_model_classes = tuple(
        named_as_stock(cls) if KIND == "moefied" else cls.stock_class() for cls in OWN if issubclass(cls, MoefiedMixin)
    )
    is_encoder_decoder = tiny(MODEL).inputs in ("seq2seq", "speech")
    test_resize_embeddings = tiny(MODEL).inputs in ("text", "seq2seq")

    def setUp(self):
        self.model_tester = Tester(self)
