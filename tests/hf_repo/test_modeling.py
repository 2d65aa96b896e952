"""The exported folder as transformers sees it: names, fields, masks, dtypes."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    Ministral3ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging as transformers_logging

from nld_train.checkpoint.hf_repo.configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig
from nld_train.evaluation.reader import CleanPrefix

CACHE_NAMES = {"cache", "past_key_values"}  # transformers' own is the first from 5.24 on


def reference_of(model):
    """transformers' own causal model with the same weights."""
    fields = {key: value for key, value in model.config.to_dict().items() if key != "model_type"}
    reference = Ministral3ForCausalLM(Ministral3ForCausalLM.config_class(**fields)).eval()
    reference.model.load_state_dict(model.encoder.state_dict())
    reference.lm_head.load_state_dict(model.diffusion_head.state_dict())
    return reference


def test_tensor_names(make_model):
    layer = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    layer += ["input_layernorm", "post_attention_layernorm"]
    expected = {"encoder.embed_tokens.weight", "encoder.norm.weight", "diffusion_head.weight"}
    expected |= {f"encoder.layers.{number}.{name}.weight" for number in range(2) for name in layer}
    assert set(make_model().state_dict()) == expected


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_classes_load_the_stored_numbers(make_model, write_export, tmp_path, auto_class, dtype):
    model = make_model()
    folder = write_export(model, tmp_path / "export")
    loaded, report = auto_class.from_pretrained(
        folder, trust_remote_code=True, dtype=dtype, output_loading_info=True, local_files_only=True
    )
    assert type(loaded).__name__ == "NemotronLabsDiffusionModel"
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not loaded.training
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, model.state_dict()[name].to(dtype)), name
    tokens = torch.randint(6, 64, (1, 9))
    if dtype == torch.float32:
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    for method in ("ar_generate", "generate", "linear_spec_generate"):
        output_ids, num_forwards = getattr(loaded, method)(tokens, max_new_tokens=6)
        assert output_ids.shape == (1, 15)
        assert 0 < num_forwards <= 12


