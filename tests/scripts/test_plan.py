"""scripts/plan.py: the table, JSON, and what is refused."""

import json

import pytest

from scripts.plan import main


def test_a_table_and_the_words_that_choose_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=ministral3_3b", "gpus=8", "memory_gb=80", "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-4:] == ["ar", "s", "joint", "s"]
    assert lines[1].split()[0] == "1"
    assert any(line.startswith("The first one: train.py ... parallel=single") for line in lines)


def test_overrides_reach_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    def needed(*more: str) -> float:
        assert main(["model=ministral3_3b", "gpus=64", "memory_gb=80", "--json", *more]) == 0
        found = json.loads(capsys.readouterr().out)
        return min(plan["needed_gb"] for plan in found if plan["fits"])

    plain = needed()
    assert needed("data.sequence_length=8192") > plain
    assert needed("train.micro_batch_size=2") > plain
    assert needed("objective.noisy_fraction=0.5") < plain
    assert needed("machine.reserved_gb=1") == pytest.approx(plain - 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gpus=8"], "memory_gb: is missing"),
        (["gpus=8.5", "memory_gb=80"], "gpus: '8.5' is not a positive whole number"),
        (["gpus=0", "memory_gb=80"], "gpus: '0' is not a positive whole number"),
        (["gpus=8", "memory_gb=80", "modle=ministral3_3b"], "modle"),
        (["gpus=1", "memory_gb=16"], "no layout of 1 rank with 16.0 GB fits"),
        (["gpus=8", "memory_gb=80", "parallel.tensor_model_parallel_size=4"], "is what this script finds out"),
        (["gpus=8", "memory_gb=80", "parallel=tp2"], "parallel: is what this script finds out"),
        (["gpus=131", "memory_gb=80"], "no layout of 131 ranks is possible"),
        (["gpus=8", "memory_gb=80", "gpus_per_node=0"], "machine.gpus_per_node: 0 is too small"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(["model=ministral3_3b", *arguments]) == 2
    assert words in capsys.readouterr().err
