"""Models whose weights accelerate keeps on disk are converted, saved and exported as those in memory are."""

import shutil

import pytest
import torch
from gguf_files import write_dense
from safetensors.torch import load_file
from test_cli import number_tokenizer
from tiny import VOCAB, tiny_inputs, tiny_model

from moefy_hf import MoEficationConfig, evaluate, export, load, moefy_, profile
from moefy_hf.cli import offloading
from moefy_hf.cli.main import main
from moefy_hf.conversion import fit_routers, pipeline
from moefy_hf.errors import CalibrationError, MoefyError
from moefy_hf.modeling.ffn_sites import find_sites
from moefy_hf.splitters import SPLITTERS

HEADS = {
    "llama": "AutoModelForCausalLM",
    "bert": "AutoModelForSequenceClassification",
    "t5": "AutoModelForSeq2SeqLM",
    "vit": "AutoModelForImageClassification",
    "gpt2": "AutoModelForCausalLM",  # ties embeddings, and has Linears that are the other way round
}
SETTINGS = {"expert_size": 8, "calibration_tokens": 400, "splitter": "coactivation", "router": "linear"}


def batches(name: str, count: int = 30) -> list[dict[str, torch.Tensor]]:
    return [tiny_inputs(name, HEADS[name], seed) for seed in range(count)]


@pytest.fixture
def dense(tmp_path):
    """A function that saves a tiny model in several files."""

    def save(name: str):
        tiny_model(name, HEADS[name]).save_pretrained(tmp_path / name, max_shard_size="20KB")
        return tmp_path / name

    return save


def in_memory(folder):
    """In memory of its own: how products are rounded depends on where matrices begin, which is anywhere in a file."""
    model = load(folder)
    for each in model.parameters():
        each.data = each.data.clone()
    return model


def on_disk(folder):
    model = load(folder, device_map={"": "disk"}, offload_folder=str(folder / "offload"))
    assert all(each.is_meta for each in model.parameters())
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors"), (folder / "config.json").read_text()


def same(a, b):
    (weights, config), (others, other_config) = a, b
    assert config == other_config and weights.keys() == others.keys()
    assert all(torch.equal(each, others[name]) for name, each in weights.items())


CASES = [
    *((name, {"selection": {"type": "top_k", "k": 0.5, "allocation": "angular"}}) for name in HEADS),
    *(("llama", {"splitter": splitter}) for splitter in SPLITTERS),
    *(("t5", {"router": router}) for router in ("pre_gated", "similarity", "partial_input", "mlp")),
    ("bert", {"compensation": True, "shared_experts": 1}),
    ("bert", {"selection": {"type": "threshold", "k": 0.5, "allocation": "uniform"}}),
    ("llama", {"selection": {"type": "top_k", "k": 0.5, "allocation": "sensitivity"}}),
]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_conversion_is_that_in_memory(name, settings, dense, tmp_path):
    settings = {**SETTINGS, "k": 0.5, "allocation": "uniform", **settings}
    if "selection" in settings or "threshold" in settings:
        del settings["k"], settings["allocation"]
    config, found = MoEficationConfig(**settings), []
    for way in (in_memory, on_disk):
        model = way(dense(name))
        report = moefy_(model, config, batches(name), progress=False)
        found.append(saved(model, tmp_path / way.__name__))
        assert report.calibration_tokens
    same(*found)


def test_weights_stay_where_they_are(dense, tmp_path):
    """Nothing is read but what is used, and what was converted computes what it did."""
    folder = dense("llama")
    before = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    model = on_disk(folder)
    reference = model(**tiny_inputs("llama", HEADS["llama"])).logits
    moefy_(model, MoEficationConfig(**SETTINGS, k=1.0), batches("llama"), progress=False)
    assert all(each.is_meta for name, each in model.named_parameters() if ".router." not in name)
    torch.testing.assert_close(model(**tiny_inputs("llama", HEADS["llama"])).logits, reference)
    assert before == {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_some_layers_on_disk(dense, tmp_path):
    """As `device_map="auto"` places them where memory ends amid the layers; a sweep runs there, too."""
    folder = dense("llama")
    config = MoEficationConfig(**SETTINGS, k=0.5, allocation="sensitivity")
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "lm_head", "model.rotary_emb")
    places = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    found = []
    for way in (in_memory, lambda path: load(path, device_map=places, offload_folder=str(path / "offload"))):
        model = way(folder)
        moefy_(model, config, batches("llama"), progress=False)
        swept = evaluate(model, batches("llama", 3), [0.5], progress=False).rows
        found.append((saved(model, tmp_path / str(len(found))), swept))
    same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert model.model.layers[1].mlp.up_proj.weight.is_meta and not model.model.layers[0].mlp.up_proj.weight.is_meta


