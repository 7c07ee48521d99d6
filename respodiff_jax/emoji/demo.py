"""`respodiff demo`: training, pictures, measurements and report on Emoji World, offline in minutes.

The training is of "a woman" and "a man" from "a person". The pictures show people of professions,
before and after it; no profession is used in training.
"""

import os

from ml_collections import ConfigDict

from respodiff_jax.adapters import load_adapter
from respodiff_jax.backbone import load_backbone
from respodiff_jax.emoji import recipes
from respodiff_jax.evaluation.report import write_report
from respodiff_jax.evaluation.results import Results
from respodiff_jax.evaluation.run import Plan, evaluate
from respodiff_jax.evaluation.suites import load_suite
from respodiff_jax.generation.sampling import SamplerOptions
from respodiff_jax.storage import local_path
from respodiff_jax.training.run import train

GROUP = "gender"
IMAGES_PER_SUBJECT, NUM_STEPS = 10, 20
# metric -> (label, format)
_TABLE = {
    "deviation_ratio": ("gender deviation ratio (0 is even)", "{:.3f}"),
    "subject_recognised": ("profession recognised", "{:.1%}"),
    "winoalign": ("CLIP score picture-prompt", "{:.2f}"),
}


def config() -> ConfigDict:
    """Builds the config of the demo's training, the same as `configs/emoji_gender.py`."""
    return recipes.task_config("gender")


def run(out: str | os.PathLike) -> Results:
    """Runs the demo, or continues an earlier run in the same folder.

    Args:
      out: folder for `run/` (the training, with `adapter/`) and `evaluation/` (with `report.html`).

    Returns:
      The measurements.
    """
    out = local_path(out, "output folder")
    content = config()
    content.lock()
    train(content, out / "run")
    adapter = load_adapter(out / "run" / "adapter")
    suite = load_suite(None, content.model.name)
    results = evaluate(
        load_backbone(content.model.name, dtype=content.model.dtype),
        adapter,
        suite,
        Plan(protocols=("fairness",), groups=(GROUP,), images_per_subject=IMAGES_PER_SUBJECT),
        out / "evaluation",
        SamplerOptions(num_steps=NUM_STEPS, guidance_scale=suite.guidance_scale),
        adapter_sources=[str(out / "run" / "adapter")],
    )
    report = write_report(out / "evaluation", workdir=out / "run")
    print(table(results))
    print(f"adapter: {out / 'run' / 'adapter'}\nreport:  {report}")
    return results


def table(results: Results) -> str:
    """Formats the measurements before and after the training as text."""
    lines = [f"{'':36}{'before':>10}{'after':>10}"]
    for metric, (name, style) in _TABLE.items():
        attribute = GROUP if metric == "deviation_ratio" else None
        values = [
            results.value(metric, images, attribute=attribute) for images in ("base", "adapted")
        ]
        lines.append(f"{name:36}" + "".join(f"{style.format(value):>10}" for value in values))
    return "\n".join(lines)
