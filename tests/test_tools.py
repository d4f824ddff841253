"""What people's tools do with a MoEfied checkpoint; each is skipped where its package is not installed."""

import importlib.util

import pytest
import torch
import transformers
from tiny import VOCAB, convert, distance, run, tiny_inputs, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers

from moefy_hf import load

CAUSAL = "AutoModelForCausalLM"


def needs(*packages: str):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    names = {"<pad>": 0, "<s>": 1, "</s>": 2} | {str(i): i for i in range(3, VOCAB)}
    made = Tokenizer(models.WordLevel(names, unk_token="</s>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "model_max_length": 32}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


@pytest.fixture
def saved(tmp_path):
    def make(name: str = "llama-without-biases", head: str = CAUSAL, k: int = 2):
        model = tiny_model(name, head)
        convert(model, k=k)
        model.save_pretrained(tmp_path / "moefied")
        tokenizer().save_pretrained(tmp_path / "moefied")
        return tmp_path / "moefied"

    return make


def numbers(count: int, length: int, seed: int = 0) -> list[str]:
    ids = torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))
    return [" ".join(map(str, row)) for row in ids.tolist()]


QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "bf16": False, "max_steps": 1}


@needs("trl")
def test_trl_trains_against_a_reference_that_is_moefied_too(saved, tmp_path):
    """It loads the reference by the model's name, and drops what the model was loaded with."""
    import trl
    from datasets import Dataset

    folder = saved()
    rows = {"prompt": numbers(8, 6), "chosen": numbers(8, 4, 1), "rejected": numbers(8, 4, 2)}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    args = trl.DPOConfig(output_dir=str(tmp_path / "run"), **QUIET)
    trainer = trl.DPOTrainer(model, args=args, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer())
    assert type(trainer.ref_model).__name__ == "MoefiedLlamaForCausalLM"
    inputs = tiny_inputs("llama")
    assert distance(run(trainer.ref_model.eval(), inputs), run(trainer.model.eval(), inputs)) < 1e-6
    trainer.train()


@needs("trl")
def test_trl_fine_tunes(saved, tmp_path):
    import trl
    from datasets import Dataset

    folder = saved()
    args = trl.SFTConfig(output_dir=str(tmp_path / "run"), **QUIET)
    args.model_init_kwargs = {"trust_remote_code": True}
    rows = Dataset.from_dict({"text": numbers(8, 10)})
    trainer = trl.SFTTrainer(str(folder), args=args, train_dataset=rows, processing_class=tokenizer())
    assert type(trainer.model).__name__ == "MoefiedLlamaForCausalLM"
    trainer.train()


@needs("sentence_transformers")
def test_sentence_transformers_embeds(saved, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    folder = saved("bert", "AutoModel")
    trust = {"trust_remote_code": True}
    words = Transformer(str(folder), model_kwargs=trust, config_kwargs=trust)
    found = SentenceTransformer(modules=[words, Pooling(words.get_embedding_dimension())])
    inner = found[0].model if hasattr(found[0], "model") else found[0].auto_model
    assert type(inner).__name__ == "MoefiedBertModel"
    first = found.encode(numbers(3, 6), convert_to_tensor=True)
    found.save_pretrained(str(tmp_path / "sentences"))
    again = SentenceTransformer(str(tmp_path / "sentences"), trust_remote_code=True)
    torch.testing.assert_close(again.encode(numbers(3, 6), convert_to_tensor=True), first)


@needs("onnxruntime", "onnx")
def test_onnx_exports_with_dynamic_shapes(saved, tmp_path):
    import onnxruntime

    model = load(saved("bert", "AutoModelForSequenceClassification")).eval()
    inputs, path = tiny_inputs("bert"), str(tmp_path / "model.onnx")
    axes = {name: {0: "rows", 1: "tokens"} for name in inputs}
    with torch.no_grad():
        torch.onnx.export(
            model, tuple(inputs.values()), path, input_names=list(inputs), dynamic_axes=axes, dynamo=False
        )
    longer = {"input_ids": torch.randint(3, VOCAB, (3, 11)), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    found = onnxruntime.InferenceSession(path).run(None, {name: each.numpy() for name, each in longer.items()})[0]
    assert distance([torch.from_numpy(found)], run(model, longer)[:1]) < 1e-5


@needs("bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_quantises_linears_and_leaves_routers(bits, saved):
    config = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved(), trust_remote_code=True, quantization_config=config, device_map="cpu"
    )
    for site in model.moe_sites():
        assert type(site.up).__name__ in ("Linear4bit", "Linear8bitLt") and site.act.computes_all is False
        assert site.act.router.weight.dtype == torch.float32 and not site.act.router.weight.requires_grad
    assert model(**tiny_inputs("llama")).logits.isfinite().all()


@needs("torchao")
def test_torchao_quantises_linears_and_leaves_routers(saved):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = load(saved()).eval()
    expected = run(model, tiny_inputs("llama"))
    quantize_(model, Int8WeightOnlyConfig())
    assert type(model.moe_sites()[0].act.router.weight) is torch.nn.Parameter
    assert 0 < distance(run(model, tiny_inputs("llama")), expected) < 1


@needs("lm_eval")
def test_lm_eval_scores(saved):
    from lm_eval.models.huggingface import HFLM

    scored = HFLM(pretrained=str(saved()), trust_remote_code=True, device="cpu", batch_size=2)
    assert type(scored.model).__name__ == "MoefiedLlamaForCausalLM"
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, (first, " 7 8"), 0) for first in numbers(2, 5)]
    assert all(score < 0 for score, _ in scored.loglikelihood(requests, disable_tqdm=True))


@needs("setfit")
def test_setfit_classifies(saved):
    from setfit import SetFitModel

    model = SetFitModel.from_pretrained(str(saved("bert", "AutoModel")), trust_remote_code=True)
    model.fit(numbers(8, 5), [0, 1] * 4, num_epochs=1)
    assert len(model.predict(numbers(3, 5))) == 3


def offloaded(folder, **kwargs):
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "lm_head", "model.rotary_emb")
    places = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, device_map=places, offload_folder=str(folder / "offload"), **kwargs
    )


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("compensation", [False, True])
def test_offloaded_layers_run(compensation, buffers, tmp_path):
    model = tiny_model("llama-without-biases", CAUSAL)
    settings = {"router": "linear", "calibration": [tiny_inputs("llama", seed=i) for i in range(20)]}
    convert(model, k=2, compensation=compensation, **settings)
    model.save_pretrained(tmp_path)
    found = offloaded(tmp_path, offload_buffers=buffers)
    assert distance(run(found, tiny_inputs("llama")), run(model, tiny_inputs("llama"))) < 1e-5
    found.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert all(torch.equal(each, model.state_dict()[name]) for name, each in again.state_dict().items())


def test_a_router_that_reads_weights_reads_offloaded_ones(tmp_path):
    model = tiny_model("llama-without-biases", CAUSAL)
    convert(model, k=2, router="partial_input")
    model.save_pretrained(tmp_path)
    assert distance(run(offloaded(tmp_path), tiny_inputs("llama")), run(model, tiny_inputs("llama"))) < 1e-5
