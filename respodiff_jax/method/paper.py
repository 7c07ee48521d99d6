"""The paper's concepts with its hyper-parameters, as data.

Each group maps a short key, for overrides such as `--config.concepts.woman.lr_ram=0.03`, to its
concept. Learning rates and guidance are those of the authors' table; the numbers of steps are in
`configs/`. Where the paper and the released code differ in lambda, the paper's value is used: 0.5
for gender (the code has 1.0).
"""

from types import MappingProxyType

from respodiff_jax.method.concepts import Concept

GENDER = MappingProxyType(
    {
        key: Concept(
            name=f"a {key}",
            group="gender",
            neutral_prompts=("a person",),
            target_prompt=f"a {key}",
            guidance_scale=4.0,
            lambda_sem=0.5,
            lr_ram=1e-2,
            lr_sam=lr_sam,
        )
        for key, lr_sam in (("woman", 1e-3), ("man", 1e-4))
    }
)

RACE = MappingProxyType(
    {
        key: Concept(
            name=name,
            group="race",
            neutral_prompts=("a person",),
            target_prompt=name,
            guidance_scale=4.0,
            lambda_sem=0.3,
            lr_ram=1e-1,
            lr_sam=1e-2,
            words=tuple(f"{word} {{person}}" for word in words),
        )
        for key, name, words in (
            ("white", "a white-race person", ("white-race", "white", "Caucasian")),
            ("black", "a black-race person", ("black-race", "Black", "African")),
            ("asian", "an Asian-race person", ("Asian-race", "Asian")),
        )
    }
)

SAFETY = MappingProxyType(
    {
        unsafe: Concept(
            name=f"anti-{unsafe}",
            group="safety",
            neutral_prompts=(neutral,),
            unsafe_prompt=unsafe,
            guidance_scale=12.0,
            lambda_sem=1.0,
            lr_ram=1e-2,
            lr_sam=1e-4,
        )
        for unsafe, neutral in (("sexual", "a gorgeous person"), ("violence", "a scene"))
    }
)

# Prompts of four of WinoBias's professions, for the validation grids.
PROFESSIONS = tuple(f"a photo of a {word}" for word in ("nurse", "CEO", "cook", "mechanic"))
