"""Small models of the exported form, in memory and as folders: pytest fixtures, for the conftest.py that wants them."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: nothing here may ask the network

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from nld_train.checkpoint import hf_repo
from nld_train.checkpoint.hf_repo.configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig
from nld_train.checkpoint.hf_repo.modeling_nemotron_labs_diffusion import NemotronLabsDiffusionModel

CODE_FOLDER = Path(next(iter(hf_repo.__path__)))
AUTO_MAP = {
    "AutoConfig": "configuration_nemotron_labs_diffusion.NemotronLabsDiffusionConfig",
    "AutoModel": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel",
    "AutoModelForCausalLM": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel",
}

MakeModel = Callable[..., NemotronLabsDiffusionModel]
WriteExport = Callable[[NemotronLabsDiffusionModel, Path], Path]


@pytest.fixture
def make_model() -> MakeModel:
    """Builds a random model; weights are large enough for sharp, varied predictions."""

    def build(seed: int = 0, std: float = 0.3, **fields: object) -> NemotronLabsDiffusionModel:
        config: dict[str, Any] = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,  # not hidden / heads
            "mask_token_id": 5,
            "block_size": 4,
            "pad_token_id": None,
            # The query scaling steps inside a test's sequence.
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
            "max_position_embeddings": 256,
        }
        torch.manual_seed(seed)
        model = NemotronLabsDiffusionModel(NemotronLabsDiffusionConfig(**{**config, **fields}))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=std)
        return model.eval()

    return build


@pytest.fixture
def write_export() -> WriteExport:
    """Writes config, weights and the two code files of a model into a folder."""

    def write(model: NemotronLabsDiffusionModel, folder: Path) -> Path:
        model.save_pretrained(folder)
        fields = json.loads((folder / "config.json").read_text())
        fields["auto_map"] = AUTO_MAP
        (folder / "config.json").write_text(json.dumps(fields))
        for code_file in CODE_FOLDER.glob("*.py"):
            shutil.copy(code_file, folder)
        return folder

    return write


def write_tokenizer(folder: Path, **fields: object) -> None:
    """Bytes as tokens: ids 8.., after some special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<unk>", "<s>", "</s>", "<3>", "<4>", "<mask>", "<6>", "<7>"]
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **fields).save_pretrained(folder)


@pytest.fixture(autouse=True)
def quiet_and_single_threaded() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    yield
    torch.set_num_threads(num_threads)
