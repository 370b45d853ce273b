"""The ways to mix several datasets, by the name the user writes."""

from __future__ import annotations

from simpletuner.core.table import Row, Table

SAMPLINGS = Table(
    "data_backend_sampling",
    (
        Row(
            "auto-weighting",
            "simpletuner.data.mixing:by_size",
            "An epoch sees everything (times its repeats). Datasets come in proportion to their "
            "batches times their probability: with equal probabilities all last the whole epoch, "
            "otherwise the larger ones are through earlier and leave the rest to the others.",
        ),
        Row(
            "uniform",
            "simpletuner.data.mixing:by_probability",
            "An epoch sees everything (times its repeats). Datasets come in proportion to their "
            "probability, whatever their sizes; a small one is through early and leaves the rest "
            "of the epoch to the others.",
        ),
        Row(
            "mix",
            "simpletuner.data.mixing:by_quota",
            "Datasets come in proportion to their probability, all the time: a small one begins "
            "again as soon as it is through, and a large one may need several epochs. An epoch is "
            "as long as one that sees everything.",
        ),
    ),
)
"""How batches of several datasets follow each other."""