def test_a_full_disk_leaves_nothing_half_written(told, monkeypatch, capsys):
    """And what was found stays: a second try goes on."""
    arguments, folder = told

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--offload", "yes"])
    assert "No space left on device" in capsys.readouterr().err
    assert not (folder / "moe").exists() and not (folder / ".moe.unfinished").exists()
    assert (folder / ".moe.work" / "router_1.safetensors").exists()
    monkeypatch.undo()
    main([*arguments, "--offload", "yes"])
    assert (folder / "moe" / "config.json").exists()


@pytest.mark.parametrize("where", ["profile", "split", "routers"])
@pytest.mark.parametrize("way", [in_memory, on_disk])
def test_an_interrupted_conversion_goes_on(way, where, dense, tmp_path, monkeypatch):
    """At the batch, or the layer, where it was."""
    config = MoEficationConfig(**SETTINGS, k=0.5, allocation="uniform")
    moefy_(whole := way(dense("bert")), config, batches("bert"), progress=False)
    calls = {"split": 0, "routers": 0}

    def counted(step, function, fail):
        def call(*args, **kwargs):
            calls[step] += 1
            if fail and calls[step] == 2:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    def data(fail):
        for number, batch in enumerate(batches("bert")):
            if fail and number == 20:
                raise KeyboardInterrupt
            yield batch

    split, fit = pipeline.neuron_order, fit_routers._fit
    for again in (False, True):
        model = way(dense("bert"))
        monkeypatch.setattr(pipeline, "neuron_order", counted("split", split, where == "split" and not again))
        monkeypatch.setattr(fit_routers, "_fit", counted("routers", fit, where == "routers" and not again))
        given = data(where == "profile" and not again)
        if again:
            moefy_(model, config, given, work_dir=tmp_path / "work", progress=False)
        else:
            with pytest.raises(KeyboardInterrupt):
                moefy_(model, config, given, work_dir=tmp_path / "work", progress=False)
    assert calls == {"split": 3 if where == "split" else 2, "routers": 3 if where == "routers" else 2}
    same(saved(whole, tmp_path / "whole"), saved(model, tmp_path / "again"))


def test_a_profile_goes_on_behind_the_last_batch(tmp_path):
    model, kept = tiny_model("bert", HEADS["bert"]), tmp_path / "kept"
    whole = profile(model, batches("bert"), progress=False)

    def interrupted():
        yield from batches("bert", 20)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(model, interrupted(), folder=kept, progress=False)
    with (kept / "0.bin").open("ab") as file:  # a batch that was not run to its end
        file.write(bytes(99))
    ran = []
    handle = model.register_forward_pre_hook(lambda *_: ran.append(1))
    for runs in (10, 10):  # nothing is left to run for the second time
        again = profile(model, batches("bert"), folder=kept, progress=False)
        assert len(ran) == runs
        assert again.tokens == whole.tokens and len(again.batches) == len(whole.batches)
        for a, b in zip(again.sites, whole.sites, strict=True):
            assert torch.equal(a.inputs, b.inputs) and torch.equal(a.square, b.square)
        again.close()
    handle.remove()


def test_a_profile_of_something_else_is_not_taken_up(tmp_path):
    model, kept = tiny_model("bert", HEADS["bert"]), tmp_path / "kept"
    profile(model, batches("bert"), max_tokens=99, folder=kept, progress=False).close()
    for options in ({"max_tokens": 300}, {"max_tokens": 99, "layers": [0]}):
        with pytest.raises(CalibrationError, match="another model or number of tokens"):
            profile(model, batches("bert"), folder=kept, progress=False, **options)
    assert profile(model, batches("bert"), max_tokens=99, folder=kept, progress=False).tokens == 99


def test_a_profile_takes_up_data_that_have_grown(tmp_path):
    model, kept = tiny_model("bert", HEADS["bert"]), tmp_path / "kept"
    whole = profile(model, batches("bert"), progress=False)
    profile(model, batches("bert", 10), folder=kept, progress=False).close()
    again = profile(model, batches("bert"), folder=kept, progress=False)
    assert again.tokens == whole.tokens and torch.equal(again.sites[1].inputs, whole.sites[1].inputs)


def test_weights_that_are_shared_on_disk_are_refused(dense):
    """Each of the modules that share them would be read in an order of its own."""
    model = on_disk(dense("llama"))
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (1, 0)]
    model.all_tied_weights_keys = {**model.all_tied_weights_keys, names[0]: names[1]}
    with pytest.raises(MoefyError, match="shares up_proj.weight with another module"):
        moefy_(model, MoEficationConfig(**SETTINGS, k=0.5), batches("llama"), progress=False)


