"""`respodiff demo`: training, pictures, measurements and report on Emoji World, offline in minutes.

The training is of "a woman" and "a man" from "a person". The pictures show people of professions,
before and after it. RAM and SAM see no profession, and the reading of prompts sees ten of twenty.
"""

from ml_collections import ConfigDict

from respodiff_jax.adapters import load_adapter
from respodiff_jax.backbone import load_backbone
from respodiff_jax.emoji import recipes
from respodiff_jax.evaluation import Results, evaluate
from respodiff_jax.evaluation.suites import load_suite
from respodiff_jax.storage import PathLike, local_path
from respodiff_jax.training.waves import train

GROUP = "gender"
IMAGES_PER_SUBJECT, NUM_STEPS = 8, 20
# (metric, attribute) -> (label, format)
_TABLE = {
    ("deviation_ratio", GROUP): ("gender deviation ratio (0 is even)", "{:.3f}"),
    ("subject_recognised", None): ("profession recognised", "{:.1%}"),
    ("winoalign", None): ("CLIP score picture-prompt", "{:.2f}"),
    ("obeyed", GROUP): ("gender that a prompt names is shown", "{:.1%}"),
    ("attribute_kept", "skin_tone"): ("skin tone kept", "{:.1%}"),
    ("attribute_kept_when_typed", "skin_tone"): ("skin tone kept if gender is typed", "{:.1%}"),
    ("unchanged", None): ("pictures of things unchanged", "{:.1%}"),
}


def config() -> ConfigDict:
    """Builds the config of the demo's training, the same as `configs/emoji_gender.py`."""
    return recipes.task_config("gender")


def run(out: PathLike) -> Results:
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
    results = evaluate(
        load_backbone(content.model.name, dtype=content.model.dtype, abstract=True),
        adapter,
        out=out / "evaluation",
        part=("fairness", "intent"),
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
    """Formats the measurements before and after the training, with 95 % intervals, as text."""
    lines = [f"{'':36}{'before':>24}{'after':>24}"]
    for (metric, attribute), (name, style) in _TABLE.items():
        line = f"{name:36}"
        for images in ("base", "adapted"):
            cell = ""
            for m in results.find(metric, images, attribute=attribute, subject=None)[:1]:
                cell = style.format(m.value)
                if m.interval:
                    cell += " [" + ", ".join(map(style.format, m.interval)) + "]"
            line += f"{cell:>24}"
        lines.append(line.rstrip())
    return "\n".join(lines)
