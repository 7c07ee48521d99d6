"""Results of `respodiff compile` as text, and results of earlier versions."""

from test_compile_analysis import V5E
from test_train_step import WOMAN, make_config

from respodiff_jax.compiling import ahead_of_time, analysis, report
from respodiff_jax.training.config import with_concepts


def make_entry(step="train", **changes):
    config = with_concepts(
        make_config(**{"model.dtype": "float32", "rollout.kind": "streaming"}), [WOMAN]
    )
    result = {
        "batch_per_device": 4,
        "fits": True,
        "memory": dict.fromkeys(
            ("parameters", "arguments", "temporaries", "outputs", "aliased", "code", "peak"), 2**30
        )
        | {"total": 8 * 2**30, "available": V5E.hbm},
        "loop": {"repeats": 24.0},
        "flops": 6.2e12,
        "bytes": 81.9e9,
        "rearranged_bytes": 1.75e9,
        "transposed_bytes": 0.5e9,
        "kernels_without_flops": 3,
        "roofline": analysis.roofline(6.2e12, 81.9e9, V5E),
        "exchange": {
            "bytes": 656e3,
            "by_op": {"all-reduce": {"count": 2, "bytes": 656e3}},
            "gradients": 655360,
            "no_weights_moved": True,
        },
        "compile_seconds": 273.1,
    }
    return {
        "job": ahead_of_time.Compilation(config, "v5e:4x4", step).to_dict(),
        "chips": 16,
        "model": "random/sd14",
        "resolution": 512,
        "concepts": 1,
        "result": result | changes,
    }


def test_summary_and_table_of_results(monkeypatch):
    monkeypatch.setattr(ahead_of_time.importlib.metadata, "version", lambda name: "1.2")
    text = report.summary(make_entry())
    assert "random/sd14, 512 px, float32, train, 1 concept, streaming, pmap, flash" in text
    assert "8.00 GiB of 15.75: fits" in text
    assert "6.20 TFLOP, 31.47 ms at best" in text and "81.9 GB, 100 ms at best" in text
    assert "1.2 GB of copies to another layout and 0.5 GB of transposes and casts" in text
    assert "bound by    memory: at best 40 samples/s a chip" in text
    assert "1440 concepts/hour a chip, with 100 steps of batch size 1" in text
    assert "counts 24 times" in text and "3 Pallas kernels" in text
    assert "all-reduce 0.66 MB; gradients are 0.66 MB" in text
    assert "base weights stay where they are: yes" in text
    too_large = make_entry(fits=False)
    del too_large["result"]["roofline"]
    assert "DOES NOT FIT" in report.summary(too_large)
    limit = make_entry(analysis.LARGEST_BATCH)
    limit["result"] = {"largest": 9, "exact": True, "tried": {"9": 2**30, "10": 2**35}}
    assert "  9 samples a concept (9: 1.00 GiB, 10: 32.00 GiB)" in report.summary(limit)

    table = report.markdown([make_entry(), too_large, limit]).splitlines()
    cells = [line.count("|") for line in table if line.startswith("|")]
    assert cells == [13] * 4 + [5] * 3
    # A chip with 40 samples/s takes 2.5 s for 100 steps of batch size 1.
    assert table[2].endswith("| 8.00 of 15.75 | 6.20 | 81.9 | 0.1 | memory | 40 | 1440 | 0.66 |")
    assert "does not fit | – | –" in table[3]
    assert table[-1].endswith("pmap, flash | 9 |")
    assert "jax 1.2, libtpu 1.2" in "\n".join(table)


EARLIER_ENTRY = """\
{
  "job": {
    "step": "train",
    "topology": "v5e:4x4",
    "batch_per_device": 4,
    "attention": "flash",
    "config": {
      "model": {"dtype": "bfloat16"},
      "parallel": {"strategy": "pmap", "fsdp": false},
      "rollout": {"kind": "streaming"},
      "train": {"steps": 5000, "batch_size": 1}
    },
    "versions": {"jax": "0.10.2", "libtpu": "0.0.42.1"}
  },
  "chips": 16,
  "model": "random/sd14",
  "resolution": 512,
  "concepts": 2,
  "result": {
    "batch_per_device": 4,
    "fits": true,
    "memory": {"total": 7312375808, "available": 16911433728},
    "flops": 20.08e12,
    "bytes": 54.0e9,
    "roofline": {"seconds": 0.102, "bound": "compute"},
    "exchange": {"bytes": 656000}
  }
}
"""


def test_results_of_earlier_versions_are_read(tmp_path):
    (tmp_path / "compile.json").write_text(f"[{EARLIER_ENTRY}]")
    table = report.markdown(ahead_of_time.read_results(tmp_path / "compile.json"))
    assert "| random/sd14, 512 px, bfloat16 | v5e:4x4 | train, 2 concepts, streaming, pmap" in table
    assert "| 4 | 6.81 of 15.75 | 20.08 | 54.0 | 0.102 | compute | 39.2 | 28.24 | 0.66 |" in table
