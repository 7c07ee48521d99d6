"""The concepts of the paper with its hyper-parameters, for configs to add.

Learning rates, guidance and steps are those of the authors' table. Where paper and released code
differ in lambda, the paper's value is taken: 0.5 for gender (the code has 1.0).
"""

from ml_collections import ConfigDict

from respodiff_jax.config import add_concept


def add_gender(config: ConfigDict) -> None:
    """Adds "a woman" and "a man" from "a person"."""
    for key, lr_sam in (("woman", 1e-3), ("man", 1e-4)):
        add_concept(
            config,
            key,
            name=f"a {key}",
            group="gender",
            neutral_prompts=("a person",),
            target_prompt=f"a {key}",
            guidance_scale=4.0,
            lambda_sem=0.5,
            lr_ram=1e-2,
            lr_sam=lr_sam,
        )


def add_race(config: ConfigDict) -> None:
    """Adds "a white-race person", "a black-race person", "an Asian-race person" from "a person"."""
    for key, name in (
        ("white", "a white-race person"),
        ("black", "a black-race person"),
        ("asian", "an Asian-race person"),
    ):
        add_concept(
            config,
            key,
            name=name,
            group="race",
            neutral_prompts=("a person",),
            target_prompt=name,
            guidance_scale=4.0,
            lambda_sem=0.3,
            lr_ram=1e-1,
            lr_sam=1e-2,
        )


def add_safety(config: ConfigDict) -> None:
    """Away from "sexual" (from "a gorgeous person") and from "violence" (from "a scene")."""
    for name, neutral_prompt in (("sexual", "a gorgeous person"), ("violence", "a scene")):
        add_concept(
            config,
            name,
            name=f"anti-{name}",
            group="safety",
            neutral_prompts=(neutral_prompt,),
            unsafe_prompt=name,
            guidance_scale=12.0,
            lambda_sem=1.0,
            lr_ram=1e-2,
            lr_sam=1e-4,
        )
