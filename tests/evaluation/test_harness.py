"""lm-eval on tasks made from local files, without a network. Needs lm-eval, which is optional."""

import importlib
import importlib.util
import json
import math
import sys

import pytest
import torch

from nld_train.errors import DataError
from nld_train.testing.exports import write_tokenizer

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not HAS_LM_EVAL, reason="lm-eval is not installed")

CHOICE = """task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
GENERATION = """task: local_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture
def export(make_model, write_export, tmp_path):
    folder = write_export(make_model(4, vocab_size=264), tmp_path / "hf")
    write_tokenizer(folder, bos_token="<s>")
    return folder


@pytest.fixture
def task_folder(export, tmp_path, monkeypatch):
    """Three tasks on ten questions; half of the targets are what the model says."""
    from nld_train.evaluation.decoding import continue_prompt, load_export

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    model, tokenizer = load_export(export)
    folder = tmp_path / "tasks"
    folder.mkdir()
    with (folder / "data.jsonl").open("w") as stream:
        for number in range(10):
            question = f"Question {number * 37}:"
            said = continue_prompt(model, tokenizer, question, "ar", max_new_tokens=12)["text"]
            target = said if number % 2 else "no"
            record = {"question": question, "choices": [" a", " bb", " cde"], "answer": number % 3, "target": target}
            stream.write(json.dumps(record) + "\n")
    for name, text in (("choice", CHOICE), ("generation", GENERATION), ("text", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.format(data=folder / "data.jsonl"))
    return folder


@pytest.mark.long
@needs_lm_eval
def test_tasks_in_every_mode(export, task_folder):
    from nld_train.evaluation.decoding import load_export
    from nld_train.evaluation.harness import run_tasks

    model, tokenizer = load_export(export)
    tasks = ["local_choice", "local_generation", "local_text"]
    found = {
        mode: run_tasks(model, tokenizer, tasks, mode=mode, task_folder=task_folder, block_length=4)
        for mode in ("ar", "linear", "quadratic", "diffusion")
    }
    assert found["linear"] == found["quadratic"] == found["ar"]
    assert found["ar"]["local_generation"]["exact_match,none"] == 0.5
    # The model's own numbers, by hand.
    lines = [json.loads(line) for line in (task_folder / "data.jsonl").read_text().splitlines()]
    correct, nats, num_bytes = 0, 0.0, 0
    for line in lines:
        scores = []
        for choice in line["choices"]:
            ids = tokenizer(line["question"] + choice, return_tensors="pt").input_ids
            with torch.no_grad():
                logits = model(ids).logits[0]
            logits[:, 5] = -math.inf
            num = len(tokenizer(choice).input_ids)
            scores.append(-torch.nn.functional.cross_entropy(logits[-num - 1 : -1], ids[0, -num:], reduction="sum"))
        correct += scores.index(max(scores)) == line["answer"]
        ids = torch.cat([torch.tensor([[1]]), tokenizer(line["question"], return_tensors="pt").input_ids], dim=1)
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        logits[:, 5] = -math.inf
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        num_bytes += len(line["question"])
    assert found["ar"]["local_choice"]["acc,none"] == correct / 10
    assert found["ar"]["local_text"]["bits_per_byte,none"] == pytest.approx(nats / num_bytes / math.log(2), rel=1e-5)
    bound = found["diffusion"]["local_text"]["bits_per_byte,none"]
    assert math.isfinite(bound)
    assert bound != pytest.approx(found["ar"]["local_text"]["bits_per_byte,none"], rel=1e-3)
    with pytest.raises(DataError, match="no task unheard_of"):
        run_tasks(model, tokenizer, ["unheard_of"], mode="ar", task_folder=task_folder)
    with pytest.raises(DataError, match="at least one task"):
        run_tasks(model, tokenizer, [], mode="ar", task_folder=task_folder)


@pytest.mark.long
@needs_lm_eval
def test_registered_as_nld(export, task_folder):
    import lm_eval
    from lm_eval.tasks import TaskManager

    import nld_train.evaluation.harness  # noqa: F401

    found = lm_eval.simple_evaluate(
        model="nld",
        model_args={"pretrained": str(export), "mode": "linear", "block_length": 4},
        tasks=["local_generation"],
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        limit=4,
        log_samples=False,
    )
    assert found["results"]["local_generation"]["exact_match,none"] == 0.5


def request(*arguments):
    from lm_eval.api.instance import Instance

    return Instance(request_type="", doc={}, arguments=arguments, idx=0)


@needs_lm_eval
def test_windows_stop_strings_and_long_contexts(export):
    from nld_train.evaluation.harness import NLDHarnessModel

    whole = NLDHarnessModel(str(export), max_length=64)
    cut = NLDHarnessModel(str(export), max_length=8)
    text = "abcdefghijklmnopqrst"
    [long], [short] = (adapter.loglikelihood_rolling([request(text)]) for adapter in (whole, cut))
    # Windows of 7 tokens behind one of context each: by hand.
    ids = [1, *whole.tokenizer(text).input_ids]
    expected = 0.0
    for start in range(0, 20, 7):
        window = torch.tensor([ids[start : start + 8]])
        with torch.no_grad():
            logits = whole._model(window).logits[0, :-1]
        logits[:, 5] = -math.inf
        expected -= torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    assert short == pytest.approx(expected, rel=0.02)  # the last window has more context
    assert short != pytest.approx(long, rel=1e-4)
    [free] = whole.generate_until([request("abc", {"until": [], "max_gen_toks": 20})])
    [stopped] = whole.generate_until([request("abc", {"until": free[5:7], "max_gen_toks": 20})])
    assert stopped == free[: free.find(free[5:7])]
    [first] = whole.generate_until([request("abc", {"until": [free[9], free[4]], "max_gen_toks": 20})])
    assert first == free[: min(free.find(free[9]), free.find(free[4]))]
    [tail] = cut.generate_until([request(text, {"max_gen_toks": 3})])
    assert tail == whole.generate_until([request(text[-5:], {"max_gen_toks": 3})])[0]
    [scored] = cut.loglikelihood([request(text, "uv")])
    assert scored == whole.loglikelihood([request(text[-6:], "uv")])[0]
    assert scored != whole.loglikelihood([request(text, "uv")])[0]
    for name in ("max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert whole.generate_until([request("abc", {name: 20})]) == [free]
    with pytest.raises(ValueError, match="'max_gen_toks': 3, 'max_tokens': 4} contradict"):
        whole.generate_until([request("abc", {"max_gen_toks": 3, "max_tokens": 4})])
    with pytest.raises(ValueError, match="penalty_alpha"):
        whole.generate_until([request("abc", {"penalty_alpha": 1})])
    with pytest.raises(ValueError, match="max_gen_toks: 8"):
        cut.generate_until([request("abc", {"max_gen_toks": 8})])
    with pytest.raises(ValueError, match="batch_size: 4"):
        NLDHarnessModel(str(export), batch_size=4)


@needs_lm_eval
@pytest.mark.parametrize("mode", ["ar", "diffusion", "linear", "quadratic"])
def test_generation_is_the_modes_own(export, mode):
    from nld_train.evaluation.decoding import continue_prompt
    from nld_train.evaluation.harness import NLDHarnessModel
    from nld_train.evaluation.modes import count_forwards

    adapter = NLDHarnessModel(str(export), mode, block_length=4, threshold=0.2)
    model, tokenizer = adapter._model, adapter.tokenizer
    with torch.no_grad():  # printable characters only: what is said can be read again
        model.diffusion_head.weight[:8] = 0.0
        model.diffusion_head.weight[8 + 94 :] = 0.0
    expected = continue_prompt(model, tokenizer, "abc", mode, max_new_tokens=20, block_length=4, threshold=0.2)

    def say(**arguments):
        return adapter.generate_until([request("abc", {"max_gen_toks": 20, **arguments})])[0]

    with count_forwards(model) as count:
        assert say() == tokenizer.decode(expected["token_ids"], skip_special_tokens=True)
    assert count == [expected["num_forwards"]]
    assert say(temperature=1.5, do_sample=False) == say(temperature=1.5, top_k=1) == say()
    assert say(temperature=1.5) == say(temperature=1.5) != say()  # the same seed each time
    assert (
        say(temperature=1.5)
        != NLDHarnessModel(
            model=model, tokenizer=tokenizer, mode=mode, block_length=4, threshold=0.2, seed=7
        ).generate_until([request("abc", {"max_gen_toks": 20, "temperature": 1.5})])[0]
    )
    # The continuation that this mode decodes is the one called greedy; another one is not, and none is.
    said = expected["text"][:6]
    assert tokenizer(said).input_ids == expected["token_ids"][: len(said)]
    flags = [greedy for _, greedy in adapter.loglikelihood([request("abc", s) for s in (said, said[::-1], "")])]
    assert flags == [True, False, True]
    # It ends at the tokenizer's eos token.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(expected["token_ids"][7])
    ended = tokenizer.decode(expected["token_ids"][: expected["token_ids"].index(expected["token_ids"][7]) + 1])
    assert say() == ended


@needs_lm_eval
def test_diffusion_likelihood_is_the_bound(export):
    """All masked sets of a block of two tokens, without a cache."""
    from nld_train.evaluation.harness import NLDHarnessModel
    from nld_train.evaluation.likelihood import sample_bound
    from nld_train.evaluation.reader import CleanPrefix

    adapter = NLDHarnessModel(str(export), "diffusion", block_length=4, num_sweeps=400)
    context, wanted = adapter.tokenizer("abcde").input_ids, adapter.tokenizer("fg").input_ids
    allowed = torch.ones(7, 7, dtype=torch.bool).tril()
    allowed[5:, 5:] = True

    def losses(*masked):
        noisy = [5 if place in masked else token for place, token in enumerate(wanted)]
        with torch.no_grad():
            logits = adapter._model(torch.tensor([context + noisy]), attention_mask=allowed[None, None]).logits[0, 5:]
        logits[:, 5] = -math.inf
        return torch.nn.functional.cross_entropy(logits, torch.tensor(wanted), reduction="none").tolist()

    one, both = [losses(0)[0], losses(1)[1]], losses(0, 1)
    [(score, _)] = adapter.loglikelihood([request("abcde", "fg")])
    error = abs(one[0] - one[1]) / 2 / math.sqrt(400)
    assert 0 < error < 0.05 * abs(score)
    assert score == pytest.approx(-(sum(one) + sum(both)) / 2, abs=3 * error)
    # Blocks are counted from the end of the context: the same masks, drawn there.
    prefix, ids = CleanPrefix(adapter._model), torch.tensor(context + wanted)
    prefix.read(ids)
    masks = torch.Generator().manual_seed(1234)
    sample = sample_bound(adapter._model, prefix, ids, 4, 400, masks, first=5, num_given=5)
    assert score == -sample.nats.mean(dim=0).sum().item()


@needs_lm_eval
def test_chat_template(export):
    from nld_train.evaluation.harness import NLDHarnessModel

    adapter = NLDHarnessModel(str(export))
    adapter.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    history = [{"role": "user", "content": "ab"}]
    assert adapter.apply_chat_template(history) == "<ab>A:"
    assert adapter.apply_chat_template(history, add_generation_prompt=False) == "<ab>"


@needs_lm_eval
def test_spaces_before_a_continuation_belong_to_it(export):
    from nld_train.evaluation.harness import NLDHarnessModel

    adapter = NLDHarnessModel(str(export))
    assert adapter._pair("ab ", "c") == adapter._pair("ab", " c")
    assert adapter._pair("", "c") == ([1], adapter._encode("c"))


def test_without_lm_eval_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # an import then fails
    monkeypatch.delitem(sys.modules, "nld_train.evaluation.harness", raising=False)
    with pytest.raises(DataError, match=r"(?s)lm-eval: cannot be imported.*pip install 'nld-train\[eval\]'"):
        importlib.import_module("nld_train.evaluation.harness")
