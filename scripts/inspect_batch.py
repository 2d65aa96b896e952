#!/usr/bin/env python
"""Print a micro-batch as it reaches the model: documents, blocks, masks, weights and rows.

    python scripts/inspect_batch.py                                   the first batch of the tiny experiment
    python scripts/inspect_batch.py --stage joint --step 3            the third step of a stage
    python scripts/inspect_batch.py --step 250 --rank 1 --ranks 2 data.document_mask=boundary

Everything else on the command line is for train.py: groups and keys (experiment=..., data.sequence_length=64, ...). How
the model is cut does not change its batches: give parallel=single for an experiment that is.
Nothing is trained; corpora that are not prepared yet are. In colour on a terminal, plain text elsewhere.
"""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from nld_train.config.compose import EXIT_BAD_CONFIG, EXIT_FAILED, EXIT_OK, compose
from nld_train.errors import ConfigError, NLDError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for train.py: group=option or key=value")
    parser.add_argument("--stage", metavar="NAME", help="count --step from the first step of this stage")
    parser.add_argument("--step", type=int, default=1, metavar="N", help="from 1 (default 1)")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="data-parallel rank (default 0)")
    parser.add_argument("--ranks", type=int, default=1, metavar="R", help="data-parallel ranks of the run (default 1)")
    parser.add_argument("--micro-batch", type=int, default=0, metavar="M", help="of the step, from 0 (default 0)")
    parser.add_argument("--sequences", type=int, default=1, metavar="B", help="sequences to show (default 1)")
    parser.add_argument("--blocks", type=int, default=8, metavar="K", help="blocks of each to show (default 8)")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.sequences < 1 or arguments.blocks < 1 or arguments.ranks < 1:
        parser.error("--sequences, --blocks and --ranks must be at least 1")
    try:
        config = compose(arguments.overrides, world_size=arguments.ranks)
        # Imported here: --help and a refused configuration do not wait for torch.
        from nld_train.evaluation.batches import Place, inspect_batch

        place = Place(
            step=arguments.step,
            stage=arguments.stage,
            rank=arguments.rank,
            data_parallel_size=arguments.ranks,
            micro_batch=arguments.micro_batch,
        )
        console = Console(highlight=False, soft_wrap=True)
        for line in inspect_batch(config, place, num_sequences=arguments.sequences, num_blocks=arguments.blocks):
            console.print(line, markup=False)
    except NLDError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
