#!/usr/bin/env python
"""Parallel layouts for a number of GPUs: what each would take in memory and time, and which do not fit.

    python scripts/plan.py model=ministral3_8b gpus=64 memory_gb=80
    python scripts/plan.py experiment=nld_14b gpus=256 memory_gb=80 data.sequence_length=16384
    python scripts/plan.py model=ministral3_3b gpus=8 memory_gb=141 gpus_per_node=8 machine.mfu=0.45 --json

Everything but gpus, memory_gb (of one, 2^30 bytes) and gpus_per_node is for train.py: groups and keys. Without
experiment=... it is experiment=nld_8b, the recipe's two stages. The best layout comes first; of the variants of one
(tensor, pipeline, context) size the fastest that fits is shown. Times are arithmetic (docs/architecture.md), for an
assumed share of the GPU's peak (machine.mfu); memory is a model that tests compare with counted tensors.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from nld_train.config.compose import EXIT_BAD_CONFIG, EXIT_OK, compose_unlaunched
from nld_train.config.plan import nothing_fits, plan_layouts, table, to_dict
from nld_train.errors import ConfigError, Problem


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", metavar="KEY=VALUE", help="gpus=N memory_gb=X, and what train.py takes")
    parser.add_argument("--top", type=int, default=12, metavar="N", help="layouts in the table (default 12; 0: all)")
    parser.add_argument("--json", action="store_true", help="print JSON: every layout, its parts and its overrides")
    arguments = parser.parse_intermixed_args(argv)
    try:
        own, overrides = _split(arguments.settings)
        gpus, memory_gb = _number(own, "gpus", "64", whole=True), _number(own, "memory_gb", "80", whole=False)
        if not any(line.startswith("experiment=") for line in overrides):
            overrides = ["experiment=nld_8b", *overrides]
        if "gpus_per_node" in own:
            overrides.append(f"machine.gpus_per_node={own['gpus_per_node']}")
        config = compose_unlaunched([*overrides, "parallel=single"])
        plans = plan_layouts(config, int(gpus), memory_gb)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_CONFIG
    if arguments.json:
        print(json.dumps([to_dict(plan) for plan in plans], indent=2))
    else:
        print("\n".join(table(plans, arguments.top)))
    if not plans[0].fits:
        print(ConfigError(nothing_fits(plans[0], int(gpus), memory_gb)), file=sys.stderr)
        return EXIT_BAD_CONFIG
    if not arguments.json:
        print(f"The first one: train.py ... {' '.join(plans[0].overrides)}")
        print("GB are 2^30 bytes on the rank that needs most; seconds are a model on paper.")
    return EXIT_OK


def _split(settings: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """This script's own settings, and train.py's."""
    own = {}
    overrides = []
    for setting in settings:
        key, _, value = setting.partition("=")
        if key in ("gpus", "memory_gb", "gpus_per_node"):
            own[key] = value
        elif key.lstrip("+~").split(".")[0] == "parallel":
            raise ConfigError([Problem(key, "is what this script finds out", f"leave {setting} out")])
        else:
            overrides.append(setting)
    return own, overrides


def _number(own: dict[str, str], key: str, example: str, *, whole: bool) -> float:
    text = own.get(key)
    try:
        number = float(text) if text is not None else 0.0
    except ValueError:
        number = 0.0
    if number > 0 and number < float("inf") and (not whole or number == int(number)):
        return number
    found = "is missing" if text is None else f"{text!r} is not a positive {'whole ' if whole else ''}number"
    raise ConfigError([Problem(key, found, f"give it, as in {key}={example}")])


if __name__ == "__main__":
    sys.exit(main())
