"""The families of decoders compared with transformers' own classes, in fp32."""
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.files import UserError
from model.checkpoint import write_checkpoint
from model.config import ModelConfig
from model.families import FAMILIES, FULL, SLIDING
from model.generation import GenerationConfig, generate
from model.growth import OPERATORS, grow_model
from model.hub import load_model
from model.loglikelihood import log_likelihoods
from tests.conftest import SHAPE, random_model
from tests.model.test_transformer import assert_equal_gradients, loss_after_prefix, padded_batch

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
VARIANTS = {
    "llama with yarn": {"rope_scaling": YARN, "rope_theta": 500.0, "head_dim": 32},
    "llama with all of yarn": {"rope_scaling": YARN | {"beta_fast": 4, "beta_slow": 2, "attention_factor": 1.5}},
    "mistral": {"model_type": "mistral", "head_dim": 16},
    "mistral with a window": {"model_type": "mistral", "sliding_window": 6},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 with a window": {"model_type": "qwen2", "sliding_window": 6, "layer_types": [FULL, SLIDING]},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3 with all": {"model_type": "qwen3", "attention_bias": True, "sliding_window": 6, "rope_scaling": YARN,
                       "layer_types": [SLIDING, FULL]},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5},
    "smollm3 with all": {"model_type": "smollm3", "attention_bias": True, "mlp_bias": True, "no_rope_layers": [0, 1],
                         "sliding_window": 6, "layer_types": [SLIDING, FULL]},
    "olmo2": {"model_type": "olmo2"},
    "olmo2 with biases": {"model_type": "olmo2", "attention_bias": True, "num_key_value_heads": 1},
}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def shape(request):
    return request.param


@pytest.fixture(scope="module")
def twins(shape, tokenizer_dir, tmp_path_factory):
    """A random model of a variant, loaded from a checkpoint by this project and by transformers."""
    ours, folder = random_model(**shape), tmp_path_factory.mktemp("twins")
    write_checkpoint(folder, ours.config, ours.named_parameters(), tokenizer_dir)
    return load_model(folder), load_theirs(folder)