def test_another_conversion_is_not_taken_up(tmp_path):
    config, work = MoEficationConfig(**SETTINGS, k=0.5, allocation="uniform"), tmp_path / "work"
    moefy_(tiny_model("bert", HEADS["bert"]), config, batches("bert"), work_dir=work, progress=False)
    with pytest.raises(CalibrationError, match="other calibration data"):
        moefy_(tiny_model("bert", HEADS["bert"]), config, batches("bert")[::-1], work_dir=work, progress=False)
    other = MoEficationConfig(**SETTINGS, k=0.5, allocation="uniform", seed=1)
    with pytest.raises(MoefyError, match="other settings"):
        moefy_(tiny_model("bert", HEADS["bert"]), other, batches("bert"), work_dir=work, progress=False)
    with pytest.raises(MoefyError, match="other settings, or of another model"):
        moefy_(tiny_model("bert", HEADS["bert"], seed=5), config, batches("bert"), work_dir=work, progress=False)
    with pytest.raises(MoefyError, match="something else"):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "letter.txt").write_text("mine")
        moefy_(tiny_model("bert", HEADS["bert"]), config, batches("bert"), work_dir=tmp_path / "full", progress=False)


@pytest.mark.parametrize("to", ["granitemoe", "mixtral", "dense", "gguf"])
def test_exports_are_those_in_memory(to, dense, tmp_path):
    name = "llama-without-biases"
    moefy_(model := tiny_model(name, HEADS["llama"]), MoEficationConfig(**SETTINGS, k=0.5), batches("llama"))
    model.set_selection(k=0.5, allocation="uniform")
    model.save_pretrained(tmp_path / "moe", max_shard_size="20KB")
    options = {}
    if to == "gguf":
        options["dense"] = tmp_path / "dense.gguf"
        write_dense(tiny_model(name, HEADS["llama"]), options["dense"])
    for way in (in_memory, on_disk):
        export(way(tmp_path / "moe"), tmp_path / f"{way.__name__}.{to}", to, **options)
    a, b = (tmp_path / f"{way.__name__}.{to}" for way in (in_memory, on_disk))
    if to == "gguf":
        assert a.read_bytes() == b.read_bytes()
        return
    same(*((load_file(each / "model.safetensors"), (each / "config.json").read_text()) for each in (a, b)))


def test_a_graph_wants_the_weights_in_memory(dense, tmp_path):
    moefy_(model := on_disk(dense("llama")), MoEficationConfig(**SETTINGS, k=0.5), batches("llama"))
    with pytest.raises(MoefyError, match="in memory"):
        export(model, tmp_path / "onnx", "onnx")
    assert not (tmp_path / "onnx").exists()


@pytest.fixture
def told(dense):
    """What the command is given: a model with a tokenizer, and texts."""
    folder = dense("llama")
    number_tokenizer().save_pretrained(folder)
    ids = torch.randint(3, VOCAB, (60, 12), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "texts.txt").write_text("\n".join(" ".join(map(str, row)) for row in ids))
    settings = ["--expert_size", "8", "--k", "2", "--allocation", "uniform", "--calibration_tokens", "400"]
    return ["convert", str(folder), str(folder / "moe"), "--data", str(folder / "texts.txt"), *settings], folder


def test_the_command_leaves_weights_on_disk_where_they_do_not_fit(told, monkeypatch, capsys):
    arguments, folder = told
    monkeypatch.setattr(offloading, "FITS", 0.0)
    main(arguments)
    assert "quality is not predicted" in capsys.readouterr().out
    streamed = folder / "moe"
    shutil.move(streamed, folder / "streamed")
    main([*arguments, "--offload", "no", "--force"])
    a, b = (load_file(folder / name / "model.safetensors") for name in ("streamed", "moe"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert not list(folder.glob(".*"))


def test_the_command_goes_on(told, monkeypatch):
    arguments, folder = told

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "start_routers_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, "--offload", "yes"])
    assert (folder / ".moe.work" / "order_1.safetensors").exists() and not (folder / "moe").exists()
    monkeypatch.undo()
    monkeypatch.setattr(pipeline, "neuron_order", interrupted)  # it has all orders
    main([*arguments, "--offload", "yes"])
    assert (folder / "moe" / "config.json").exists() and not (folder / ".moe.work").exists()


def test_a_plan_and_weights_on_disk_do_not_go_together(told, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*told[0][:5], "--quality", "0.9", "--offload", "yes"])
    assert "--offload yes" in capsys.readouterr().err


def test_weights_that_deepspeed_has_shared_out_have_their_shape():
    """As ZeRO-3 leaves them in a process: empty."""
    site = find_sites(tiny_model("bert", HEADS["bert"]))[0]
    for linear in (site.up, site.down):
        linear.weight.ds_shape, linear.weight.data = linear.weight.shape, torch.empty(0)
    weights = site.weights()
    assert weights.up.shape == (48, 16) and weights.down.shape == (16, 48) and weights.up.is_meta
