#!/usr/bin/env bash
# Tests an adapter with the newest diffusers and transformers and without JAX: runs the example of its
# model card, compares 50 guided steps with stored latents that JAX computed, then checks which samples
# the adapter steers however the UNet is called (tests/test_torch_calls.py, tests/test_torch_unets.py).
#
#   launch/newest_torch.sh [MODEL] [STORED]
#
# MODEL is a diffusers folder, by default the packaged model. STORED is a folder with adapter/, for that
# model, and latents.safetensors, by default tests/data/emoji_gender. If one of them is missing, the
# `python` on the path first makes it with JAX. The script creates an environment in VENV (default:
# build/newest_torch_venv), and deletes an earlier one there.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
model=$(realpath "${1:-$root/respodiff_jax/emoji/model}")
stored=$(realpath -m "${2:-$root/tests/data/emoji_gender}")
venv=$(realpath -m "${VENV:-$root/build/newest_torch_venv}")

if [ ! -f "$model/model_index.json" ]; then
    echo "newest_torch: $model is not a diffusers folder" >&2
    exit 2
fi
python "$root/launch/newest_torch.py" store "$model" "$stored"
python -m venv --clear "$venv"
"$venv/bin/pip" install --quiet --upgrade torch==2.13.0 diffusers transformers safetensors \
    accelerate peft pytest scipy
"$venv/bin/python" "$root/launch/newest_torch.py" check "$model" "$stored"
cd "$root/tests"
PYTHONPATH="$root:$root/tests" "$venv/bin/python" -m pytest --quiet --noconftest -c /dev/null \
    --rootdir . -p no:cacheprovider -W ignore::pytest.PytestUnknownMarkWarning test_torch_calls.py \
    test_torch_unets.py
