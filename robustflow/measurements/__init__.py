"""What the project's own claims rest on, measured: `robustflow measure certificates`, `… attacks`, `… training`."""

from __future__ import annotations

from robustflow.measurements import (
    attack_figures,
    attack_sets,
    attack_tables,
    attack_workers,
    campaign,
    figures,
    kernels,
    networks,
    orthogonality,
    plain_foolbox,
    tables,
    training_cost,
    training_pages,
    views,
)
from robustflow.measurements.family import Family, Part, Request, measure

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "certificates",
            "Certificates, measured",
            {
                "tightness": Part(
                    "Tightness of norm bounds",
                    lambda request: kernels.tightness(),
                    tables.tightness,
                    {"tightness": figures.tightness},
                ),
                "cost": Part(
                    "Cost of norm bounds", lambda request: kernels.cost(), tables.cost, {"cost": figures.cost}
                ),
                "share": Part(
                    "The share of certifying in an evaluation",
                    lambda request: networks.share(request.benchmark, request.data),
                    tables.share,
                    {"share": figures.share},
                    uses_benchmark=True,
                ),
                "gains": Part(
                    "What sharper constants gain",
                    lambda request: networks.gains(request.benchmark, request.data),
                    tables.gains,
                    {"gains": figures.gains},
                    uses_benchmark=True,
                ),
                "views": Part(
                    "What more views of an image gain",
                    views.views,
                    views.section,
                    {"views": views.draw},
                    uses_benchmark=True,
                    needs_benchmark=True,
                ),
                "campaign": Part(
                    "Attempts to falsify",
                    lambda request: campaign.campaign(request.out / "campaign.partial.json"),
                    tables.campaign,
                    {"campaign": figures.campaign},
                ),
            },
        ),
        Family(
            "attacks",
            "Attacks, measured",
            {
                "sets": Part(
                    "Attack sets on the models of a benchmark",
                    attack_sets.measure,
                    attack_tables.sets,
                    {
                        "sets-accuracy": attack_figures.accuracy,
                        "sets-matrix": attack_figures.matrix,
                        "sets-cost": attack_figures.cost,
                    },
                    uses_benchmark=True,
                ),
                "foolbox": Part(
                    "One sweep against plain foolbox calls",
                    plain_foolbox.measure,
                    attack_tables.foolbox,
                    {"foolbox": attack_figures.foolbox},
                    uses_benchmark=True,
                ),
                "workers": Part(
                    "Two workers against one",
                    attack_workers.measure,
                    attack_tables.workers,
                    {"workers": attack_figures.workers},
                    uses_benchmark=True,
                ),
            },
        ),
        Family(
            "training",
            "Training, measured",
            {
                "profile": Part(
                    "Where the time of a training step goes",
                    training_cost.profile,
                    training_pages.profile,
                    {"profile": training_pages.draw_profile},
                ),
                "loop": Part(
                    "The paper's network against a plain loop",
                    training_cost.loop,
                    training_pages.loop,
                    {"loop": training_pages.draw_loop},
                ),
                "orthogonality": Part(
                    "Ways to keep kernels orthonormal",
                    orthogonality.orthogonality,
                    training_pages.orthogonality,
                    {"orthogonality": training_pages.draw_orthogonality},
                    uses_data=True,
                ),
            },
        ),
    )
}

__all__ = ["FAMILIES", "Family", "Part", "Request", "measure"]