def test_config_round_trip(make_model, write_export, tmp_path):
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }
    folder = write_export(make_model(rope_parameters=dict(rope), max_position_embeddings=262144), tmp_path / "export")
    stored = json.loads((folder / "config.json").read_text())
    assert stored["architectures"] == ["NemotronLabsDiffusionModel"]
    assert stored["model_type"] == "nemotron_labs_diffusion"
    assert stored["tie_word_embeddings"] is False
    assert stored["rope_parameters"] == rope
    loaded = AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    assert loaded.rope_parameters == rope
    assert (loaded.mask_token_id, loaded.block_size, loaded.dlm_paradigm) == (5, 4, "bidirectional")
    assert (loaded.dlm_loss_weight, loaded.ar_loss_weight, loaded.dp_varying_mask_ratio) == (0.3, 1.0, True)
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {key: again[key] for key in stored if key not in ("auto_map", "dtype")} == {
        key: stored[key] for key in stored if key not in ("auto_map", "dtype")
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"sliding_window": 128}, "sliding_window: 128"),
        ({"block_size": 0}, "block_size: 0"),
        ({"mask_token_id": 131072}, "mask_token_id: 131072"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        NemotronLabsDiffusionConfig(**fields)


def test_causal_logits_and_loss_equal_transformers(make_model):
    model = make_model()
    reference = reference_of(model)
    tokens = torch.randint(6, 64, (2, 40))  # query scaling steps at 16 and 32
    expected = reference(tokens, labels=tokens)
    actual = model(tokens, labels=tokens)
    assert torch.equal(actual.logits, expected.logits)
    torch.testing.assert_close(actual.loss, expected.loss)
    assert torch.equal(model(tokens, logits_to_keep=3).logits, expected.logits[:, -3:])
    with pytest.raises(ValueError, match="logits_to_keep: 3"):
        model(tokens, labels=tokens, logits_to_keep=3)


@pytest.fixture
def silent_library(caplog):
    """Fails the test for whatever transformers warns of in its log."""
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    transformers_logging.warning_once.cache_clear()  # what was said in an earlier test is said again
    yield
    library.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.get_records("call")] == []


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("silent_library")
@pytest.mark.parametrize("name", sorted(CACHE_NAMES))
def test_the_cache_is_taken_under_either_name_and_returned_under_the_librarys(make_model, name):
    model = make_model()
    (own_name,) = CACHE_NAMES & {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
    tokens = torch.randint(6, 64, (2, 12))
    cache = DynamicCache(config=model.config)
    model(tokens[:, :7], **{name: cache})
    outputs = model(tokens[:, 7:], **{name: cache})
    assert cache.get_seq_length() == 12
    torch.testing.assert_close(outputs.logits, model(tokens).logits[:, 7:])
    assert set(outputs) == {"logits", own_name}
    assert outputs[own_name] is cache
    assert set(model(tokens, use_cache=False)) == {"logits"}
    with pytest.raises(ValueError, match="cache, past_key_values"):
        model(tokens, cache=cache, past_key_values=cache)


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("silent_library")
def test_neither_decoding_nor_reading_uses_a_deprecated_name(make_model):
    model = make_model()
    tokens = torch.randint(6, 64, (1, 9))
    for method in ("ar_generate", "generate", "linear_spec_generate", "quadratic_spec_generate"):
        getattr(model, method)(tokens, max_new_tokens=6)
    prefix = CleanPrefix(model)
    prefix.read(tokens[0])
    masks, places = torch.full((2,), 5), torch.tensor([9, 10])
    prefix.denoise(masks, places, torch.zeros_like(masks), torch.full((2,), 9))


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("silent_library")
def test_transformers_own_generate_works_with_the_cache(make_model):
    model = make_model(eos_token_id=None)
    arguments = {
        "input_ids": torch.randint(6, 64, (1, 9)),
        "attention_mask": torch.ones(1, 9, dtype=torch.int64),
        "max_new_tokens": 8,
        "do_sample": False,
    }
    read = []
    model.encoder.embed_tokens.register_forward_pre_hook(lambda module, rows: read.append(rows[0].shape[1]))
    output_ids = GenerationMixin.generate(model, **arguments)
    assert read == [9] + [1] * 7
    assert torch.equal(output_ids, reference_of(model).generate(**arguments))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bool_mask_is_obeyed_exactly(make_model, implementation):
    """The doubled sequence: clean rows are an ordinary causal run, noisy rows see what the table says."""
    model = make_model()
    model.set_attn_implementation(implementation)
    length, block = 12, 4
    clean = torch.randint(6, 64, (1, length))
    noisy = torch.where(torch.rand(1, length) < 0.5, 5, clean)
    allowed = doubled_mask(length, block)
    positions = torch.arange(length).repeat(2)[None]

    def logits(noisy_tokens, clean_tokens):
        rows = torch.cat([noisy_tokens, clean_tokens], dim=1)
        return model(rows, attention_mask=allowed, position_ids=positions).logits[0]

    base = logits(noisy, clean)
    torch.testing.assert_close(base[length:], model(clean).logits[0], rtol=1e-5, atol=1e-5)
    changed_clean, changed_noisy = clean.clone(), noisy.clone()
    changed_clean[0, 5] = 63 - changed_clean[0, 5] + 6
    changed_noisy[0, 5] = 6 if noisy[0, 5] != 6 else 7
    moved = (logits(noisy, changed_clean) != base).any(dim=1)
    assert moved[:length].tolist() == [False] * 8 + [True] * 4
    assert moved[length:].tolist() == [False] * 5 + [True] * 7
    moved = (logits(changed_noisy, clean) != base).any(dim=1)
    assert moved.tolist() == [False] * 4 + [True] * 4 + [False] * 16


def doubled_mask(length, block):
    """[noisy | clean] written out entry by entry, bool [1, 1, 2 length, 2 length]."""
    allowed = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for query in range(length):
        for key in range(length):
            allowed[query, key] = query // block == key // block
            allowed[query, length + key] = key // block < query // block
            allowed[length + query, length + key] = key <= query
    return allowed[None, None]


def test_casting_the_model_keeps_rotary_frequencies(make_model):
    model = make_model()
    exact = model.encoder.rotary_emb.inv_freq.clone()
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
        assert model.diffusion_head.weight.dtype == dtype
        assert model.encoder.rotary_emb.inv_freq.dtype == torch.float32
        assert torch.equal(model.encoder.rotary_emb.inv_freq, exact)
        assert torch.equal(model.encoder.rotary_emb.original_inv_freq, exact)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_kernels_without_a_dense_mask_are_refused(make_model, write_export, tmp_path, implementation):
    folder = write_export(make_model(), tmp_path / "export")
    with pytest.raises((ValueError, ImportError)):
        AutoModel.from_pretrained(
            folder, trust_remote_code=True, attn_implementation=implementation, local_files_only=True
        )


def test_the_code_needs_torch_and_transformers_only():
    from transformers.dynamic_module_utils import get_imports

    from nld_train.checkpoint import hf_repo

    allowed = {"collections", "sys", "types", "typing", "torch", "transformers"}
    for code_file in Path(next(iter(hf_repo.__path__))).glob("*.py"):
        assert set(get_imports(code_file)) <= allowed, code_file
