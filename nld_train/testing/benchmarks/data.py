"""The loader, and preparing text."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nld_train.config.schema import (
    Sampler,
    Stratify,
)
from nld_train.data.corpora import CORPORA
from nld_train.data.encoding import TextEncoder
from nld_train.data.loader import LoaderBatch
from nld_train.data.tokenizer import convert_tekken, load_tokenizer
from nld_train.testing.benchmarks.comparison import Comparison, Work, seconds
from nld_train.training.step import lay_out, noise_spec

LOADER_LENGTH, LOADER_BATCHES = 4096, 48
TOKENS_PER_SECOND = 2e6  # that one loader worker has to reach


def data_suite(_device: torch.device) -> Iterator[Comparison]:
    """What one loader worker needs for a token, in this process, against the 500 ns that it may take (2M tokens a
    second): samples of the default corpora read, noised and packed for the pipe; *laid out* adds the doubled sequence,
    which is the trainer's work."""
    from nld_train.config.compose import compose
    from nld_train.data.loader import _MicroBatches, _Packed, _unpack
    from nld_train.training.data import prepare_blends, training_samples

    works: dict[str, Work] = {"2M tokens/s": partial(list[Tensor])}
    for has_documents in (False, True):
        mask = "boundary" if has_documents else "none"
        config = compose([f"data.sequence_length={LOADER_LENGTH}", f"data.document_mask={mask}"], world_size=1)
        stream = training_samples(config, prepare_blends(config, is_main=False).of_run)
        stream.build_index(0, LOADER_BATCHES)
        for name, objective in (
            ("reading alone", None),
            ("default", config.objective),
            (
                "recipe",
                replace(config.objective, sampler=Sampler.bernoulli, stratify=Stratify.none, noisy_fraction=1.0),
            ),
        ):
            noise = None if objective is None else noise_spec(objective, seed=0, global_batch_size=512)
            packed = _Packed(_MicroBatches(stream, 1, 0, 1, noise))

            block_size = config.objective.block_size

            def work(
                packed: _Packed = packed, block_size: int = block_size, *, is_laid_out: bool = False
            ) -> Sequence[Tensor]:
                for number in range(LOADER_BATCHES):
                    arrays = packed[0, number]
                    if is_laid_out:
                        sample = _unpack(arrays)
                        assert isinstance(sample, LoaderBatch)
                        lay_out(sample, block_size)
                return []

            name += ", documents" if has_documents else ""
            works[name] = work
            if objective is not None:
                works[f"{name}, laid out"] = partial(work, is_laid_out=True)
    limit = works["2M tokens/s"]

    def measured(work: Work) -> float:
        return 1 / TOKENS_PER_SECOND if work is limit else seconds(work) / (LOADER_BATCHES * LOADER_LENGTH)

    yield Comparison(
        title=f"a worker's time for a token, L {LOADER_LENGTH}; the ratio is to the requirement",
        variants=works,
        tolerance=0.0,
        required={name: 1.0 for name in works if name != "2M tokens/s"},
        measure=measured,
        unit="ns",
        unit_scale=1e9,
    )


def prepare_suite(device: torch.device, *, megabytes: int = 100) -> Iterator[Comparison]:
    """Text in JSONL to a prepared corpus, with the Tekken tokenizer that mistral-common ships, against the plain call
    of the Hugging Face tokenizer on texts in memory. Both use all cores; ours starts, reads, hashes and writes files.
    The results that are compared are the counts of every token."""
    tekken = Path(str(resources.files("mistral_common"))) / "data" / "tekken_240911.json"
    modules = [document.text for document in CORPORA["stdlib"]().read().documents]
    rng = random.Random(0)
    texts: list[str] = []
    size = 0
    while size < megabytes * 10**6:
        module = rng.choice(modules)
        start = rng.randrange(len(module))
        texts.append(module[start : start + rng.randrange(500, 8000)])
        size += len(texts[-1].encode("utf-8"))
    workers = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="benchmark_prepare_") as name:
        folder = Path(name)
        convert_tekken(tekken, folder / "tokenizer")
        # The plain call makes special ids of texts that spell special tokens: there the two are not to agree.
        special = re.compile("|".join(map(re.escape, TextEncoder.from_folder(folder / "tokenizer").special_ids)))
        texts = [text for text in texts if not special.search(text)]
        with (folder / "texts.jsonl").open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        tokenizer = load_tokenizer(folder / "tokenizer")
        eos = tokenizer.eos_token_id

        def call() -> Sequence[Tensor]:
            counts = np.zeros(len(tokenizer), dtype=np.int64)
            for start in range(0, len(texts), 1000):
                ids = tokenizer(texts[start : start + 1000])["input_ids"]
                counts += np.bincount(np.concatenate(ids), minlength=len(counts))
            counts[eos] += len(texts)
            return [torch.from_numpy(counts)]

        def prepare() -> Sequence[Tensor]:
            shutil.rmtree(folder / "out", ignore_errors=True)
            script = Path(__file__).parents[3] / "scripts" / "prepare_data.py"
            command = [sys.executable, str(script), "prepare", str(folder / "out")]
            command += ["--input", str(folder / "texts.jsonl"), "--tokenizer", str(folder / "tokenizer")]
            command += ["--workers", str(workers), "--shard-mb", str(megabytes / (4 * workers))]
            subprocess.run(command, check=True, capture_output=True)
            return [torch.from_numpy(np.load(folder / "out" / "token_counts.npy"))]

        yield Comparison(
            title=f"{size / 1e6:.0f} MB of text to tokens, Tekken, {workers} cores",
            variants={"Hugging Face call": call, "prepare_data.py": prepare},
            tolerance=0.0,
            required={"prepare_data.py": 3.0},
            unit="s",
            unit_scale=1.0,
        )
