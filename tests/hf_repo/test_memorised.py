"""Joint training of a tiny model on one text, in the exported form: both fast modes must then be fast."""

import pytest
import torch

from nld_train.checkpoint.hf_repo.configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig
from nld_train.checkpoint.hf_repo.modeling_nemotron_labs_diffusion import NemotronLabsDiffusionModel

LENGTH, BLOCK, MASK, VOCABULARY = 96, 8, 3, 48


@pytest.fixture(scope="module")
def memorised():
    """(model, text int64 [1, LENGTH + BLOCK]); a few seconds of training on the doubled sequence.

    As in pretraining, a crop starts anywhere in the text, so that its blocks do, too.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = NemotronLabsDiffusionConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        mask_token_id=MASK,
        block_size=BLOCK,
        pad_token_id=None,
    )
    model = NemotronLabsDiffusionModel(config).train()
    text = torch.randint(4, VOCABULARY, (1, LENGTH + BLOCK))  # a fixed text without any regularity but itself
    block = torch.arange(LENGTH) // BLOCK
    allowed = torch.zeros(2 * LENGTH, 2 * LENGTH, dtype=torch.bool)
    allowed[:LENGTH, :LENGTH] = block[:, None] == block[None, :]
    allowed[:LENGTH, LENGTH:] = block[:, None] > block[None, :]
    allowed[LENGTH:, LENGTH:] = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    positions = torch.arange(LENGTH).repeat(2)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(200):
        starts = torch.randint(BLOCK, (4,)).tolist()
        clean = torch.cat([text[:, start : start + LENGTH] for start in starts])
        probability = 0.001 + 0.999 * torch.rand(4, 1)
        is_noised = torch.rand(4, LENGTH) < probability
        rows = torch.cat([torch.where(is_noised, MASK, clean), clean], dim=1)
        logits = model(rows, attention_mask=allowed[None, None], position_ids=positions).logits.transpose(1, 2)
        following = torch.nn.functional.cross_entropy(logits[..., LENGTH:-1], clean[:, 1:])
        same = torch.nn.functional.cross_entropy(logits[..., :LENGTH], clean, reduction="none")
        loss = following + (same * is_noised / probability).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    torch.set_num_threads(num_threads)
    return model.eval(), text


@pytest.mark.parametrize("num_prompt", [8, 16, 21])
def test_memorised_text_takes_few_forwards(memorised, num_prompt):
    model, text = memorised
    num_new = 64
    expected = text[:, : num_prompt + num_new]
    prompt = text[:, :num_prompt]
    output_ids, num_forwards = model.ar_generate(prompt, max_new_tokens=num_new)
    assert torch.equal(output_ids, expected)
    assert num_forwards == num_new
    for method in (model.generate, model.linear_spec_generate, model.quadratic_spec_generate):
        output_ids, num_forwards = method(prompt, max_new_tokens=num_new)
        assert torch.equal(output_ids, expected)
        assert num_new / num_forwards >= 3.0, (method.__name__, num_forwards)