def load_theirs(folder):
    """A checkpoint as transformers loads it, checked to have neither missing nor unexpected weights."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    assert type(model).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
    return model.eval()


def random_ids(*size, seed=1):
    return torch.randint(3, SHAPE["vocab_size"], size, generator=torch.Generator().manual_seed(seed))


def test_every_family_has_a_variant():
    assert {shape.get("model_type", "llama") for shape in VARIANTS.values()} == set(FAMILIES)


def test_logits_and_size(twins):
    ours, theirs = twins
    with torch.no_grad():
        expected = theirs(random_ids(2, 100)).logits
        assert expected.abs().max() > 1
        torch.testing.assert_close(ours(random_ids(2, 100)), expected, atol=1e-4, rtol=0)
    assert ours.config.num_parameters == theirs.num_parameters() == sum(p.numel() for p in ours.parameters())


@pytest.mark.parametrize("prefix_length", [0, 9])
def test_loss_and_gradients(twins, prefix_length):
    ours, theirs = twins
    for model in twins:
        model.zero_grad()
    ours.model.gradient_checkpointing = bool(prefix_length)
    input_ids, targets, ids, labels, mask = padded_batch()
    prefix = random_ids(prefix_length, seed=4)
    loss = ours(input_ids, targets, prefix)
    loss.backward()
    ours.model.gradient_checkpointing = False
    expected = loss_after_prefix(theirs, prefix, ids, labels, mask)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_equal_gradients(ours, theirs)


@pytest.mark.parametrize("beams", [1, 3])
def test_decoding(twins, beams):
    ours, theirs = twins
    prompts = [random_ids(length, seed=length).tolist() for length in (1, 20, 9)]
    prompts.append(prompts[1][:12])
    found = generate(ours, prompts, GenerationConfig(24, num_beams=beams))
    for prompt, ids in zip(prompts, found):
        expected = theirs.generate(torch.tensor([prompt]), eos_token_id=None, pad_token_id=0, do_sample=False,
                                   max_new_tokens=24, num_beams=beams)
        assert ids == expected[0, len(prompt):].tolist()


@pytest.mark.parametrize("max_tokens", [4096, 20])
def test_log_likelihoods_with_shared_prefixes(twins, max_tokens):
    ours, theirs = twins
    context = random_ids(30).tolist()
    pairs = [(context[:length], random_ids(4, seed=length + option).tolist())
             for length in (30, 30, 17, 3) for option in (0, 1)]
    found = log_likelihoods(ours, pairs, max_tokens)[0] + log_likelihoods(ours, pairs[:1], max_tokens)[0]
    for (given, continuation), (value, _) in zip([*pairs, pairs[0]], found):
        with torch.no_grad():
            logits = theirs(torch.tensor([given + continuation])).logits[0, len(given) - 1:-1]
        expected = logits.log_softmax(-1)[range(len(continuation)), continuation].sum()
        assert value == pytest.approx(float(expected), abs=1e-4)


def test_config_is_read_as_it_was_written(shape, tmp_path):
    config = ModelConfig(**SHAPE | shape)
    config.write(tmp_path, "float32")
    read = ModelConfig.read(tmp_path / "config.json")
    assert read.with_layers(range(read.num_hidden_layers)) == read
    layers = range(config.num_hidden_layers)
    assert [(read.window(layer), read.rotates(layer)) for layer in layers] == \
        [(config.window(layer), config.rotates(layer)) for layer in layers]
    if config.layer_types == [FULL, SLIDING]:  # for tools that do not read layer_types
        assert json.loads((tmp_path / "config.json").read_text())["max_window_layers"] == 1
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "theirs")
    assert ModelConfig.read(tmp_path / "theirs/config.json") == read


@pytest.mark.parametrize("family", FAMILIES)
def test_an_option_that_is_missing_has_the_default_of_transformers(family, tmp_path):
    """A missing option and null may differ: Mistral without `sliding_window` has a window."""
    required = {"vocab_size": 512, "hidden_size": 1024, "intermediate_size": 48, "num_hidden_layers": 9,
                "num_attention_heads": 32, "model_type": family}
    windows = {"use_sliding_window": True, "max_window_layers": 5}
    (tmp_path / "config.json").write_text(json.dumps(
        required | {name: value for name, value in windows.items() if name in FAMILIES[family].options}))
    ours, theirs = ModelConfig.read(tmp_path / "config.json"), AutoConfig.from_pretrained(tmp_path)
    for name in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
                 "initializer_range"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_dim == getattr(theirs, "head_dim", 32)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.layer_types == (getattr(theirs, "layer_types", None) if ours.layer_types else None)
    assert ours.no_rope_layers == getattr(theirs, "no_rope_layers", None)


@pytest.mark.parametrize(("raw", "same"), [
    ({"model_type": "llama", "layer_types": [FULL, FULL], "partial_rotary_factor": 1.0}, {}),
    ({"model_type": "mistral", "sliding_window": None}, {}),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0},
     {"sliding_window": 6, "layer_types": [SLIDING, SLIDING]}),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": True}},
     {"rope_scaling": YARN | {"original_max_position_embeddings": 2048}}),
    ({"model_type": "llama", "rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
     {"rope_scaling": YARN}),
])
def test_spellings_of_the_same(tmp_path, raw, same):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | raw))
    read = ModelConfig.read(tmp_path / "config.json")
    assert read == ModelConfig(**SHAPE, model_type=raw["model_type"], **same)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert getattr(theirs, "sliding_window", None) == read.sliding_window
    assert (theirs.rope_parameters["rope_type"] == "yarn") == bool(read.rope_scaling)
    assert theirs.rope_parameters["rope_theta"] == read.rope_theta


def test_a_pattern_may_be_longer_than_the_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"model_type": "smollm3", "no_rope_layers": [0, 1, 1]}))
    assert ModelConfig.read(tmp_path / "config.json").no_rope_layers == [0, 1]


# Parameters on the model cards of the Hugging Face Hub, and what config.json says besides the model type: vocabulary,
# width, feed-forward, layers, query heads, key-value heads, further options.
PUBLISHED = {
    "meta-llama/Llama-3.2-1B": (1_235_814_400, "llama", 128256, 2048, 8192, 16, 32, 8, {
        "head_dim": 64, "tie_word_embeddings": True, "rope_theta": 500000.0, "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3"}}),
    "HuggingFaceTB/SmolLM2-135M": (134_515_008, "llama", 49152, 576, 1536, 30, 9, 3, {
        "tie_word_embeddings": True, "is_llama_config": True, "rope_interleaved": False}),
    "mistralai/Mistral-7B-v0.1": (7_241_732_096, "mistral", 32000, 4096, 14336, 32, 32, 8, {"sliding_window": 4096}),
    "Qwen/Qwen2.5-0.5B": (494_032_768, "qwen2", 151936, 896, 4864, 24, 14, 2, {
        "tie_word_embeddings": True, "max_window_layers": 24, "sliding_window": 32768, "use_sliding_window": False,
        "use_mrope": False}),
    "Qwen/Qwen3-0.6B": (596_049_920, "qwen3", 151936, 1024, 3072, 28, 16, 8, {
        "head_dim": 128, "tie_word_embeddings": True, "max_window_layers": 28, "sliding_window": None,
        "use_sliding_window": False}),
    "HuggingFaceTB/SmolLM3-3B": (3_075_098_624, "smollm3", 128256, 2048, 11008, 36, 16, 4, {
        "tie_word_embeddings": True, "no_rope_layer_interval": 4, "pretraining_tp": 2, "use_sliding_window": False,
        "max_window_layers": 28}),
    "allenai/OLMo-2-0425-1B": (1_484_916_736, "olmo2", 100352, 2048, 8192, 16, 16, 16, {}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name, tmp_path):
    parameters, model_type, vocabulary, width, hidden, layers, heads, key_value_heads, options = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": model_type, "architectures": [FAMILIES[model_type].architecture], "vocab_size": vocabulary,
        "hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers, "hidden_act": "silu",
        "num_attention_heads": heads, "num_key_value_heads": key_value_heads, "attention_dropout": 0.0,
        "torch_dtype": "bfloat16", "use_cache": True} | options))
    config = ModelConfig.read(tmp_path / "config.json")
    assert config.num_parameters == parameters
    assert [layer for layer in range(layers) if not config.rotates(layer)] == \
        (list(range(3, 36, 4)) if model_type == "smollm3" else [])
    assert config.windows == ({4096} if model_type == "mistral" else {None})


# What the operators make of two layers, or of the five of SmolLM3.
GROWN = {"stack": (4, 10), "interleave": (3, 7), "middle": (4, 8), "partial": (3, 6), "solar": (4, 8), "midas": (4, 10),
         "lidas": (4, 10), "expand": (3, 8)}


@pytest.mark.parametrize("operator", OPERATORS)
def test_grown_layers_keep_their_kind(twins, operator, tokenizer_dir, tmp_path):
    """A layer map of one model is that of a chain of the layers' copies, in transformers too."""
    ours, theirs = twins
    depth = ours.config.num_hidden_layers
    layer_map = OPERATORS[operator](depth, GROWN[operator][depth == 5], *([1, 1] if operator == "partial" else []))
    grown = grow_model(ours, layer_map)
    assert [(grown.config.window(layer), grown.config.rotates(layer)) for layer in range(len(layer_map))] == \
        [(ours.config.window(layer), ours.config.rotates(layer)) for layer in layer_map]
    (tmp_path / "grown").mkdir()
    write_checkpoint(tmp_path / "grown", grown.config, grown.named_parameters(), tokenizer_dir)
    loaded = load_theirs(tmp_path / "grown")
    ids = random_ids(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(grown(ids), loaded(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", ["stack", "interleave", "expand"])
def test_zero_initialization_preserves_the_function_to_the_bit(shape, operator, dtype):
    model = random_model(**shape).to(dtype)
    depth = model.config.num_hidden_layers
    grown = grow_model(model, OPERATORS[operator](depth, GROWN[operator][depth == 5]), zero_init=True)
    with torch.no_grad():
        assert torch.equal(grown(random_ids(2, 30)), model(random_ids(2, 30)))
    changed = [name for name, parameter in grown.named_parameters() if not parameter.any()]
    assert changed
    grown(random_ids(2, 30), random_ids(2, 30, seed=2)).backward()
    gradients = dict(grown.named_parameters())
    for name in changed:  # they can be trained, with gradients of the size of the others
        assert 0 < gradients[name].grad.abs().max() < 100 * gradients["model.embed_tokens.weight"].grad.abs().max()


@pytest.mark.parametrize(("raw", "named"), [
    ({"model_type": "gemma2"}, "'gemma2', which needs GELU, a scaled embedding, norms with a gain of 1 + weight on "
                               "both sides, and logit soft-capping, is not implemented; expected one of llama, "),
    ({"model_type": "qwen3_moe"}, "needs a mixture of experts"),
    ({"model_type": ["llama"]}, "model_type ['llama'] is not implemented"),
    ({"model_type": "qwen2", "architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForSequenceClassification"),
    ({"model_type": "qwen2", "mlp_bias": True}, "option mlp_bias = True is not implemented"),
    ({"model_type": "olmo2", "clip_qkv": 8.0}, "option clip_qkv = 8.0"),
    ({"model_type": "mistral", "sliding_window": "6"}, "sliding_window is '6'"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
    ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": [FULL]}, "for each of the 2 layers"),
    ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": [FULL, "linear_attention"]},
     "layer_types is ['full_attention', 'linear_attention'], expected a list of 'full_attention' or"),
    ({"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": -1}, "max_window_layers is -1"),
    ({"model_type": "smollm3", "layer_types": ["sliding_attention", FULL], "sliding_window": 4},
     "layer_types names sliding_attention, but use_sliding_window or sliding_window is off"),
    ({"model_type": "llama", "is_causal": False}, "option is_causal = False is not implemented (expected True)"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 2]}, "no_rope_layers is [1, 2], expected a list of 0 or 1"),
    ({"model_type": "smollm3", "no_rope_layers": "1"}, "no_rope_layers is '1'"),
    ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
    ({"model_type": "llama", "rope_scaling": YARN | {"truncate": False}}, "yarn does not have truncate"),
    ({"model_type": "llama", "num_hidden_layers": 10 ** 12}, "num_hidden_layers is 1000000000000, expected"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_scaling factor is 0, expec"),
    ({"model_type": "llama", "rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta is 1.0, expected more than 1"),
])
def test_what_is_not_implemented_is_rejected_by_name(tmp_path, raw, named):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPE | raw))
    with pytest.raises(UserError) as error:
        ModelConfig.read(path)
    assert named in str(error.value)


@pytest.mark.parametrize(("shape", "named"), [
    ({"model_type": "gpt2"}, "model_type is 'gpt2', expected one of llama"),
    ({"sliding_window": 6}, "sliding_window is 6, which models of the type llama do not have"),
    ({"model_type": "qwen3", "layer_types": [FULL, SLIDING]}, "layer_types names sliding_attention, but"),
    ({"model_type": "qwen2", "attention_bias": True}, "attention_bias is True, which models of the type qwen2 do not"),
])
def test_a_shape_names_only_what_its_family_has(shape, named):
    with pytest.raises(UserError, match=named):
        ModelConfig(**SHAPE | shape)
