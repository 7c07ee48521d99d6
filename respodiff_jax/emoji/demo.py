"""`respodiff demo`: the whole job on Emoji World, offline and in minutes.

Trains "a woman" and "a man" from "a person", draws people of professions that the training never
saw, before and after, measures, exports, and writes a report.
"""

import os

from ml_collections import ConfigDict

from respodiff_jax.adapters import load_adapter
from respodiff_jax.backbone import load_backbone
from respodiff_jax.emoji import recipes
from respodiff_jax.evaluation import Results, evaluate
from respodiff_jax.evaluation.suites import load_suite
from respodiff_jax.storage import local_path
from respodiff_jax.training.waves import train

GROUP = "gender"
IMAGES_PER_SUBJECT, NUM_STEPS = 10, 20
# metric -> what a reader calls it, how it is shown
_TABLE = {
    "deviation_ratio": ("gender deviation ratio (0 is even)", "{:.3f}"),
    "subject_recognised": ("profession recognised", "{:.1%}"),
    "winoalign": ("CLIP score picture-prompt", "{:.2f}"),
}


def config() -> ConfigDict:
    """The training of the demo, that of `configs/emoji_gender.py`."""
    return recipes.task_config("gender")


def run(out: str | os.PathLike) -> Results:
    """Runs all of it, or what an earlier run in the folder has not done yet.

    Args:
      out: folder: `run/` (training, with `adapter/`), `evaluation/` with `report.html`.

    Returns:
      What was measured.
    """
    out = local_path(out, "output folder")
    content = config()
    content.lock()
    train(content, out / "run")
    adapter = load_adapter(out / "run" / "adapter")
    results = evaluate(
        load_backbone(content.model.name, dtype=content.model.dtype, abstract=True),
        adapter,
        out=out / "evaluation",
        part="fairness",
        groups=[GROUP],
        suite=load_suite(None, content.model.name),
        images_per_subject=IMAGES_PER_SUBJECT,
        num_steps=NUM_STEPS,
        adapter_sources=[str(out / "run")],
    )
    print(table(results))
    print(f"adapter: {out / 'run' / 'adapter'}\nreport:  {out / 'evaluation' / 'report.html'}")
    return results


def table(results: Results) -> str:
    """The measurements before and after, as text."""
    lines = [f"{'':36}{'before':>10}{'after':>10}"]
    for metric, (name, style) in _TABLE.items():
        attribute = GROUP if metric == "deviation_ratio" else None
        values = [
            results.value(metric, images, attribute=attribute) for images in ("base", "adapted")
        ]
        lines.append(f"{name:36}" + "".join(f"{style.format(value):>10}" for value in values))
    return "\n".join(lines)
