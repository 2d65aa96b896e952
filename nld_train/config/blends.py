"""What a stage reads: which corpora, with which weights."""

from fractions import Fraction

from nld_train.config.schema import BlendPart, DataConfig, StageConfig

WHOLE = "corpus"
"""Name of the only part where ``data.corpus`` names one corpus."""


def blend_parts(data: DataConfig, stage: StageConfig | None = None) -> dict[str, BlendPart]:
    """The parts of a stage's blend by name; None: of the run's."""
    if stage is not None and stage.blend:
        return stage.blend
    return data.blend or {WHOLE: BlendPart(corpus=data.corpus or "", weight=1.0)}


def exact_weights(parts: dict[str, BlendPart]) -> dict[str, Fraction]:
    """Weights that add up to 1, exactly: 0.7 and 0.3 are 7/10 and 3/10, whatever a float makes of them."""
    weights = {name: Fraction(repr(part.weight)) for name, part in parts.items()}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def same_data(data: DataConfig, stage: StageConfig) -> tuple[tuple[str, Fraction], ...]:
    """Equal for stages that read one blend together, each going on where the last one stopped."""
    parts = blend_parts(data, stage)
    weights = exact_weights(parts)
    return tuple(sorted((part.corpus, weights[name]) for name, part in parts.items()))
